"""Everything this pack asks of ComfyUI. The only module that may import it.

Written for 0.8 and later: a name or a keyword that came after 0.8 is asked for before it is used.
"""

import gc
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.ldm.modules import attention as host_attention
from comfy_api.latest import ComfyExtension, InputImpl, io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from PIL import Image
from server import PromptServer
from torch import Tensor

__all__ = ["ComfyExtension", "io"]

_MODEL_FOLDER = "diffusion_models"
_ATTACHMENT = "sfpp"

logger = logging.getLogger(__name__)


# --- describing nodes -----------------------------------------------------------------------------------


def schema(**fields: Any) -> io.Schema:
    """Return a node's schema; fields this ComfyUI does not know yet are left out."""
    known = io.Schema.__dataclass_fields__
    return io.Schema(**{name: value for name, value in fields.items() if name in known})


def blocked(message: str) -> Any:
    """Return an output that stops whoever reads it, with ``message``."""
    return ExecutionBlocker(message)


# --- models ---------------------------------------------------------------------------------------------


def model_files() -> list[str]:
    """Return the files in the user's ``models/diffusion_models`` folders."""
    return folder_paths.get_filename_list(_MODEL_FOLDER)


def model_path(name: str) -> Path:
    """Return where one of ``model_files`` lies.

    Raises:
        FileNotFoundError: It is gone.
    """
    return Path(folder_paths.get_full_path_or_raise(_MODEL_FOLDER, name))


def load_model(path: Path) -> Any:
    """Load a diffusion model as core's own loader does: casting, LoRA and offloading are the host's."""
    return comfy.sd.load_diffusion_model(str(path))


def load_tensors(tensors: dict[str, Tensor]) -> Any | None:
    """Load a diffusion model from tensors under Wan's names, as ``load_model`` does from a file.

    ``None`` if core does not know what it is.
    """
    return comfy.sd.load_diffusion_model_state_dict(tensors)


def attach(model: Any, settings: Any) -> Any:
    """Return a clone of ``model`` that carries ``settings``; clones of the clone carry them too."""
    clone = model.clone()
    clone.set_attachments(_ATTACHMENT, settings)
    return clone


def attached(model: Any) -> Any:
    """Return what ``attach`` put on ``model`` or on what it was cloned from, else ``None``."""
    return model.get_attachment(_ATTACHMENT)


def own_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of ``model`` by name as they are without patches, wherever they are now."""
    for name, parameter in model.model.diffusion_model.named_parameters():
        key = f"diffusion_model.{name}"
        if key in model.backup:  # it was patched in place
            yield name, model.backup[key].weight
        elif key in model.hook_backup:
            yield name, model.hook_backup[key][0]
        else:
            yield name, parameter


def patches(model: Any) -> dict[str, Any]:
    """Return what LoRA loaders and their kin have put on the layers of ``model``, by parameter."""
    return {key: added for key, added in model.patches.items() if key.startswith("diffusion_model.")}


def compute_dtype(model: Any) -> torch.dtype:
    """Return the dtype the layers of ``model`` compute in."""
    return model.model.manual_cast_dtype or model.model.get_dtype()


def parameter_reader(model: Any) -> Any:
    """Return a function that brings a bare parameter to the compute device, wherever it was offloaded to."""
    return lambda parameter: comfy.model_management.cast_to(parameter, device=model.load_device)


def attention_of(model: Any, heads: int) -> Any | None:
    """Return the host's attention as ``(B, N, L, D)`` to ``(B, N, L, D)``.

    ``None`` where it has nothing to add: on a CPU without an override its default is the slowest choice.
    """
    options = comfy.model_patcher.create_model_options_clone(model.model_options)["transformer_options"]
    if model.load_device.type == "cpu" and "optimized_attention_override" not in options:
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return host_attention.optimized_attention(
            q, k, v, heads, skip_reshape=True, skip_output_reshape=True, transformer_options=options
        )

    chosen = options.get("optimized_attention_override", host_attention.optimized_attention)
    attend.__name__ = getattr(chosen, "__name__", type(chosen).__name__)
    return attend


def additions_without_effect(model: Any) -> list[str]:
    """Return what other nodes have put on ``model`` that only core's samplers would run."""
    options = model.model_options
    transformer = options.get("transformer_options", {})
    found = [name for name in ("patches", "patches_replace") if transformer.get(name)]
    found += [name for name in ("model_function_wrapper", "context_handler") if name in options]
    for by_key in (*model.wrappers.values(), *transformer.get("wrappers", {}).values()):
        found += [str(key or "a wrapper") for key, wrappers in by_key.items() if wrappers]
    return list(dict.fromkeys(found)) + ["model_sampling"] * ("model_sampling" in model.object_patches)


