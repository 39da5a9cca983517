"""A node pack of the tests: it says what is alive in the running host, and measures what a latent takes.

It also lets core load an autoencoder of Wan 2.2 that is small enough for a test: core knows one width alone.
"""

import gc
import itertools
import sys
import weakref
from pathlib import Path

import comfy.ldm.wan.vae2_2
import comfy.model_management
import torch
from aiohttp import web
from server import PromptServer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEASURED = {"asked": 0, "peak": 0}

WIDTH = 8
"""Of the autoencoder of Wan 2.2, which has 160 and 256."""


class WanVAE(comfy.ldm.wan.vae2_2.WanVAE):
    """Core's autoencoder of Wan 2.2, narrow."""

    def __init__(self, **sizes):
        super().__init__(**sizes | {"dim": WIDTH, "dec_dim": WIDTH})


comfy.ldm.wan.vae2_2.WanVAE = WanVAE


def resident():
    """Return the bytes of main memory this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


@PromptServer.instance.routes.get("/sfpp_probe")
async def probe(request):
    """Return how many objects of a class are alive, by name, and the memory of the process."""
    gc.collect()
    names = [type(found).__name__ for found in gc.get_objects()]
    counted = {name: names.count(name) for name in request.query.getall("kind", [])}
    loaded = len(comfy.model_management.current_loaded_models)
    return web.json_response({"alive": counted, "loaded": loaded, "resident": resident(), **MEASURED})


TRAPS = {
    "model": ("sfpp_core.student", "BoundStudent", "__call__", 4),
    "decoder": ("sfpp_core.tiny_autoencoder", "TinyAutoencoder", "decode", 1),
}
"""Where memory may run out: module of the pack, class, method, and its calls per chunk."""

SPRUNG = {}
"""Methods in whose place a trap is."""


@PromptServer.instance.routes.post("/sfpp_probe/memory")
async def without_memory(request):
    """Let memory run out after the work of some calls, counted in chunks from now; of no others."""
    for place, method in SPRUNG.items():
        setattr(*place, method)
    SPRUNG.clear()
    for trap, chunks in (await request.json()).items():
        module, name, method, per_chunk = TRAPS[trap]
        (found,) = (loaded for path, loaded in list(sys.modules.items()) if path.endswith(module))
        place = (getattr(found, name), method)
        SPRUNG[place] = getattr(*place)
        setattr(*place, sprung(SPRUNG[place], [chunk * per_chunk for chunk in chunks]))
    return web.json_response({})


def sprung(method, calls):
    """Return a method that runs out of memory at the end of some of its calls."""
    count = itertools.count()

    def trapped(*args, **options):
        result = method(*args, **options)
        if next(count) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return result

    return trapped


class Bytes(TorchDispatchMode):
    """Counts the bytes of storages made under it and still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            tensor.untyped_storage()._cdata
            for tensor in tree_leaves((args, kwargs))
            if isinstance(tensor, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), known)
        return out

    def _count(self, storage, known):
        key = storage._cdata
        if key in self.seen or key in known:  # what came in and goes out is no memory of its own
            return
        self.seen.add(key)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self.seen.discard(key)
        self.alive -= size


class ProbeMemory:
    """Reads a latent; notes what the host was asked to keep free for it and what was really made."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 - the host's name
        return {"required": {"samples": ("LATENT",)}}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "read"
    CATEGORY = "tests"

    def read(self, samples):
        management, asked = comfy.model_management, []
        load = management.load_models_gpu

        def noting(models, *args, memory_required=0, **options):
            asked.append(memory_required)
            return load(models, *args, memory_required=memory_required, **options)

        management.load_models_gpu = noting
        try:
            with Bytes() as measured:
                latent = samples["samples"]
        finally:
            management.load_models_gpu = load
        MEASURED.update(asked=max(asked), peak=measured.peak)
        return ({"samples": latent},)


NODE_CLASS_MAPPINGS = {"SFPPTestProbeMemory": ProbeMemory}
