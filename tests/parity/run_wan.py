"""Runs a model of Wan or of the Self-Forcing family in float32 on a CPU, from a checkout of its repository.

``python run_wan.py REPOSITORY FOLDER``: reads the question in FOLDER, see ``exchange``, and answers it.

Nothing of what is tested is replaced: projections, norms, rotations, masks, the writing, rolling and reading
of the cache, the loop over chunks and its schedule are the repository's. What is replaced, and why:

- ``flash_attention`` and ``attention``, which want a GPU and compute in bfloat16: PyTorch's own attention
  over the same queries, keys and values, in the dtype they come in.
- ``flex_attention`` and ``create_block_mask``, which are compiled for a GPU: attention under the dense mask
  that the repository's own mask function gives.
- Package ``__init__`` files, the text encoder, the autoencoder, the tokenizer and the helpers that ask for a
  GPU at import: not run, or empty modules; none of them is called.
- The constant 1560, tokens per latent frame at 832x480, wherever an attribute or an argument holds it.
- ``from_pretrained``: the weights are those of the question.
- In ``inference``: the caches are given (their shape is written for 12 heads), the text embeddings and the
  noise come from the question, and the latents are not decoded.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import exchange
import torch

UNUSED = (
    "demo_utils.memory",
    "utils.memory",
    "wan.modules.t5",
    "wan.modules.tokenizers",
    "wan.modules.vae",
)


class Unused(ModuleType):
    """A module that is imported by name and never called."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)


def open_repository(repository):
    """Let its modules be imported one by one, without what its packages import on the way."""
    sys.path.insert(0, str(repository))
    for name in ("wan", "wan.modules", "pipeline", "utils", "demo_utils"):
        package = ModuleType(name)
        package.__path__ = [str(Path(repository, *name.split(".")))]
        sys.modules[name] = package
    for name in UNUSED:
        sys.modules[name] = Unused(name)


def attend(q, k, v, q_lens=None, k_lens=None, **options):
    """Attend, ``(B, L, N, D)``; lengths must be those of the tensors, so that there is nothing to hide."""
    assert k_lens is None or all(length == k.shape[1] for length in k_lens)
    assert options.get("window_size", (-1, -1)) == (-1, -1) and not options.get("causal")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def dense_mask(sees, **options):
    """Return what a mask function says of every pair of a query (row) and a key (column)."""
    queries, keys = (torch.arange(options[name]) for name in ("Q_LEN", "KV_LEN"))
    return sees(None, None, queries[:, None], keys[None])


def masked_attention(query, key, value, block_mask):
    """Attend under a dense mask, ``(B, N, L, D)``."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=block_mask)


def replace_kernels(module):
    """Replace the attention kernels a module has imported."""
    module.rope_apply.__globals__["flash_attention"] = attend  # the cross-attention's, wherever it is defined
    for name, ours in (
        ("flash_attention", attend),
        ("attention", attend),
        ("flex_attention", masked_attention),
        ("create_block_mask", dense_mask),
    ):
        if hasattr(module, name):
            setattr(module, name, ours)


def build(module, settings, weights, **options):
    """Return the repository's model with the weights of the question."""
    config = settings["config"]
    kind = module.CausalWanModel if hasattr(module, "CausalWanModel") else module.WanModel
    model = kind(
        model_type="t2v",
        text_len=config["text_length"],
        in_dim=config["channels"],
        dim=config["dim"],
        ffn_dim=config["ffn_dim"],
        freq_dim=config["freq_dim"],
        text_dim=config["text_dim"],
        out_dim=config["channels"],
        num_heads=config["heads"],
        num_layers=config["layers"],
        cross_attn_norm=True,
        eps=config["eps"],
        **options,
    )
    model.load_state_dict(weights)
    model.eval().requires_grad_(False)
    for layer in model.blocks:
        resize(layer.self_attn, settings)
    return model


def resize(attention, settings):
    """Set what holds the constant 1560, in the tokens of this video."""
    if "window" not in settings:
        return
    tokens = settings["tokens"]
    if hasattr(attention, "frame_length"):  # Rolling Forcing
        attention.frame_length = tokens
        attention.block_length = settings["chunk"] * tokens
    attention.max_attention_size = settings["window"] * tokens


