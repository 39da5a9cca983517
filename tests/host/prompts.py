"""Prompts of the tests: from a loader to a saved latent or video."""

import itertools

COUNT = itertools.count()
PROMPT = "a red circle moves right quickly"


def core_loader(name, dtype="default"):
    """Return core's Load Diffusion Model."""
    return "UNETLoader", {"unet_name": name, "weight_dtype": dtype}


def sampling(loader, *changes, seconds=1.0, seed=1, size=64, **inputs):
    """Return a prompt that samples the model of ``loader`` after ``changes`` of it."""
    prompt = {
        "loader": loader,
        "demo": ("SFPPLoadDemo", {}),
        "text": ("CLIPTextEncode", {"clip": ["demo", 0], "text": PROMPT}),
    }
    model = ["loader", 0]
    for number, (kind, settings) in enumerate(changes):
        prompt[f"change{number}"] = (kind, {"model": model, **settings})
        model = [f"change{number}", 0]
    settings = {"width": size, "height": size, "seconds": seconds, "video_seed": seed} | inputs
    prompt["sampler"] = ("SFPPLongSampler", {"model": model, "conditioning": ["text", 0], **settings})
    return prompt


def saving(source="sampler"):
    """Return the node of the host that saves a latent, never the same twice: the host would not run it."""
    return {"save": ("SaveLatent", {"samples": [source, 0], "filename_prefix": f"latent{next(COUNT)}"})}


def decoding(**settings):
    """Return the node that writes a video, rough pictures unless ``settings`` say otherwise."""
    defaults = {"filename_prefix": f"video/v{next(COUNT)}", "enlarge": 1, "image_seconds": 0.0}
    inputs = {"samples": ["sampler", 0]} | defaults | ({} if "vae" in settings else {"decoder": "preview"})
    return {"video": ("SFPPDecodeToVideo", inputs | settings)}
