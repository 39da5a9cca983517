"""Text embeddings as the student wants them.

Legend: B batch.
"""

from torch import Tensor
from torch.nn import functional

from .config import StudentConfig
from .errors import ConditioningError


def fit_text(embeddings: Tensor, config: StudentConfig) -> Tensor:
    """Return ``embeddings`` padded with zeros, or cut, to the text length of the student.

    Wan attends to the zero rows too, without a mask, so their number is part of the model.

    Args:
        embeddings: ``(B, tokens, text_dim)``.
        config: Architecture of the student.

    Returns:
        ``(B, text_length, text_dim)``.

    Raises:
        ConditioningError: The embeddings have another width or rank.
    """
    if embeddings.ndim != 3 or embeddings.shape[-1] != config.text_dim:
        raise ConditioningError(
            f"text embeddings have shape {tuple(embeddings.shape)}; this student needs (batch, tokens, "
            f"{config.text_dim}). Use the text encoder the student was trained with."
        )
    missing = config.text_length - embeddings.shape[1]
    if missing <= 0:
        return embeddings[:, : config.text_length]
    return functional.pad(embeddings, (0, 0, 0, missing))
