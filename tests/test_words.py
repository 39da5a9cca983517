"""The demo's text encoder."""

import pytest
import torch

from sfpp_core.errors import ConditioningError
from sfpp_core.words import WordEncoder


@pytest.fixture
def encoder():
    return WordEncoder(("red", "circle", "moves", "left"), text_dim=6, text_length=5)


def test_words_become_rows_and_the_rest_is_zero(encoder):
    embeddings = encoder(["red circle"])
    assert embeddings.shape == (1, 5, 6)
    assert torch.equal(embeddings[0, :2], encoder.table.weight[:2])
    assert not embeddings[0, 2:].any()


def test_case_and_punctuation_do_not_matter(encoder):
    assert torch.equal(encoder(["Red, circle!"]), encoder(["red circle"]))


def test_unknown_words_are_left_out_and_listed_once_in_order(encoder):
    prompt = "red dog circle cat dog"
    assert encoder.unknown(prompt) == ["dog", "cat"]
    assert torch.equal(encoder([prompt]), encoder(["red circle"]))


def test_a_long_prompt_is_cut_at_the_text_length(encoder):
    assert torch.equal(
        encoder(["red circle moves left red circle moves"]), encoder(["red circle moves left red"])
    )


def test_the_empty_prompt_is_all_zeros(encoder):
    assert not encoder([""]).any()


def test_prompts_do_not_influence_each_other(encoder):
    together = encoder(["red circle", "", "moves left"])
    assert all(
        torch.equal(together[row], encoder([prompt])[0])
        for row, prompt in ((0, "red circle"), (2, "moves left"))
    )


def test_the_gradient_reaches_the_words_said_and_no_others(encoder):
    encoder(["circle"]).sum().backward()
    assert encoder.table.weight.grad.any(dim=1).tolist() == [False, True, False, False]


def test_a_prompt_of_which_nothing_is_known_is_refused(encoder):
    encoder.check("a red thing")
    with pytest.raises(ConditioningError, match=r"no word of the prompt 'dog'.*circle"):
        encoder.check("dog")
