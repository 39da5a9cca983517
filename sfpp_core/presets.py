"""How each published family of causal students is rolled out.

Sources: the papers and the code of each family at the commits the module's tests name.
"""

from .config import RolloutSettings
from .errors import SettingsError

SELF_FORCING = "self-forcing"
"""What a student is taken for where its file says nothing else."""

FAMILIES: dict[str, RolloutSettings] = {
    # arXiv:2506.08009: the released code never rolls; a window as long as the horizon is the same up to there
    # and goes on after it.
    SELF_FORCING: RolloutSettings(),
    # arXiv:2510.02283: as trained, 21 latent frames, no sink, nothing computed again.
    "self-forcing++": RolloutSettings(),
    # arXiv:2509.22622: a short window of 9 behind a sink of 3.
    "longlive": RolloutSettings(window=12, sink=3),
    # arXiv:2509.25161: five steps, and the first chunk as a sink right before the window. Its own sampler
    # denoises five chunks at once; one at a time is what its checkpoints do here.
    "rolling-forcing": RolloutSettings(steps=5, sink=3, sink_positions="relative"),
    # Infinity-RoPE: positions relative to the cache. Between the open chunk and what rolls they are the same
    # as absolute ones, so only the sink tells the difference.
    "infinity-rope": RolloutSettings(sink=3, sink_positions="relative"),
    "causal-forcing": RolloutSettings(),
    "causal-forcing-framewise": RolloutSettings(chunk=1),
    # arXiv:2412.07772: three steps, and a new window every 21 latent frames that begins with the last 3.
    "causvid": RolloutSettings(steps=3, shift=8.0, sigmas=(1.0, 0.757, 0.522), overlap=3),
    # Krea Realtime 14B: short context.
    "krea": RolloutSettings(window=6),
}
"""Settings by family, as its authors roll it out, in units of latent frames."""


def of_family(name: str) -> RolloutSettings:
    """Return the settings of one family.

    Raises:
        SettingsError: There is no such family here.
    """
    if name not in FAMILIES:
        raise SettingsError(f"preset is {name!r}; use one of {', '.join(FAMILIES)}.")
    return FAMILIES[name]
