"""Text embeddings as the student wants them.

Legend: B batch.
"""

import logging

from torch import Tensor
from torch.nn import functional

from .config import WAN_1_3B, StudentConfig
from .errors import ConditioningError

logger = logging.getLogger(__name__)


def fit_text(embeddings: Tensor, config: StudentConfig) -> Tensor:
    """Return ``embeddings`` with as many rows as the student knows: zero rows are added, or taken away.

    Wan attends to the zero rows too, without a mask, so their number is part of the model. Of a prompt that
    is longer than the 512 embeddings of Wan the rest is cut, as Wan itself does, with a warning.

    Args:
        embeddings: ``(B, tokens, text_dim)``.
        config: Architecture of the student.

    Returns:
        ``(B, text_length, text_dim)``.

    Raises:
        ConditioningError: The embeddings have another width or rank, or say more than the student can hear.
    """
    if embeddings.ndim != 3 or embeddings.shape[-1] != config.text_dim:
        raise ConditioningError(
            f"text embeddings have shape {tuple(embeddings.shape)}; this student needs (batch, tokens, "
            f"{config.text_dim}). Use the text encoder the student was trained with."
        )
    known, given = config.text_length, embeddings.shape[1]
    if given > known and bool(embeddings[:, known:].any()):
        _too_long(given, known)
    if given >= known:
        return embeddings[:, :known]
    return functional.pad(embeddings, (0, 0, 0, known - given))


def _too_long(given: int, known: int) -> None:
    """Warn of a prompt that Wan cuts; refuse one that was made for another student."""
    if known != WAN_1_3B.text_length:
        raise ConditioningError(
            f"conditioning has {given} embeddings and this student knows {known}; use its own text encoder."
        )
    logger.warning("The prompt has %d embeddings; only the first %d count, as in Wan.", given, known)
