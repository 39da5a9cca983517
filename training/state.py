"""The saved state of a run: everything needed to go on, bit for bit.

One process writes a file, ``last.pt``. Several write a folder, ``last-000120``, each its own shards, while
training goes on. Either is continued by any number of ranks; whoever saves next replaces it. What reads a run
is given the name ``last.pt`` and finds whichever there is.

What belongs to one rank alone, such as a video it is in the middle of, is a file of that rank in the folder,
and is shared out anew between the ranks that go on.
"""

import ast
import json
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sfpp_core import demo
from sfpp_core.config import RolloutSettings, from_table
from sfpp_core.durable import share_file
from sfpp_core.inspection import inspect
from training import parallel
from training.averaging import plain
from training.config import ConfigError
from training.digests import stamp
from training.journal import LOG
from training.trained import Trained

logger = logging.getLogger(__name__)

FILE = "last.pt"
"""What one process writes."""

_NOTES = "notes.json"
_OWN = "own"
_PARTIAL = ".partial"
_ROLLOUT = "rollout."


def exported(path: Path) -> Path | None:
    """Return the exported file that ``path`` names, ``None`` for a run; an empty one is the embedded demo."""
    if path == Path():
        return demo.file(demo.STUDENT)
    return path if path.suffix == ".safetensors" else None


def newest(path: Path) -> Path | None:
    """Return the newest saved state beside ``path``, a ``last.pt``: a file, or a folder of shards.

    Two exist only if a run was killed between writing one and removing the other; either is a state of it.
    """
    if path.is_file():
        return path
    folders = (folder for folder in path.parent.glob("last-*") if folder.suffix != _PARTIAL)
    return max(folders, default=None)