def marked_causal(model: Any) -> bool:
    """Return whether core knows from its file that ``model`` was trained to generate chunk by chunk."""
    return type(model.model).__name__ == "WAN21_CausalAR"


@contextmanager
def running(model: Any) -> Iterator[None]:
    """Tell the host that a run of ``model`` begins, and that it is over."""
    model.pre_run()
    try:
        yield
    finally:
        model.cleanup()


def load(models: Sequence[Any], memory: float) -> None:
    """Bring ``models`` to the compute device, with ``memory`` bytes of room for activations.

    Costs microseconds where nothing has changed, so it is called before every chunk.
    """
    nested = [extra for model in models for extra in model.get_nested_additional_models()]
    comfy.model_management.load_models_gpu([*models, *nested], memory_required=memory)


def lacks_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that the GPU had no memory left, as the host tells such errors."""
    management = comfy.model_management
    known = getattr(management, "is_oom", lambda error: isinstance(error, management.OOM_EXCEPTION))
    return known(error)


def make_room() -> None:
    """Take every model off the GPU, and give back what is not in use."""
    gc.collect()
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def from_host_latent(latent: Tensor) -> Tensor:
    """Return a latent ``(B, C, ...)`` of the host's scale normalised, with the constants of its Wan."""
    return _latent_format(latent).process_in(latent)


def to_host_latent(latent: Tensor) -> Tensor:
    """Return a normalised latent ``(B, C, ...)`` at the host's scale, with the constants of its Wan."""
    return _latent_format(latent).process_out(latent)


def _latent_format(latent: Tensor) -> Any:
    """Return core's format of latents with so many channels: models of 48 have another than those of 16."""
    formats = (comfy.latent_formats.Wan21, comfy.latent_formats.Wan22)
    return next(kind for kind in formats if kind.latent_channels == latent.shape[1])()


def stop_if_cancelled() -> None:
    """Raise ComfyUI's own interrupt if the user pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


# --- text encoders and decoders of our own --------------------------------------------------------------


def own_clip(tokenizer: Callable[..., Any], encoder: Callable[..., Any], weights: dict[str, Tensor]) -> Any:
    """Return a CLIP made of classes of ours, under core's memory management.

    Args:
        tokenizer: Has ``tokenize_with_weights(text, return_word_ids, **options)``.
        encoder: ``torch.nn.Module`` with ``dtypes``, ``set_clip_options``, ``reset_clip_options``,
            ``encode_token_weights`` and ``load_sd``.
        weights: State dict of the encoder.
    """
    target = comfy.supported_models_base.ClipTarget(tokenizer, encoder)
    parameters = comfy.utils.calculate_parameters(weights)
    return comfy.sd.CLIP(target, parameters=parameters, state_dict=[weights])


def encode_text(clip: Any, text: str) -> Any:
    """Return the CONDITIONING of a text, as core's own node makes it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def own_patcher(module: torch.nn.Module) -> Any:
    """Return ``module`` under core's memory management."""
    management = comfy.model_management
    return comfy.model_patcher.ModelPatcher(
        module, load_device=management.vae_device(), offload_device=management.vae_offload_device()
    )


# --- progress -------------------------------------------------------------------------------------------


def progress_bar(total: int) -> Any:
    """Return the progress bar of the node that is being executed, of ``total`` ticks."""
    return comfy.utils.ProgressBar(total)


def show_progress(node: str, done: int, total: int, picture: Image.Image | None = None) -> None:
    """Set the bar of any node, and the preview on it; the picture is sent as its ``save`` writes it."""
    preview = None if picture is None else ("JPEG", picture, None)
    get_progress_state().update_progress(node, done, total, preview)


def finish_progress(node: str) -> None:
    """Take the bar of any node away."""
    get_progress_state().finish_progress(node)


