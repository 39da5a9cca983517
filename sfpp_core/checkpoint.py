"""Students, and the words of the demo, on disk: saving, and loading straight into a network.

What is saved carries Wan's own names and no others; what is loaded may carry any that are known.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .config import WAN_1_3B, RolloutSettings, StudentConfig, to_table
from .errors import CheckpointError
from .inspection import HOST_KEY, STUDENT_KEY, TEACHER, WORDS_KEY, FileInfo, describe, listed
from .naming import Choice
from .network import WanNetwork
from .presets import SELF_FORCING, of_family
from .quantised import dequantised
from .weights import Weights, open_weights
from .weights_file import DTYPES, Header, read_header, read_tensors, write
from .words import WordEncoder

HOST_MARK = {"transformer": {"causal_ar": True}}
"""Tells core ComfyUI that a student of 16 channels generates chunk by chunk. Of 48 it knows none that does,
and cannot load one with this mark."""

QUANTISED_DTYPE = torch.bfloat16
"""What quantised weights become where no dtype is asked for."""

logger = logging.getLogger(__name__)


class Adapter(Protocol):
    """A change to some weights of a model, e.g. a LoRA."""

    @property
    def changed(self) -> Set[str]:
        """Wan's names of the parameters that change."""
        ...

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return the changed ``weight``, float32 as it came, of the parameter ``name``."""
        ...


def save(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: StudentConfig,
    settings: RolloutSettings,
    *,
    stage: str,
    dtype: torch.dtype | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a student as one file that carries its architecture and its settings.

    Args:
        path: File to write; it appears once it is whole.
        tensors: A state dict of ``WanNetwork``.
        config: Architecture.
        settings: How it was trained to be rolled out.
        stage: Training stage that made it, e.g. ``ode``, or ``teacher``.
        dtype: Dtype in the file; ``None`` keeps that of each tensor.
        notes: What else is worth knowing and fits into JSON, e.g. the version of the world.

    Raises:
        CheckpointError: The tensors are not those of ``config``, or ``notes`` uses a key that is taken.
        OutputError: The file cannot be written.
    """
    _check_tensors(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, config)
    table = {"student": to_table(config), "rollout": to_table(settings), "stage": stage}
    if taken := sorted(set(table) & set(notes or {})):
        raise CheckpointError(f"notes has {taken[0]!r}, a key that is taken; choose another.")
    metadata = {STUDENT_KEY: json.dumps({**table, **(notes or {})})}
    if stage != TEACHER and config.channels == WAN_1_3B.channels:
        metadata[HOST_KEY] = json.dumps(HOST_MARK)
    write(
        path, {name: tensor.detach().to(dtype or tensor.dtype) for name, tensor in tensors.items()}, metadata
    )


def load_student(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    adapters: Sequence[Adapter] = (),
    choice: Choice = "auto",
) -> tuple[WanNetwork, StudentConfig, RolloutSettings]:
    """Load a student from any layout that Wan transformers have; one not trained causally with a warning.

    Tensors go one by one from the file into a network that has no memory of its own, so the peak is about the
    size of the result.

    Args:
        path: File, index of shards, or folder, as for ``open_weights``.
        device: Where the weights go.
        dtype: Dtype of the weights; ``None`` keeps that of the file, and makes bfloat16 of quantised ones.
        adapters: Changes to the weights, merged one after another in float32.
        choice: Which weights of a training state: by default the averaged ones where there are any.

    Returns:
        The network, frozen; its architecture; the settings it was trained with, or those of its family.

    Raises:
        CheckpointError: Not a student, or a tensor is missing, unexpected, mis-shaped, or not finite; or an
            adapter changes something the student does not have.
    """
    weights = open_weights(path)
    info = check_student(path, weights, choice=choice)
    assert info.config is not None
    _check_adapters(path, info, adapters)
    if not info.causal:
        logger.warning(
            "%s was not trained to generate chunk by chunk, as far as it says: expect poor video from it; a "
            "student trained with Self-Forcing does better.",
            path.name,
        )
    if dtype is None and info.quantisation.scheme:
        dtype = QUANTISED_DTYPE
    network = WanNetwork(info.config, device="meta")
    for name, stored in parameters(weights, info):
        merged = stored
        for adapter in adapters:
            if name in adapter.changed:
                merged = adapter.merged(name, merged.float())
        module, _, leaf = name.rpartition(".")
        parameter = _finite(path, name, merged, dtype or stored.dtype, device)
        setattr(network.get_submodule(module), leaf, nn.Parameter(parameter, requires_grad=False))
    return network.eval(), info.config, info.settings or of_family(info.family or SELF_FORCING)


def parameters(weights: Weights, info: FileInfo) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters by Wan's names, quantised ones as float32, one in memory at a time."""
    wans = {stored: name for name, stored in info.names.items()}
    for stored_name, stored in weights.read(wans):
        name = wans[stored_name]
        if name in info.quantisation.scales:
            yield name, dequantised(stored, weights.tensor(info.quantisation.scales[name]))
        else:
            yield name, stored


