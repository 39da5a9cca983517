"""What a reproduction does: its seeds, its ablations, and what of it exists already."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from training.config import ConfigError
from training.worlds import world_called

KINDS = (
    "autoencoder", "teacher", "causal", "pairs", "ode", "self_forcing", "self_forcing_plus", "grpo",
    "evaluate",
)  # fmt: skip
"""Kinds of stages, by which configurations and overrides are named."""

MATCHED = ("self_forcing", "self_forcing_plus")
"""Kinds an ablation may change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReproduceSettings:
    """One reproduction."""

    SMOKE: ClassVar = (
        "smoke=true",
        "given={}",
        "students={}",
        "seeds=[0, 1]",
        "ablation_seeds=[0]",
        'ablations={self_forcing_plus={beta_1_2=["beta=[1, 2]"]}}',
        "overrides={}",
        "grpo=false",
        "captions=2",
        "batch=2",
        "horizons=[1, 2]",
    )

    out: str
    """Folder of everything that is made."""

    world: str = "standard"
    """Which of the demo's worlds, see ``worlds``; every stage but the autoencoder is told."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of distribution matching, the same for all methods. The stages before it are made once."""

    ablation_seeds: tuple[int, ...] = (0,)
    """Of the ablations; each must be one of ``seeds``."""

    equal_time: bool = True
    """Train Self-Forcing a second time, for as long as Self-Forcing++ took."""

    time_ratio: float = 0.0
    """Time of an update of Self-Forcing++ over that of one of Self-Forcing, from which the length of the
    second run follows. 0 takes it from their logs, which other work on the machine falsifies."""

    grpo: bool = False
    """Reinforce the students of Self-Forcing++."""

    jobs: int = 1
    """Stages that may run at once."""

    threads: int = 1
    """CPU threads of each."""

    captions: int = 24
    """Captions each student is measured on; no stage trains on their scenes."""

    horizons: tuple[int, ...] = (1, 4, 10, 20, 50)
    """Lengths measured, in multiples of the teacher's 81 frames."""

    batch: int = 24
    """Videos measured together; their noise follows from it."""

    dtype: str = "auto"
    """What students compute in while they are measured, see ``EvaluateSettings``."""

    plots: bool = True
    """Draw plots, which needs matplotlib."""

    smoke: bool = False
    """Run every stage with ``--smoke``."""

    configs: Mapping[str, str] = field(default_factory=dict)
    """Settings file of each kind of stage."""

    overrides: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """``key=value`` on top of the settings file, by kind of stage; ``training`` is for all that train."""

    given: Mapping[str, str] = field(default_factory=dict)
    """Existing results that replace stages, by the name of the stage: ``last.pt`` of a run, the weights of
    the autoencoder, the folder of the pairs; and the file of ``latents``."""

    students: Mapping[str, str] = field(default_factory=dict)
    """Other students to measure beside, by a name of one's own: ``last.pt`` of their runs. Each is rolled out
    as it was trained."""

    ablations: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    """By what is changed (``self_forcing`` or ``self_forcing_plus``) and a name of one's own: overrides."""

    def __post_init__(self) -> None:
        world_called(self.world)
        for name in ("jobs", "threads", "captions", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.horizons or min(self.horizons) < 1:
            raise ConfigError(
                f"horizons is {list(self.horizons)}; name at least one, from 1, e.g. [1, 10, 50]."
            )
        if not self.time_ratio >= 0:
            raise ConfigError(
                f"time_ratio is {self.time_ratio}; it must be 0, to take it from the logs, or more, e.g. 1.4."
            )
        if missing := sorted(set(self.ablation_seeds) - set(self.seeds)):
            raise ConfigError(
                f"ablation_seeds has {missing[0]}, which is none of seeds, {list(self.seeds)}: without it "
                "there is nothing to compare with."
            )
        self._check_names()

    def _check_names(self) -> None:
        """Refuse tables with unknown keys."""
        known = {"configs": KINDS, "overrides": (*KINDS, "training"), "ablations": MATCHED}
        for table, names in known.items():
            if unknown := sorted(set(getattr(self, table)) - set(names)):
                raise ConfigError(
                    f"[{table}] has unknown key {unknown[0]!r}; known keys: {', '.join(names)}."
                )
        if missing := [kind for kind in KINDS if kind not in self.configs]:
            raise ConfigError(f"[configs] names no settings file of {missing[0]!r}.")
        lists = [
            *self.overrides.values(),
            *(words for group in self.ablations.values() for words in group.values()),
        ]
        for words in lists:
            if isinstance(words, str) or not all(isinstance(word, str) for word in words):
                raise ConfigError(f'overrides are lists of text, e.g. ["batch=4"], and this is {words!r}.')