class Saver:
    """Writes the states of one run.

    Use::

        saver = Saver(out, parts)
        done, notes = saver.resume()
        saver.save(notes)               # several ranks: returns while the files are being written
        saver.finish()
    """

    def __init__(self, out: Path, parts: Mapping[str, Trained[Any]]) -> None:
        """Save ``parts``, by name, in the folder ``out``."""
        self._out, self._parts = out, parts
        self._pending: tuple[Future[Any], Path] | None = None
        self._group: Any = None
        self.saved: tuple[int, Path] | None = None
        """Updates in the last complete state, and where it is."""

    def resume(self, recipe: Mapping[str, str], defaults: Mapping[str, str]) -> tuple[int, float]:
        """Restore every part; return the updates done and the seconds spent.

        Raises:
            ConfigError: The state is of a run with other settings.
        """
        if parallel.rank() == 0:
            for stale in self._out.glob(f"last-*{_PARTIAL}"):
                shutil.rmtree(stale)
        parallel.agree(False)
        path = newest(self._out / FILE)
        if path is None:
            return 0, 0.0
        state = (
            _read_file(path, lazily=parallel.ranks() > 1 or torch.cuda.is_available())
            if path.is_file()
            else json.loads((path / _NOTES).read_text())
        )
        _check_recipe(self._out, state["recipe"], recipe, defaults)
        if path.is_dir():
            from torch.distributed.checkpoint.state_dict_loader import load

            parts = {name: part.state_dict() for name, part in self._parts.items()}
            load(parts, checkpoint_id=path, no_dist=parallel.ranks() == 1)
            state |= parts
        owned = _read_owned(path) if path.is_dir() else state.get(_OWN, {})
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
            part.load_own_state(owned.get(name, {}))
        logger.info("continuing %s at iteration %d", self._out, state["done"])
        self.saved = state["done"], path
        return state["done"], state["seconds"]

    def save(self, notes: Mapping[str, Any]) -> None:
        """Write the state of every part and ``notes``, whole or not at all."""
        state = {name: part.state_dict() for name, part in self._parts.items()}
        owned = {name: own for name, part in self._parts.items() if (own := part.own_state())}
        if parallel.ranks() == 1:
            path = self._out / FILE
            partial = path.with_suffix(_PARTIAL)
            torch.save({**state, **notes, **({_OWN: owned} if owned else {})}, partial)
            os.replace(partial, path)  # noqa: PTH105 - atomic on every system
            self._replaced(notes["done"], path)
        else:
            self._save_shards(state, owned, notes)

    def _save_shards(self, state: dict[str, Any], owned: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
        """Begin to write a folder of shards; what this rank owns is written at once."""
        import torch.distributed as dist
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.finish()
        if self._group is None:
            # A group of its own: its messages would otherwise meet those of the training.
            self._group = dist.new_group(backend="gloo", timeout=parallel.PATIENCE)
        final = self._out / f"last-{notes['done']:06d}"
        partial = final.with_suffix(_PARTIAL)
        partial.mkdir(exist_ok=True)  # another rank may be ahead
        if parallel.rank() == 0:
            (partial / _NOTES).write_text(json.dumps(notes))
        if owned:
            torch.save(dict(owned), partial / f"{_OWN}-{parallel.rank()}.pt")
        copied = _copied(state)
        future = async_save(copied, checkpoint_id=partial, process_group=self._group)
        self._pending = cast("Future[Any]", future), final

    def keep(self) -> None:
        """Let the newest save stay, with the log so far, in a folder that later saves leave alone."""
        assert self.saved is not None
        done, path = self.saved
        final = self._out / f"kept_{done:06d}"
        partial = final.with_suffix(_PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        for file in [path] if path.is_file() else sorted(path.iterdir()):
            place = partial / file.relative_to(self._out)
            place.parent.mkdir(parents=True, exist_ok=True)
            share_file(file, place)
        if (log := self._out / LOG).exists():
            shutil.copy(log, partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)

    def poll(self) -> None:
        """Put what is completely written in the place of what was there before."""
        if self._pending and self._pending[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait until what was begun is written."""
        if self._pending:
            future, final = self._pending
            self._pending = None
            try:
                future.result()
            except BaseException as error:  # what a checkpoint raises is no Exception
                raise RuntimeError(f"{final} was not written: {error}") from error
            if parallel.rank() == 0:
                final.with_suffix(_PARTIAL).rename(final)
                self._replaced(int(final.name.removeprefix("last-")), final)
            self.saved = int(final.name.removeprefix("last-")), final

    def _replaced(self, done: int, path: Path) -> None:
        """Remove what ``path`` replaces."""
        self.saved = done, path
        for other in (self._out / FILE, *self._out.glob("last-*")):
            if other == path or other.suffix == _PARTIAL:
                continue
            if other.is_dir():
                shutil.rmtree(other)
            else:
                other.unlink(missing_ok=True)


def _copied(state: Any) -> Any:
    """Return nested ``state`` with every tensor copied, so that training may go on."""
    if isinstance(state, Mapping):
        return {name: _copied(value) for name, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state.detach().clone() if isinstance(state, Tensor) else state


def _read_file(path: Path, *, lazily: bool) -> dict[str, Any]:
    """Return all a file holds; ``lazily`` reads a tensor when it is used, and holds on to the file."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)


def _read_owned(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what all ranks owned, by part and name; a tensor is read when it is used."""
    owned: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"{_OWN}-*.pt")):
        for part, state in _read_file(path, lazily=True).items():
            owned.setdefault(part, {}).update(state)
    return owned


def _check_recipe(
    out: Path, before: Mapping[str, str], recipe: Mapping[str, str], defaults: Mapping[str, str]
) -> None:
    """Refuse to go on with other settings; a setting the earlier run did not know had its default."""
    for name in sorted(before.keys() | recipe.keys()):
        was = before.get(name, defaults.get(name))
        if was != recipe.get(name):
            raise ConfigError(
                f"{out} holds a run with {name} = {was}, and it is {recipe.get(name)} now; put it back to "
                "continue, or choose another folder."
            )


def read_notes(path: Path) -> dict[str, Any]:
    """Return what is known of ``done``, ``seconds`` and ``recipe`` of a saved run, given its ``last.pt``.

    Raises:
        ConfigError: There is none.
    """
    found = newest(path)
    if found is None:
        raise ConfigError(f"{path} does not exist; run the stage that writes it first.")
    if found.is_dir():
        return json.loads((found / _NOTES).read_text())
    return _notes_in(found, stamp(found))


def read_rollout(path: Path) -> RolloutSettings | None:
    """Return how a student was rolled out in training, given the ``last.pt`` of its run or its exported file.

    ``None`` where the run's recipe, or the file, says nothing of it.

    Raises:
        ConfigError: There is no such run.
        SettingsError: It has a setting that this version does not know.
    """
    if file := exported(path):
        return inspect(file).settings
    recipe: dict[str, str] = read_notes(path).get("recipe", {})
    texts = {name: text for name, text in recipe.items() if name.startswith(_ROLLOUT)}
    if not texts:
        return None
    values = {name.removeprefix(_ROLLOUT): _value(text) for name, text in texts.items()}
    return from_table(RolloutSettings, values, where=str(path))


def _value(text: str) -> Any:
    """Return the number, or the tuple of them, that a recipe holds as text; other text as it is."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


@lru_cache
def _notes_in(path: Path, stamp: tuple[int, int]) -> dict[str, Any]:  # noqa: ARG001 - a changed file is read again
    """Return the notes in a saved state that is one file."""
    state = _read_file(path, lazily=True)
    return {name: state[name] for name in ("done", "seconds", "recipe") if name in state}


def read_averaged(path: Path, *, name: str = "model") -> dict[str, Tensor]:
    """Return the averaged weights of one part of a run, finished or not, or the weights where none are kept.

    Args:
        path: ``last.pt`` in the folder of the run; it need not exist if the run left shards.
        name: Which part: ``model`` is the one every stage has.

    Raises:
        ConfigError: There is no saved state, or it has no such part.
    """
    found = newest(path)
    if found is None:
        raise ConfigError(f"{path} does not exist; run the stage that writes it first.")
    state = {} if found.is_dir() else _read_file(found, lazily=True).get(name, {})
    for kind in ("averaged", "module"):
        held = _read_shards(found, f"{name}.{kind}.") if found.is_dir() else state.get(kind, {})
        if weights := plain(held):
            return weights
    raise ConfigError(f"{found} holds no {name!r}.")


def _read_shards(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Return the tensors in a folder of shards whose names begin so, whole, without that beginning."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    whole = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    load(cast("dict[str, Any]", whole), checkpoint_id=folder, no_dist=True)
    return {key.removeprefix(prefix): tensor for key, tensor in whole.items()}