def previews_wanted() -> bool:
    """Return whether previews may be made: not if the user said ``none``, in the settings or at the start.

    Core makes none either where nobody has said anything; that is no answer, and here they are made.
    """
    if args.preview_method != LatentPreviewMethod.NoPreviews:
        return True
    running = PromptServer.instance.prompt_queue.currently_running.values()
    in_settings = any(item[3].get("preview_method") == "none" for item in running)
    return not in_settings and not any(word.startswith("--preview-m") for word in sys.argv[1:])


def say(text: str) -> None:
    """Show a text on the node that is being executed, while it runs and after."""
    context = get_executing_context()
    if context is not None:
        server = PromptServer.instance
        server.send_progress_text(text, context.node_id, server.client_id)


def show_now(shown: Any) -> None:
    """Show what ``player`` or ``picture`` returned on the node at work, which will not come to its end."""
    context, server = get_executing_context(), PromptServer.instance
    if context is None or server.client_id is None:
        return
    node = get_progress_state().dynprompt.get_display_node_id(context.node_id)
    told = {"node": context.node_id, "display_node": node, "prompt_id": context.prompt_id}
    server.send_sync("executed", {**told, "output": shown.as_dict()}, server.client_id)


# --- videos ---------------------------------------------------------------------------------------------


def output_root() -> Path:
    """Return the output folder."""
    return Path(folder_paths.get_output_directory())


def output_file(prefix: str, width: int, height: int, suffix: str) -> tuple[Path, str]:
    """Return a new path in the output folder, and its subfolder as the host wants it named.

    Args:
        prefix: What the user typed: may name subfolders and hold ``%date%``-like words.
        width: Pixels, for ``%width%``.
        height: Pixels, for ``%height%``.
        suffix: For example ``.mp4``.
    """
    root = folder_paths.get_output_directory()
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root, width, height)
    return Path(folder) / f"{name}_{counter:05}_{suffix}", subfolder


def video(path: Path) -> Any:
    """Return a video file as the host's VIDEO: nothing is decoded until somebody asks."""
    return InputImpl.VideoFromFile(str(path))


def player(path: Path, subfolder: str) -> Any:
    """Return what makes the node play a video of the output folder."""
    return ui.PreviewVideo([ui.SavedResult(path.name, subfolder, io.FolderType.output)])


@contextmanager
def video_on_disk(value: Any) -> Iterator[Path]:
    """Yield a file that holds the host's VIDEO: its own where it has one, else a copy for the while."""
    # Others make one on request, which 0.8 cannot.
    source = value.get_stream_source() if isinstance(value, InputImpl.VideoFromFile) else None
    trimmed = getattr(value, "get_active_trim_window", lambda: (0.0, 0.0))()  # younger than 0.8
    if isinstance(source, str) and not any(trimmed):
        yield Path(source)
        return
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as temporary:
        copy = Path(temporary) / "video.mp4"
        if source is None or any(trimmed):
            value.save_to(str(copy))
        else:
            copy.write_bytes(source.getvalue())
        yield copy


def picture(path: Path, subfolder: str) -> Any:
    """Return what makes the node show a picture of the output folder."""
    return ui.SavedImages([ui.SavedResult(path.name, subfolder, io.FolderType.output)])


def seal(path: Path, metadata: dict[str, Any]) -> None:
    """Give a written video an index and ``metadata``; no frame is encoded again.

    A failure leaves the video as the encoder wrote it, playable but without its workflow.
    """
    if not path.exists():
        return
    sealed = path.with_suffix(".sealing.mp4")
    try:
        video(path).save_to(str(sealed), metadata=metadata)
        sealed.replace(path)
    except Exception as error:  # any: a Cancel of the user may be on its way up, and must arrive
        logger.warning("%s plays, but its workflow could not be stored in it: %s", path, error)
        with suppress(OSError):
            sealed.unlink(missing_ok=True)


def metadata_of(node: type[io.ComfyNode]) -> dict[str, Any]:
    """Return what core writes into a saved file, so that dropping it restores its workflow."""
    hidden = node.hidden
    if args.disable_metadata:
        return {}
    extra = dict(hidden.extra_pnginfo or {})
    return extra | ({"prompt": hidden.prompt} if hidden.prompt else {})