def caches(settings, batch):
    """Return empty caches, as the repositories make them but for the sizes."""
    config = settings["config"]
    kept = settings.get("cache", settings["window"]) * settings["tokens"]
    size = (batch, kept, config["heads"], config["dim"] // config["heads"])
    layers = range(config["layers"])
    memory = [
        {
            "k": torch.zeros(size),
            "v": torch.zeros(size),
            "global_end_index": torch.tensor([0]),
            "local_end_index": torch.tensor([0]),
        }
        for _ in layers
    ]
    return memory, [{"k": None, "v": None, "is_init": False} for _ in layers]


def sizes(settings):
    """Return the arguments that give a causal model its window and sink."""
    return {"local_attn_size": settings["window"], "sink_size": settings["sink"]}


def passes(module, settings, weights, inputs):
    """Run every pass of every chunk: the noisy ones and the clean one; return velocities and the memory."""
    model = build(module, settings, weights, **sizes(settings))
    noisy, clean = inputs["noisy"], inputs["clean"]  # (chunks, steps, B, C, T, H, W), (chunks, B, C, T, H, W)
    chunks, batch, length = noisy.shape[0], noisy.shape[2], settings["chunk"]
    memory, text_memory = caches(settings, batch)
    velocities, keys, values = [], [], []
    for chunk in range(chunks):
        start = chunk * length * settings["tokens"]
        for latent, sigma in zip((*noisy[chunk], clean[chunk]), (*settings["sigmas"], 0.0), strict=True):
            velocity = model(
                latent,
                t=torch.full((batch, length), 1000 * sigma),
                context=list(inputs["text"]),
                seq_len=32760,
                kv_cache=memory,
                crossattn_cache=text_memory,
                current_start=start,
                cache_start=start,
                **({"updating_cache": sigma == 0} if settings.get("marks_clean") else {}),
            )
            velocities.append(velocity)
        end = int(memory[0]["local_end_index"])
        part = slice(end - length * settings["tokens"], end)
        keys.append(torch.stack([layer["k"][:, part] for layer in memory]))
        values.append(torch.stack([layer["v"][:, part] for layer in memory]))
    outputs = {"velocity": torch.stack(velocities), "keys": torch.stack(keys), "values": torch.stack(values)}
    outputs["memory_keys"] = torch.stack([layer["k"] for layer in memory])
    outputs["memory_values"] = torch.stack([layer["v"] for layer in memory])
    return outputs


def whole(module, settings, weights, inputs):
    """Run one forward of a whole clip: bidirectional, or under the repository's causal mask."""
    causal = hasattr(module, "CausalWanModel")
    model = build(module, settings, weights, **(sizes(settings) if causal else {}))
    clip, sigma = inputs["clip"], inputs["sigma"]  # (B, C, T, H, W), (B, T)
    if causal:
        model.num_frame_per_block = settings["chunk"]
    tokens = clip.shape[2] * settings["tokens"]
    time = 1000 * (sigma if causal else sigma[:, 0])
    velocity = model(list(clip) if not causal else clip, t=time, context=list(inputs["text"]), seq_len=tokens)
    return {"velocity": torch.stack(list(velocity))}


def inference(module, settings, weights, inputs):
    """Run the repository's inference loop; return its timesteps and its clean latents."""
    wrapper = import_module("utils.wan_wrapper")

    def from_pretrained(path, **options):
        return build(module, settings, weights, **options)

    wrapper.CausalWanModel = SimpleNamespace(from_pretrained=from_pretrained)
    arguments = SimpleNamespace(
        denoising_step_list=[1000, 750, 500, 250],
        warp_denoising_step=True,
        num_frame_per_block=settings["chunk"],
        independent_first_frame=settings.get("image", False),
        context_noise=0,
        model_kwargs={"timestep_shift": settings["shift"], **sizes(settings)},
    )
    pipeline = import_module("pipeline.causal_inference").CausalInferencePipeline(
        arguments,
        "cpu",
        text_encoder=lambda text_prompts: {"prompt_embeds": inputs["text"]},
        vae=SimpleNamespace(decode_to_pixel=lambda latents, use_cache: latents),
    )
    pipeline.num_transformer_blocks = settings["config"]["layers"]
    pipeline.frame_seq_length = settings["tokens"]
    noise = inputs["noise"]  # (chunks, steps, B, C, T, H, W)
    steps, batch = noise.shape[1:3]
    pipeline.kv_cache1, pipeline.crossattn_cache = caches(settings, batch)
    # The repository's order is (B, T, C, H, W); between steps it draws for B * T at once.
    fresh = iter(noise[:, 1:].flatten(0, 1).transpose(2, 3).flatten(1, 2))
    torch.randn_like = lambda like: next(fresh)
    first = torch.cat(list(noise[:, 0]), dim=2).transpose(1, 2)
    start = inputs["start"].transpose(1, 2) if "start" in inputs else None
    with torch.no_grad():
        _, latents = pipeline.inference(first, [""] * batch, initial_latent=start, return_latents=True)
    assert next(fresh, None) is None and steps == len(pipeline.denoising_step_list)
    return {"latents": latents.transpose(1, 2), "timesteps": pipeline.denoising_step_list}


def main():
    repository, folder = sys.argv[1:]
    torch.set_num_threads(1)
    settings, weights, inputs = exchange.receive(folder)
    open_repository(repository)
    module = import_module(settings["module"])
    replace_kernels(module)
    run = {"passes": passes, "whole": whole, "inference": inference}[settings["mode"]]
    with torch.no_grad():
        exchange.answer(folder, run(module, settings, weights, inputs))


if __name__ == "__main__":
    main()
