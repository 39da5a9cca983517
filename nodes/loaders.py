"""Loaders of students and of the demo, as ComfyUI nodes."""

from typing import get_args

from ..sfpp_core import demo
from ..sfpp_core.checkpoint import load_words
from ..sfpp_core.decoder import load_decoder
from ..sfpp_core.naming import Choice
from ..sfpp_core.presets import FAMILIES
from . import _host
from ._host import io
from .demo_decoder import DemoVAE
from .demo_text import demo_clip
from .plain_errors import plain_errors
from .student_file import AUTO, load_student_file, without_shards

DEMO = "demo (built in)"
"""Entry of the student list that needs no download."""


class SFPPLoadStudent(io.ComfyNode):
    """Load a causal student as a MODEL of the host."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return _host.schema(
            node_id="SFPPLoadStudent",
            display_name="Load Student (Self-Forcing++)",
            category="loaders/self-forcing++",
            description="Loads a text-to-video model of Wan distilled with Self-Forcing, with the settings "
            "stored in its file. The MODEL is core's own: LoRA loaders and memory management work as usual.",
            search_aliases=["self forcing", "causal wan", "load diffusion model", "unet loader"],
            inputs=[
                io.Combo.Input(
                    "student",
                    options=[DEMO, *without_shards(_host.model_files())],
                    default=DEMO,
                    tooltip="A file of models/diffusion_models, or the tiny demo that comes with the pack. "
                    "Layouts of Wan, diffusers and Self-Forcing, also .pt and shards.",
                ),
                io.Combo.Input(
                    "weights",
                    options=list(get_args(Choice)),
                    default=AUTO,
                    optional=True,
                    extra_dict={"advanced": True},
                    tooltip="Of a training state with several sets of weights: ema, the averaged ones; live, "
                    "those in training. auto takes the averaged ones where there are any.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[AUTO, *FAMILIES],
                    default=AUTO,
                    optional=True,
                    tooltip="How the student is rolled out: steps, shift, chunk, window and sink. auto: as "
                    "its file says, else as Self-Forcing does it. Cache Settings override window and sink.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="For LoRA loaders and the Long Sampler.")],
        )

    @classmethod
    @plain_errors
    def execute(cls, student: str, weights: Choice = AUTO, preset: str = AUTO) -> io.NodeOutput:
        """Load the weights as core does, and attach what the file says about itself."""
        path = demo.file(demo.STUDENT) if student == DEMO else _host.model_path(student)
        return io.NodeOutput(load_student_file(path, choice=weights, preset=preset))


class SFPPLoadDemo(io.ComfyNode):
    """Load the text encoder and the decoder of the built-in demo."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return _host.schema(
            node_id="SFPPLoadDemo",
            display_name="Load Demo Text and Decoder (Self-Forcing++)",
            category="loaders/self-forcing++",
            description="The demo's own CLIP and VAE, for the built-in student only: a shape that moves over "
            "64x64 pixels. It shows the mechanism on any machine; for real video load Wan's encoder and VAE.",
            inputs=[],
            outputs=[
                io.Clip.Output(
                    display_name="CLIP",
                    tooltip="For CLIP Text Encode. Knows some fifty words: a red circle moves right slowly.",
                ),
                io.Vae.Output(display_name="VAE", tooltip="For Decode to Video and VAE Decode."),
            ],
        )

    @classmethod
    @plain_errors
    def execute(cls) -> io.NodeOutput:
        """Load both from the pack's own folder."""
        words, groups = load_words(demo.file(demo.WORDS))
        decoder = load_decoder(demo.file(demo.AUTOENCODER))
        return io.NodeOutput(demo_clip(words, groups), DemoVAE(decoder))
