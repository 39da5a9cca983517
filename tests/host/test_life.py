"""Memory over many runs in one host: what is let go of, what is asked for, and what is really taken."""

import time

import files
import pytest
from prompts import core_loader, decoding, sampling, saving

pytestmark = pytest.mark.host

KINDS = ("WanModel", "CausalStudent", "RollingKVCache", "LongSampler")


@pytest.fixture(scope="module")
def models(host):
    """Write two models and return their names."""
    names = []
    for seed in (0, 1):
        names.append(f"life{seed}.safetensors")
        files.write(host.base / "models/diffusion_models" / names[-1], files.wan(seed=seed))
    return names


def probe(host):
    return host.get("/sfpp_probe?" + "&".join(f"kind={kind}" for kind in KINDS))


def settled(host, ready):
    """Return what the probe says once ``ready`` of it; frees are done by a thread of the host."""
    for _ in range(40):
        if ready(seen := probe(host)):
            break
        time.sleep(0.25)
    return seen


def test_a_finished_run_keeps_no_cache_and_unloading_lets_go_of_the_model(host, models):
    host.forget()
    host.run(sampling(core_loader(models[0]), seconds=2) | saving())
    seen = probe(host)
    assert (seen["alive"]["RollingKVCache"], seen["alive"]["CausalStudent"]) == (0, 0)
    assert seen["alive"]["WanModel"] == seen["loaded"] - 1 == 1  # and the demo's words
    host.post("/free", {"unload_models": True})
    assert settled(host, lambda seen: not seen["loaded"])["loaded"] == 0
    host.post("/free", {"unload_models": True, "free_memory": True})
    assert settled(host, lambda seen: not seen["alive"]["WanModel"])["alive"]["WanModel"] == 0


def test_a_cancelled_run_keeps_its_chunks_but_no_cache(host, models):
    host.forget()
    number = host.queue(sampling(core_loader(models[0]), seconds=60, size=128) | decoding())
    host.wait_for_file("video/v*.mp4", larger_than=2000)
    host.interrupt()
    assert host.result(number)[1] == "execution_interrupted"
    assert probe(host)["alive"]["RollingKVCache"] == 0
    host.forget()
    assert settled(host, lambda seen: not seen["alive"]["WanModel"])["alive"]["WanModel"] == 0


def test_another_model_does_not_keep_the_first_alive(new_host, models):
    host = new_host()
    for name in models:
        files.write(host.base / "models/diffusion_models" / name, files.wan(seed=len(name)))
    # A host that caches outputs as long as there is memory keeps models too; this one keeps the latest run.
    host.start("--cache-classic" if "cache-classic" in host.options else "")
    try:
        for name in (*models, *models):
            host.run(sampling(core_loader(name), seconds=1) | saving())
            assert probe(host)["alive"]["WanModel"] == 1
    finally:
        host.stop()


def test_ten_runs_in_a_row_take_no_more_memory_than_three(host, models):
    taken = []
    for seed in range(10):
        host.run(sampling(core_loader(models[0]), seconds=6, seed=seed) | decoding())
        taken.append(probe(host)["resident"])
    assert taken[-1] - taken[2] < 20e6, [f"{size / 1e6:.0f} MB" for size in taken]
    assert probe(host)["alive"]["RollingKVCache"] == 0


@pytest.mark.parametrize("storage", ["plain", "fp8"])
@pytest.mark.parametrize("dtype", ["default", "fp8_e4m3fn"])
def test_the_host_is_asked_for_what_a_run_takes(host, models, dtype, storage):
    cache = {"window": 9, "sink": 0, "sink_positions": "absolute", "storage": storage}
    prompt = sampling(core_loader(models[0], dtype), seconds=4, size=192, cache=["cache", 0])
    prompt |= {
        "cache": ("SFPPCacheSettings", cache),
        "probe": ("SFPPTestProbeMemory", {"samples": ["sampler", 0]}),
    }
    host.run(prompt | saving("probe"))
    seen = probe(host)
    assert 0.5 * seen["asked"] < seen["peak"] < 1.05 * seen["asked"], seen
