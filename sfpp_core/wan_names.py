"""Names of the autoencoders of Wan: from Wan's own, which ComfyUI keeps, to those of diffusers."""

import re

_TABLE = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    # Wan 2.2: layers nested in a stage.
    (r"\.(down|up)samples\.(\d+)\.\1samples\.(\d+)\.(?=residual|shortcut)", r".\1_blocks.\2.resnets.\3."),
    (r"\.(down|up)samples\.(\d+)\.\1samples\.\d+\.", r".\1_blocks.\2.\1sampler."),
    # Wan 2.1: layers in one row; on the way up, every fourth ends a stage.
    (r"\.downsamples\.(\d+)\.", r".down_blocks.\1."),
    (r"\.upsamples\.(\d+)\.", lambda found: _stage(int(found[1]))),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)

_STAGE = 4
"""Layers of one stage of the decoder of Wan 2.1: three residual ones, one that enlarges."""


def diffusers_name(name: str) -> str:
    """Return the name that diffusers gives to a parameter called ``name`` in Wan's own files.

    A name that is diffusers' already comes back unchanged.
    """
    for pattern, replacement in _TABLE:
        name = re.sub(pattern, replacement, name)
    return name


def _stage(layer: int) -> str:
    """Return the place of a layer of the decoder of Wan 2.1 among the stages."""
    stage, place = divmod(layer, _STAGE)
    return f".up_blocks.{stage}." + ("upsamplers.0." if place == _STAGE - 1 else f"resnets.{place}.")
