"""Text embeddings as the student wants them: nothing that was said is lost in silence."""

from dataclasses import replace

import pytest
import tiny
import torch

from sfpp_core.conditioning import fit_text
from sfpp_core.config import DEMO, StudentConfig
from sfpp_core.errors import ConditioningError

WAN = StudentConfig(dim=8, ffn_dim=8, heads=2, layers=1, text_dim=20)


def rows(given, said):
    """Return embeddings of ``given`` rows of which the first ``said`` are not zero."""
    embeddings = torch.zeros(1, given, tiny.CONFIG.text_dim)
    embeddings[:, :said] = 1
    return embeddings


@pytest.mark.parametrize("given", [3, 7, 8, 512])
def test_zero_rows_are_added_or_taken_away(given, caplog):
    fitted = fit_text(rows(given, said=3), tiny.CONFIG)
    assert torch.equal(fitted, rows(7, said=3))
    assert not caplog.text


def test_embeddings_that_say_more_than_the_student_can_hear_are_refused():
    demo = replace(DEMO, text_dim=tiny.CONFIG.text_dim)
    with pytest.raises(
        ConditioningError,
        match="conditioning has 512 embeddings and this student knows 16; use its own text encoder",
    ):
        fit_text(rows(512, said=17), demo)
    assert torch.equal(fit_text(rows(512, said=16), demo), rows(16, said=16))


def test_what_is_not_a_number_is_not_taken_for_zero():
    embeddings = rows(8, said=3)
    embeddings[0, 7, 0] = float("nan")
    with pytest.raises(ConditioningError, match="conditioning has 8 embeddings"):
        fit_text(embeddings, tiny.CONFIG)


def test_a_prompt_too_long_for_wan_is_cut_as_wan_does_and_the_user_is_told(caplog):
    assert torch.equal(fit_text(rows(600, said=513), WAN), rows(512, said=512))
    assert "The prompt has 600 embeddings; only the first 512 count" in caplog.text
    caplog.clear()
    assert fit_text(rows(600, said=512), WAN).shape[1] == 512
    assert not caplog.text


@pytest.mark.parametrize("shape", [(7, 20), (1, 7, 21)])
def test_embeddings_of_another_encoder_are_refused(shape):
    with pytest.raises(ConditioningError, match=r"this student needs \(batch, tokens, 20\)"):
        fit_text(torch.zeros(shape), tiny.CONFIG)
