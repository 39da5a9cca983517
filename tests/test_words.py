"""The demo's text encoder."""

import pytest
import torch

from sfpp_core.errors import ConditioningError
from sfpp_core.words import WordEncoder, check_prompt

GROUPS = {"shapes": ("circle",)}


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


def test_known_words_that_no_longer_count_are_named(encoder):
    prompt = "red circle moves, dog, left red circle moves"
    assert encoder.surplus(prompt) == ["circle", "moves"]
    assert encoder.surplus("red circle moves left dog red") == []
    unknown, surplus = check_prompt(prompt, encoder, GROUPS)
    assert unknown == "the demo does not know: dog. It goes without. It knows\n  shapes: circle"
    assert surplus == "only the first 5 known words count; left out: circle, moves."


@pytest.mark.parametrize("word", ["2", "круг", "röd", "3d"])
def test_digits_and_other_scripts_are_words_too(encoder, word):
    assert encoder.unknown(f"red {word.upper()} circle") == [word]
    assert "the demo does not know" in check_prompt(f"red {word}", encoder, GROUPS)[0]


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


def test_a_prompt_that_says_nothing_is_refused_with_what_is_known(encoder):
    assert check_prompt("red circle", encoder, GROUPS) == []
    with pytest.raises(ConditioningError, match=r"no word of the prompt 'dog'\. It knows\n  shapes: circle"):
        check_prompt("dog", encoder, GROUPS)
    with pytest.raises(ConditioningError, match=r"the prompt is empty.*\n  shapes: circle"):
        check_prompt(" \n", encoder, GROUPS)
