"""Runs ComfyUI's own Wan in float32 on a CPU, from its checkout.

``python run_comfyui.py COMFYUI FOLDER``: reads the question in FOLDER, see ``exchange``, and answers it.

Nothing is replaced, with one exception that a question must ask for (``exact_time``): ComfyUI computes the
sinusoids of the timestep in float32, at angles of up to 1000, where Wan, Self-Forcing and this project do in
float64. Of the noise it draws only a copy is kept.
"""

import sys
from importlib import import_module
from pathlib import Path

import exchange
import torch


def open_comfyui(folder):
    """Let ComfyUI be imported, set to the CPU."""
    sys.path.insert(0, folder)
    sys.argv[1:] = ["--cpu"]
    import_module("comfy.options").enable_args_parsing()


def build(settings, weights):
    """Return the model a question names (``WanModel`` or ``CausalWanModel``) with its weights."""
    config = settings["config"]
    kind = getattr(import_module(settings["module"]), settings["kind"])
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
        device="cpu",
        dtype=torch.float32,
        operations=import_module("comfy.ops").disable_weight_init,
    )
    model.load_state_dict(weights)
    return model.eval()


def compute_time_in_float64(modules):
    """Let the sinusoids of the timestep be those of Wan."""

    def sinusoids(dim, position):
        frequencies = 10_000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
        angles = torch.outer(position.double(), frequencies)
        return torch.cat((angles.cos(), angles.sin()), dim=1)

    for module in modules:
        module.sinusoidal_embedding_1d = sinusoids


def whole(settings, weights, inputs):
    """Run one bidirectional forward of a whole clip."""
    velocity = build(settings, weights)(inputs["clip"], 1000 * inputs["sigma"][:, 0], inputs["text"])
    return {"velocity": velocity}


def passes(settings, weights, inputs):
    """Run every pass of every chunk as the sampler does: a pass is taken back by moving the cache's end."""
    model = build(settings, weights)
    noisy, clean = inputs["noisy"], inputs["clean"]  # (chunks, steps, B, C, T, H, W), (chunks, B, C, T, H, W)
    chunks, batch, length = noisy.shape[0], noisy.shape[2], settings["chunk"]
    tokens = settings["tokens"] * length
    memory = model.init_kv_caches(batch, chunks * tokens, "cpu", torch.float32)
    text_memory = model.init_crossattn_caches(batch, "cpu", torch.float32)
    velocities = []
    for chunk in range(chunks):
        for latent, sigma in zip((*noisy[chunk], clean[chunk]), (*settings["sigmas"], 0.0), strict=True):
            for layer in memory:
                layer["end"] = chunk * tokens
            time = torch.full((batch, length), 1000 * sigma)
            velocities.append(
                model.forward_block(latent, time, inputs["text"], chunk * length, memory, text_memory)
            )
    outputs = {"velocity": torch.stack(velocities)}
    for name, part in (("keys", "k"), ("values", "v")):
        outputs[name] = torch.stack([layer[part] for layer in memory])
    return outputs


def sampler(settings, folder, inputs):
    """Load the weights as a user's file and sample with SamplerARVideo; return latents and noise drawn."""
    samplers = import_module("comfy.samplers")
    patcher = import_module("comfy.sd").load_diffusion_model(str(Path(folder, "weights.safetensors")))
    model = patcher.model
    assert type(model.diffusion_model).__name__ == "CausalWanModel"
    guider = samplers.CFGGuider(patcher)
    guider.set_conds([[inputs["text"], {}]], [[inputs["text"], {}]])
    guider.set_cfg(1.0)
    if "start" in inputs:  # what ARVideoI2V leaves with the model, once its autoencoder has encoded an image
        start = {"ar_config": {"initial_latent": model.process_latent_out(inputs["start"])}}
        patcher.model_options.setdefault("transformer_options", {}).update(start)
    drawn, draw = [], torch.randn_like

    def recorded(like, *arguments, **options):
        drawn.append(draw(like, *arguments, **options))
        return drawn[-1]

    torch.randn_like = recorded
    noise = inputs["noise"]
    node = import_module("comfy_extras.nodes_ar_video").SamplerARVideo
    sampled = guider.sample(
        noise,
        torch.zeros_like(noise),
        node.execute(settings["chunk"]).result[0],
        torch.tensor((*settings["sigmas"], 0.0)),
        seed=settings["seed"],
        disable_pbar=True,
    )
    return {"latents": model.process_latent_in(sampled), "fresh": torch.stack(drawn)}


@torch.inference_mode()
def main():
    comfyui, folder = sys.argv[1:]
    settings, weights, inputs = exchange.receive(folder)
    open_comfyui(comfyui)
    import_module("comfy.cli_args")
    torch.set_num_threads(1)
    modules = [import_module("comfy.ldm.wan.model")]
    if Path(comfyui, "comfy/ldm/wan/ar_model.py").exists():
        modules.append(import_module("comfy.ldm.wan.ar_model"))
    if settings.get("exact_time"):
        compute_time_in_float64(modules)
    if settings["mode"] == "sampler":
        outputs = sampler(settings, folder, inputs)
    else:
        outputs = {"whole": whole, "passes": passes}[settings["mode"]](settings, weights, inputs)
    exchange.answer(folder, outputs)


if __name__ == "__main__":
    main()
