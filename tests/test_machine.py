"""Memory of this machine, asked and said."""

import pytest
import torch

from sfpp_core.machine import in_words, memory_of, peak_memory

CPU = torch.device("cpu")


def test_memory_is_known_here():
    limit, peak = memory_of(CPU), peak_memory()
    assert limit is None or limit > 2**28
    assert peak is None or 2**24 < peak < 2**36


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 B"), (999, "999 B"), (6.04e9, "6.04 GB"), (1e6, "1 MB"), (2e13, "20 TB")]
)
def test_sizes_read_well(size, words):
    assert in_words(size) == words
