"""Where the stages of a reproduction leave what they make, how they are called, and which are done."""

import importlib
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from training import evaluate
from training.config import ConfigError, defaults, flatten, load
from training.journal import read_pace
from training.loop import kept
from training.reproduction.layout import MODULES, Stage, latents_of, lay_out
from training.reproduction.settings import MATCHED, ReproduceSettings
from training.state import FILE, newest, read_notes, read_rollout
from training.worlds import check_runs

SMOKE = {
    "pairs": ("pairs=4", "batch=2", "steps=4"),
    "self_forcing": ("batch=2", "warmup=1", "every=1", "segment=6", "clips=[6, 3]", "horizon=6"),
    "self_forcing_plus": ("batch=2", "warmup=1", "every=1", "segment=6", "clips=[6, 3]", "horizon=12"),
    "grpo": ("prompts=1", "group=2", "latent_frames=6", "exam_videos=2"),
}
"""What a smoke run makes small where the stages themselves do not."""

RESULTS = {"autoencoder": "autoencoder.safetensors", "pairs": "", "evaluate": evaluate.RESULT}
"""What a stage leaves in its folder, by kind; all others a saved state."""


class Stages:
    """All stages of one reproduction."""

    def __init__(self, settings: ReproduceSettings) -> None:
        """Lay out the stages.

        Raises:
            ConfigError: A name is wrong, or a setting of a stage.
        """
        self.settings = settings
        self.out = Path(settings.out)
        self.by_name = {stage.name: stage for stage in lay_out(settings)}
        self._given = {**settings.given, **settings.students}
        self._check_given()
        for stage in self.by_name.values():
            if stage.name not in self._given and stage.kind != "evaluate":
                self.read(replace(stage, clock=None))
        self._check_equal_updates()

    def is_given(self, stage: Stage) -> bool:
        """Return whether an existing result replaces the stage."""
        return stage.name in self._given

    def result(self, name: str) -> Path:
        """Return what a stage leaves to those that read it."""
        if name in self._given:
            return Path(self._given[name])
        return self.folder(name) / RESULTS.get(self.by_name[name].kind, FILE)

    def folder(self, name: str) -> Path:
        """Return the folder of a stage; of a given one, where its result lies."""
        if name not in self._given:
            return self.out / name
        path = Path(self._given[name])
        return path if self.by_name[name].kind == "pairs" else path.parent

    def arguments(self, stage: Stage) -> list[str]:
        """Return the command line of a stage after ``python -m <module>``.

        Raises:
            ConfigError: Its length follows from runs that tell none.
        """
        settings, kind = self.settings, stage.kind
        words = [settings.configs[kind]]
        if settings.smoke:
            words += ["--smoke", *SMOKE.get(kind, ())]
        if kind in ("pairs", "evaluate"):
            words += [f"threads={settings.threads}"]
        else:
            words += [f"loop.threads={settings.threads}", *settings.overrides.get("training", ())]
        if kind == "evaluate":
            words += [*self._exam(), *self._rollout(stage.inputs["student"])]
        if kind == "grpo":
            words += self._rollout(stage.inputs["student_run"])
        if kind != "autoencoder":
            words.append(f"world={settings.world}")
        words += [*settings.overrides.get(kind, ()), *stage.overrides]
        words += [f"{setting}={self.result(name)}" for setting, name in stage.inputs.items()]
        if stage.clock:
            words.append(f"loop.iterations={self._updates_by(*stage.clock)}")
        words.append(f"{'out' if kind in ('pairs', 'evaluate') else 'loop.out'}={self.folder(stage.name)}")
        return words

    def _exam(self) -> list[str]:
        """Return what every student is measured on."""
        settings = self.settings
        return [
            "teacher=",
            f"prompts={settings.captions}",
            f"horizons={list(settings.horizons)}",
            f"batch={settings.batch}",
            f"dtype={settings.dtype}",
        ]

    def _rollout(self, name: str) -> list[str]:
        """Return what makes another stage roll a student out as it was trained.

        A run that is given says itself how; an old one that does not is rolled out as its stage would be, or
        as the settings of the other stage have it where it is of no stage.
        """
        student = self.by_name[name]
        rollout = read_rollout(self.result(name)) if self.is_given(student) else None
        if rollout is None and name not in self.settings.students:
            rollout = self.read(replace(student, clock=None)).rollout
        table = {} if rollout is None else asdict(rollout)
        return [f"rollout.{setting}={_toml(value)}" for setting, value in table.items()]

    def read(self, stage: Stage) -> Any:
        """Return the settings of a stage, of the kind its module has.

        Raises:
            ConfigError: They are wrong.
        """
        module, kind = MODULES[stage.kind]
        loaded = getattr(importlib.import_module(f"training.{module}"), kind)
        try:
            return load(loaded, self.arguments(stage), stage=stage.kind)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from error

    def is_complete(self, stage: Stage) -> bool:
        """Return whether a stage is done and nothing it read has changed since.

        Raises:
            ConfigError: Its folder holds a run with other settings, or a longer one.
        """
        if self.is_given(stage):
            return True
        if stage.kind == "pairs" or not self.result(stage.name).exists():
            return False  # the pairs' own stage looks at each file, and makes what is missing
        if not all(self.is_complete(self.by_name[name]) for name in self._decisive(stage)):
            return False
        settings = self.read(stage)
        if stage.kind == "evaluate":
            made = json.loads(self.result(stage.name).read_text())
            return made["recipe"] == evaluate.recipe_of(settings) and len(made["prompts"]) == settings.prompts
        return self._is_trained(stage, settings)

    def _decisive(self, stage: Stage) -> Iterable[str]:
        """Return the stages without which nothing can be said of ``stage``."""
        return stage.needs if stage.kind == "evaluate" else stage.clock or ()

    def _is_trained(self, stage: Stage, settings: Any) -> bool:
        """Return whether the run in a stage's folder has made all its updates."""
        notes, wanted = read_notes(self.folder(stage.name) / FILE), settings.loop.iterations
        before = kept(defaults(type(settings))) | notes["recipe"]  # what an older run did not know of yet
        for name, value in kept(flatten(asdict(settings))).items():
            if before.get(name, value) != value:
                raise ConfigError(
                    f"{self.folder(stage.name)} holds a run with {name} = {before[name]}, and it is "
                    f"{value} now; put it back, or choose another folder for out."
                )
        if notes["done"] > wanted:
            raise ConfigError(
                f"{self.folder(stage.name)} holds a run of {notes['done']} updates, and {wanted} are wanted; "
                "put loop.iterations back, or choose another folder for out."
            )
        return notes["done"] == wanted

    def wanted(self) -> list[Stage]:
        """Return the stages to run, each after those it needs; what only complete ones need is left out."""
        chosen: dict[str, Stage] = {}

        def visit(stage: Stage) -> None:
            if stage.name in chosen or self.is_complete(stage):
                return
            for name in stage.needs:
                visit(self.by_name[name])
            chosen[stage.name] = stage

        for stage in self.measurings():
            visit(stage)
        order = list(self.by_name)
        return sorted(chosen.values(), key=lambda stage: order.index(stage.name))

    def measurings(self) -> list[Stage]:
        """Return the stages that measure students."""
        return [stage for stage in self.by_name.values() if stage.kind == "evaluate"]

    def _updates_by(self, timed: str, paced: str) -> int:
        """Return the updates that the run ``paced`` would make in the time the run ``timed`` took."""
        done, paces = read_notes(self.result(timed))["done"], []
        if self.settings.time_ratio:
            return max(1, round(done * self.settings.time_ratio))
        for name in (timed, paced):
            pace = read_pace(self.folder(name))
            if pace is None:
                raise ConfigError(
                    f"{self.folder(name)} has no log of its time, from which the length of the run with "
                    "equal time follows; give a run with its log.jsonl, or set equal_time=false."
                )
            paces.append(pace)
        return max(1, round(done * paces[0] / paces[1]))

    def _check_given(self) -> None:
        """Refuse results of unknown stages, and those that are not there."""
        known = {*self.by_name, "latents"} - {stage.name for stage in self.measurings()}
        if unknown := sorted(set(self.settings.given) - known):
            raise ConfigError(
                f"[given] has unknown stage {unknown[0]!r}; known stages: {', '.join(sorted(known))}."
            )
        stages = {stage.name for stage in lay_out(replace(self.settings, students={}))}
        if taken := sorted(set(self.settings.students) & stages):
            raise ConfigError(f"[students] has {taken[0]!r}, which is the name of a stage; choose another.")
        for name, path in self._given.items():
            there = Path(path).is_dir() if name == "pairs" else newest(Path(path)) is not None
            if not there:
                raise ConfigError(f"{name} is given as {path}, which does not exist.")
        self._check_clips()
        # The teacher may have learned another world: the causal one begins with it.
        others = ("autoencoder", "teacher", "pairs", "latents")
        runs = {name: path for name, path in self._given.items() if name not in others}
        check_runs(self.settings.world, runs)

    def _check_clips(self) -> None:
        """Refuse true clips that no stage would make: both that could are replaced by what is given."""
        makers, path = {"teacher", "causal"}, latents_of(self.settings)
        readers = [stage.name for stage in self.by_name.values() if stage.after and not self.is_given(stage)]
        if readers and makers <= set(self._given) and not Path(path).exists():
            raise ConfigError(
                f"stage {readers[0]} goes on from true clips, and {path} does not exist; teacher and causal "
                "are given, so nothing makes it: give the file of latents too."
            )

    def _check_equal_updates(self) -> None:
        """Refuse methods that would not be compared at equal updates of the student."""
        counts = {}
        for stage in self.by_name.values():
            if stage.name in {f"{kind}-{seed}" for kind in MATCHED for seed in self.settings.seeds[:1]}:
                if self.is_given(stage):
                    return
                read = self.read(stage)
                counts[stage.name] = ((read.loop.iterations - read.warmup) // read.every, read.batch)
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name} {moves} of batch {batch}" for name, (moves, batch) in counts.items())
            raise ConfigError(
                f"the methods would make different updates of the student: {told}; make them equal."
            )


def _toml(value: Any) -> str:
    """Return ``value`` as TOML."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)
