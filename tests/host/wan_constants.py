"""The scale of the host's latents, from a second source."""

import inspect

import torch


def wan_constants():
    """Return mean and standard deviation of Wan's latents, ``(16, 1, 1, 1)`` each."""
    from diffusers import AutoencoderKLWan

    defaults = inspect.signature(AutoencoderKLWan.__init__).parameters
    return (
        torch.tensor(defaults[name].default).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )


def normalised(latent):
    """Return a latent of the host normalised."""
    mean, std = wan_constants()
    return (latent - mean) / std
