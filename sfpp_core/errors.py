"""Every error this package raises on purpose.

A message says what was wrong, the value seen, and what to do instead.
"""


class SFPPError(Exception):
    """Base of all errors raised on purpose by ``sfpp_core``."""


class GeometryError(SFPPError, ValueError):
    """A size the user chose cannot be generated."""


class SettingsError(SFPPError, ValueError):
    """A setting of the student, the cache or the sampler is impossible."""


class ConditioningError(SFPPError, ValueError):
    """Text embeddings do not fit the student."""


class CheckpointError(SFPPError, ValueError):
    """A file is not a checkpoint this package can use."""


class PictureError(SFPPError, ValueError):
    """A picture or a clip to start from cannot be used."""


class OutputError(SFPPError, OSError):
    """The video cannot be written where the user asked."""


class NumericsError(SFPPError, ArithmeticError):
    """The student produced numbers that are not finite."""


class RolloutOrderError(SFPPError, RuntimeError):
    """Chunks were opened, written or closed out of order."""


class ScriptError(SFPPError, ValueError):
    """Prompts over time that cannot be read; the message shows the character."""
