"""The stages of a reproduction and what each reads, as they follow from its settings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from training.config import override
from training.reproduction.settings import ReproduceSettings

MODULES = {
    "autoencoder": ("train_autoencoder", "Settings"),
    "teacher": ("train_teacher", "TeacherSettings"),
    "causal": ("train_causal", "CausalSettings"),
    "pairs": ("make_ode_pairs", "PairSettings"),
    "ode": ("train_ode", "OdeSettings"),
    "self_forcing": ("train_dmd", "DmdSettings"),
    "self_forcing_plus": ("train_dmd", "DmdSettings"),
    "grpo": ("train_grpo", "GrpoSettings"),
    "evaluate": ("evaluate", "EvaluateSettings"),
}
"""Module and settings of each kind of stage."""

ODE, PLAIN, LONGER, PLUS, REINFORCED = (
    "ODE init",
    "Self-Forcing",
    "Self-Forcing, time of ++",
    "Self-Forcing++",
    "Self-Forcing++ and GRPO",
)
"""What tables call the methods."""

METHODS = {"self_forcing": PLAIN, "self_forcing_plus": PLUS}
"""The same by kind of stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One process of a reproduction."""

    name: str
    """Of the stage, and of its folder."""

    kind: str
    """Which settings file, and which module."""

    inputs: Mapping[str, str] = field(default_factory=dict)
    """The stage whose result it reads, by setting."""

    overrides: tuple[str, ...] = ()
    """On top of the settings file and of the overrides of its kind."""

    after: tuple[str, ...] = ()
    """Stages that make other files it reads."""

    clock: tuple[str, str] | None = None
    """Two runs: it trains for as long as the first took, at the pace of the second. ``None``: as its settings
    say."""

    method: str = ""
    """What tables call the student it makes or measures; empty for what makes none."""

    seed: int | None = None
    """Of that student; ``None`` for one that all seeds share."""

    ablates: str = ""
    """Method that it changes one thing of."""

    @property
    def module(self) -> str:
        """Name of the module that is run."""
        return f"training.{MODULES[self.kind][0]}"

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the stages that come before it."""
        return tuple(dict.fromkeys((*self.inputs.values(), *self.after, *(self.clock or ()))))


def lay_out(settings: ReproduceSettings) -> Iterator[Stage]:
    """Yield every stage, each after those it needs, and every student before what measures it."""
    yield from _start(settings)
    for seed in settings.seeds:
        for student in _students(settings, seed):
            yield student
            yield _measuring(student)
    for seed in settings.ablation_seeds:
        for kind, group in settings.ablations.items():
            for name, words in group.items():
                student = _matching(kind, seed, name=f"{kind}-{name}", overrides=tuple(words))
                if _reads_clips(words):
                    student = _on_clips(student, settings)
                yield student
                yield _measuring(student)
    for name in settings.students:
        yield Stage(name=name, kind="ode", method=name)  # always given
        yield _measuring(Stage(name=name, kind="ode", method=name))


def _start(settings: ReproduceSettings) -> Iterator[Stage]:
    """Yield what all seeds share: autoencoder, teachers, trajectories, causal initialisation."""
    latents = f"latents={latents_of(settings)}"
    decoder = {"autoencoder": "autoencoder"}
    yield Stage(name="autoencoder", kind="autoencoder")
    yield Stage(name="teacher", kind="teacher", inputs=decoder, overrides=(latents,))
    inputs = {**decoder, "teacher_run": "teacher"}
    yield Stage(name="causal", kind="causal", inputs=inputs, overrides=(latents,))
    yield Stage(name="pairs", kind="pairs", inputs={"teacher": "causal"})
    inputs = {**decoder, "pairs": "pairs", "teacher_run": "causal"}
    ode = Stage(name="ode", kind="ode", inputs=inputs, method=ODE)
    yield ode
    yield _measuring(ode)


def _students(settings: ReproduceSettings, seed: int) -> Iterator[Stage]:
    """Yield the students of one seed."""
    plain, plus = _matching("self_forcing", seed), _matching("self_forcing_plus", seed)
    yield plain
    yield plus
    if settings.equal_time:
        yield Stage(
            name=f"self_forcing_longer-{seed}",
            kind="self_forcing",
            inputs=plain.inputs,
            overrides=plain.overrides,
            clock=(plus.name, plain.name),
            method=LONGER,
            seed=seed,
        )
    if settings.grpo:
        yield Stage(
            name=f"grpo-{seed}",
            kind="grpo",
            inputs={"autoencoder": "autoencoder", "student_run": plus.name},
            overrides=plain.overrides,
            method=REINFORCED,
            seed=seed,
        )


def _matching(kind: str, seed: int, *, name: str = "", overrides: tuple[str, ...] = ()) -> Stage:
    """Return a run of distribution matching; one with a name is an ablation."""
    return Stage(
        name=f"{name or kind}-{seed}",
        kind=kind,
        inputs={"autoencoder": "autoencoder", "teacher_run": "causal", "student_run": "ode"},
        overrides=(f"loop.seed={seed}", *overrides),
        method=METHODS[kind] + (f": {name.removeprefix(f'{kind}-')}" if name else ""),
        seed=seed,
        ablates=METHODS[kind] if name else "",
    )


def latents_of(settings: ReproduceSettings) -> str:
    """Return the file of clips the teachers learn from."""
    return settings.given.get("latents", f"{settings.out}/latents.safetensors")


def _reads_clips(words: Sequence[str]) -> bool:
    """Return whether a run with these overrides goes on from true clips."""
    table: dict[str, Any] = {}
    for word in words:
        override(table, word)
    return table.get("past") == "data"


def _on_clips(stage: Stage, settings: ReproduceSettings) -> Stage:
    """Return ``stage`` as one that reads the clips, which the teacher's stage makes if they are not given."""
    after = () if "latents" in settings.given else ("teacher",)
    return replace(stage, overrides=(*stage.overrides, f"latents={latents_of(settings)}"), after=after)


def _measuring(student: Stage) -> Stage:
    """Return the stage that measures what ``student`` makes."""
    return Stage(
        name=f"evaluate-{student.name}",
        kind="evaluate",
        inputs={"autoencoder": "autoencoder", "student": student.name},
        method=student.method,
        seed=student.seed,
        ablates=student.ablates,
    )