def _check_adapters(path: Path, info: FileInfo, adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that were made for another model."""
    for adapter in adapters:
        if foreign := sorted(adapter.changed - info.names.keys()):
            raise CheckpointError(
                f"an adapter changes {listed(foreign)}, which {path} lacks; choose another."
            )


def check_student(path: Path, weights: Weights | None = None, *, choice: Choice = "auto") -> FileInfo:
    """Return what ``path`` holds; by names, shapes and dtypes it must be a student that can be loaded.

    Args:
        path: File, index of shards, or folder.
        weights: What was opened there, if it was.
        choice: Which weights of a training state.

    Raises:
        CheckpointError: As ``load_student``, but for numbers that are not finite.
    """
    weights = weights or open_weights(path)
    info = describe(path, weights, choice=choice)
    if info.config is None:
        raise CheckpointError(
            f"{path} is not a student; it looks like {info.looks_like}. "
            "Choose a Wan 2.1 text-to-video student."
        )
    _check_tensors(
        path, {name: weights.entries[stored].shape for name, stored in info.names.items()}, info.config
    )
    return info


def save_words(path: Path, encoder: WordEncoder, *, groups: Mapping[str, Sequence[str]]) -> None:
    """Write a word encoder with its vocabulary, in float16.

    Args:
        path: File to write; it appears once it is whole.
        encoder: Vocabulary and vectors.
        groups: The words worth telling a user, by heading, e.g. ``{"colours": ("red", "blue")}``.
    """
    table = {
        "vocabulary": list(encoder.vocabulary),
        "text_length": encoder.text_length,
        "groups": {name: list(words) for name, words in groups.items()},
    }
    write(path, {"table": encoder.table.weight.detach().half()}, {WORDS_KEY: json.dumps(table)})


def load_words(path: Path) -> tuple[WordEncoder, dict[str, tuple[str, ...]]]:
    """Read what ``save_words`` wrote: the encoder, float32 and frozen, and the words by heading.

    Raises:
        CheckpointError: The file is missing or damaged, or holds something else.
    """
    header = read_header(path)
    vocabulary, text_length, groups = _words_table(path, header)
    _check_dtypes(path, header)
    ((name, stored),) = read_tensors(path, header)
    vectors = _finite(path, name, stored, torch.float32, "cpu")
    with torch.device("meta"):
        encoder = WordEncoder(vocabulary, text_dim=vectors.shape[1], text_length=text_length)
    encoder.table.weight = nn.Parameter(vectors, requires_grad=False)
    return encoder, groups


def _words_table(path: Path, header: Header) -> tuple[list[str], int, dict[str, tuple[str, ...]]]:
    """Return the vocabulary, the text length and the groups that the metadata of ``path`` holds."""
    table = header.table(WORDS_KEY, where=str(path))
    if table is None:
        raise CheckpointError(
            f"{path} is not a word encoder; it looks like {describe(path, header).looks_like}."
        )
    try:
        vocabulary, length = [str(word) for word in table["vocabulary"]], int(table["text_length"])
        groups = {str(name): tuple(map(str, words)) for name, words in table["groups"].items()}
        ((words, _),) = (entry.shape for entry in header.tensors.values())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is incomplete ({error!r}); save it again.") from error
    if words != len(vocabulary):
        raise CheckpointError(f"{path} has {len(vocabulary)} words but {words} vectors; save it again.")
    return vocabulary, length, groups


def _check_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], config: StudentConfig) -> None:
    """Refuse tensors that are not exactly those of ``config``."""
    wanted = parameter_shapes(config)
    if missing := [name for name in wanted if name not in shapes]:
        raise CheckpointError(
            f"{path} lacks {listed(missing)}; is it complete? Get it again, or name the folder if it is one "
            "of several shards."
        )
    if foreign := [name for name in shapes if name not in wanted]:
        raise CheckpointError(
            f"{path} has tensors that Wan 2.1 text-to-video has not: {listed(foreign)}; choose another file."
        )
    if wrong := [name for name in wanted if shapes[name] != wanted[name]]:
        named = [f"{name} {shapes[name]} instead of {wanted[name]}" for name in wrong]
        raise CheckpointError(f"{path} has tensors of the wrong shape: {listed(named)}; get it again.")


def parameter_shapes(config: StudentConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of ``config``, by name."""
    single = WanNetwork(replace(config, layers=1), device="meta").named_parameters()
    shapes = {}
    for name, parameter in single:
        _, of_a_layer, rest = name.partition("blocks.0.")
        names = [f"blocks.{layer}.{rest}" for layer in range(config.layers)] if of_a_layer else [name]
        shapes |= dict.fromkeys(names, tuple(parameter.shape))
    return shapes


def _check_dtypes(path: Path, header: Header) -> None:
    """Refuse weights in dtypes that cannot be computed with."""
    for name, entry in header.tensors.items():
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} is {entry.dtype}; words are kept in {', '.join(DTYPES)}. Save it again."
            )


def _finite(
    path: Path, name: str, stored: Tensor, dtype: torch.dtype | None, device: torch.device | str
) -> Tensor:
    """Return ``stored`` as it is wanted, once it is known to hold only finite numbers."""
    weights = stored.to(device=device, dtype=dtype)
    if _all_finite(weights):
        return weights
    if _all_finite(stored):
        raise CheckpointError(f"{path}: {name} is too large for {weights.dtype}; use bfloat16 or float32.")
    raise CheckpointError(
        f"{path}: {name} holds numbers that are not finite; the file is damaged, get it again."
    )


def _all_finite(tensor: Tensor) -> bool:
    """Return whether every number is finite, without a second tensor of the size of the first."""
    if tensor.element_size() == 1:
        tensor = tensor.float()  # 8-bit floats know no extremes
    return not tensor.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
