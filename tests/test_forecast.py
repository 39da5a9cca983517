"""The forecast of memory, against what tensors really take."""

import weakref
from dataclasses import replace

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sfpp_core.attention import matmul, sdpa
from sfpp_core.cache_shape import Bytes, CacheShape
from sfpp_core.config import WAN_1_3B, RolloutSettings, StudentConfig
from sfpp_core.forecast import forecast
from sfpp_core.geometry import VideoGeometry
from sfpp_core.kv_cache import RollingKVCache
from sfpp_core.machine import in_words
from sfpp_core.sampler import LongSampler
from sfpp_core.student import CausalStudent
from sfpp_core.tiny_autoencoder import TinyAutoencoder

CONFIG = StudentConfig(dim=128, ffn_dim=512, heads=2, layers=2, text_dim=64, text_length=16)


class Alive(TorchDispatchMode):
    """Counts the bytes of storages made under it and still alive, and their peak; weights do not count."""

    def __init__(self, module):
        super().__init__()
        self.alive = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in module.state_dict().values()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        key = storage._cdata
        if key not in self.seen:
            self.seen.add(key)
            size = storage.nbytes()
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self.seen.discard(key)
        self.alive -= size


def geometry(height=128, width=192, **options):
    return VideoGeometry(height=height, width=width, **{"frames": 40, **options})


def nbytes(*tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("storage", "lead"), [("plain", 0), ("plain", 1), ("fp8", 1), ("host", 0), ("fp8-host", 1)]
)
def test_weights_cache_and_text_are_exact(dtype, storage, lead):
    settings = RolloutSettings(window=12, sink=3, sink_positions="relative")
    expected = forecast(CONFIG, geometry(lead=lead), settings, dtype, storage=storage)
    network = tiny.network(CONFIG, dtype=dtype)
    assert expected.weights == nbytes(*network.parameters())
    shape = CacheShape.of(CONFIG, geometry(lead=lead), settings)
    cache = RollingKVCache(shape, batch=1, like=torch.empty(0, dtype=dtype), storage=storage)
    assert expected.cache + expected.cache_on_host == nbytes(*cache.storage.tensors())
    assert (expected.cache_on_host > 0) == ("host" in storage)
    bound = CausalStudent(network, CONFIG).bind(tiny.text(CONFIG))
    assert expected.text == nbytes(*(tensor for pair in bound._text for tensor in pair))
    assert expected.device == sum(
        getattr(expected, name) for name in ("weights", "cache", "text", "activations", "decoder")
    )
    assert expected.total == expected.device + expected.cache_on_host


@pytest.mark.parametrize(
    ("attend", "size", "storage"),
    [
        (sdpa, (128, 192), "plain"),
        (matmul, (128, 192), "plain"),
        (sdpa, (64, 64), "plain"),
        (matmul, (64, 64), "plain"),
        (sdpa, (64, 64), "fp8"),
        (matmul, (64, 64), "host"),
        (matmul, (64, 64), "fp8-host"),
    ],
)
def test_activations_are_forecast_a_little_high(attend, size, storage):
    check_activations(CONFIG, RolloutSettings(window=9), size, attend, storage)


@pytest.mark.parametrize(("sink", "storage"), [(3, "plain"), (6, "plain"), (6, "fp8-host")])
def test_a_sink_that_moves_needs_no_more_for_many_layers(sink, storage):
    settings = RolloutSettings(window=9, sink=sink, sink_positions="relative")
    check_activations(replace(CONFIG, layers=24), settings, (128, 128), sdpa, storage)


def check_activations(config, settings, size, attend, storage):
    """Measure a run whose window wraps, and compare it with its forecast."""
    student = CausalStudent(tiny.network(config), config, attend=attend)
    sampler = LongSampler(
        student=student, geometry=geometry(*size, frames=46), settings=settings, storage=storage
    )
    expected = forecast(
        config,
        sampler.geometry,
        settings,
        torch.float32,
        storage=storage,
        attention_holds_scores=attend is matmul,
    )
    chunks = sampler.chunks(tiny.text(config))
    with Alive(student.network) as measured:
        for _ in chunks:
            pass
    held = measured.peak - expected.cache - expected.cache_on_host - expected.text
    assert 0.5 * expected.activations < held < 1.0 * expected.activations


def test_the_decoder_is_forecast_a_little_high():
    decoder, chunk = TinyAutoencoder(), torch.zeros(1, 16, 3, 32, 32)
    decoder.decode(chunk)
    with Alive(decoder) as measured:
        decoder.decode(chunk)
    expected = forecast(CONFIG, geometry(256, 256), RolloutSettings(), torch.float32)
    assert 0.5 * expected.decoder < measured.peak < expected.decoder


def test_wan_at_its_own_size_takes_what_is_published():
    expected = forecast(WAN_1_3B, geometry(480, 832), RolloutSettings(), torch.bfloat16)
    assert in_words(expected.cache) == "6.04 GB"
    assert in_words(expected.weights) == "2.84 GB"
    assert 9.5e9 < expected.total < 9.8e9


def test_small_cards_hold_less_and_what_they_do_not_hold_is_in_main_memory():
    def need(storage):
        return forecast(WAN_1_3B, geometry(480, 832), RolloutSettings(), torch.bfloat16, storage=storage)

    plain, rounded, host, both = (need(storage) for storage in ("plain", "fp8", "host", "fp8-host"))
    assert in_words(plain.device - rounded.device) == "2.77 GB"
    assert in_words(plain.device - host.device) == "5.64 GB"
    on_host = [in_words(each.host) for each in (plain, rounded, host, both)]
    assert on_host == ["0 B", "0 B", "6.04 GB", "3.07 GB"]
    words = "4.01 GB on the device and 6.04 GB of main memory (weights 2.84 GB, cache 403 MB, "
    assert str(host).startswith(words)
    assert str(plain).startswith("9.64 GB (weights")


def test_a_text_encoder_counts_where_it_is_the_largest():
    def need(**options):
        return forecast(WAN_1_3B, geometry(480, 832), RolloutSettings(), torch.bfloat16, **options)

    small, large = (need(text_encoder=Bytes(device=size)) for size in (10**9, 20 * 10**9))
    assert small.device == need().device
    assert (large.device, large.host) == (20 * 10**9, 0)
    beside = need(storage="fp8-host", text_encoder=Bytes(host=11 * 10**9))
    assert beside.host == 11 * 10**9
    assert need(decoder=10**9).device == need(decoder=0).device + 10**9


def test_memory_does_not_depend_on_the_length():
    short, long = (
        forecast(CONFIG, geometry(frames=frames), RolloutSettings(), torch.float32) for frames in (1, 10**6)
    )
    assert short == long


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (6.04e9, "6.04 GB"), (999_900, "1 MB"), (5e15, "5e+03 TB")],
)
def test_sizes_in_words(size, text):
    assert in_words(size) == text
