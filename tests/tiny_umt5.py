"""A umT5 of random weights and a real tokenizer, in every layout people have them in."""

import functools
import io
import json

import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

from sfpp_core.umt5_files import _spelled

SIZES = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_heads": 3, "num_layers": 3, "vocab_size": 150}
"""Of the encoder; its table has a few rows more than there are tokens, as umT5's."""

VOCABULARY = 144
"""Tokens, as trained below."""


TEXT = """A cat surfs a wave at sunset while gulls fly over the bay and the camera follows slowly from behind.
An old sailor with a grey beard laughs, lights his pipe and looks at the sea; it is cold, the wind is strong.
Two children run through a field of yellow flowers, throw a red ball, fall down, get up and run on & on.
Ein Zug faehrt durch die verschneiten Berge; im letzten Wagen liest eine Frau ein Buch und trinkt Tee.
The lamp flickers, the door opens: "Who is there?" he asks. Nobody answers. 12345 67890 km/h, 50% off!
Un perro negro corre por la playa y salta sobre las olas, mientras el sol se pone detras de las montanas.
"""

PROMPTS = (
    "A cat surfs a wave at sunset",
    "",
    "two   children\n run  through & fields",
    "Ein Hund läuft, “schnell”, durch den Schnee",
    "a (red:1.3) ball " * 3,
)


@functools.cache
def sentencepiece_model():
    """Return a small unigram model with umT5's special tokens, as bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 20),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        byte_fallback=False,
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


def model(seed=0, **sizes):
    """Return a umT5 of transformers with random weights in which every parameter matters."""
    config = UMT5Config(dropout_rate=0.0, **SIZES | sizes)
    encoder = UMT5EncoderModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in encoder.named_parameters():
        # Larger matrices would make attention so sharp that roundings decide it.
        size = parameter.shape[-1] ** -0.5 if "layer" in name and "bias" not in name else 0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * size + (parameter.ndim == 1))
    return encoder


def state(encoder, dtype=torch.float32):
    """Return the weights in transformers' names, each once."""
    weights = {name: value.to(dtype) for name, value in encoder.state_dict().items()}
    return {name: value for name, value in weights.items() if name != "encoder.embed_tokens.weight"}


def wan(weights):
    """Return the weights in Wan's own names."""
    return {_spelled(name, "Wan"): value for name, value in weights.items()}


def fp8(weights, *, scale, mark):
    """Return the weights with every matrix of a layer in fp8 and its scale under ``scale``."""
    packed = {}
    for name, value in weights.items():
        if "block" not in name or value.ndim != 2 or "bias" in name:
            packed[name] = value
            continue
        factor = value.abs().max() / 448
        packed[name] = (value / factor).to(torch.float8_e4m3fn)
        packed[name.removesuffix("weight") + scale] = factor.float()
        if mark == "comfy_quant":
            form = json.dumps({"format": "float8_e4m3fn"}).encode()
            packed[name.removesuffix("weight") + mark] = torch.tensor(list(form), dtype=torch.uint8)
    return packed | ({mark: torch.empty(0, dtype=torch.float8_e4m3fn)} if mark == "scaled_fp8" else {})


def unpacked(packed):
    """Return the weights that an fp8 file stands for."""
    ends = ("scale_weight", "weight_scale")
    scales = {name.rpartition(".")[0]: value for name, value in packed.items() if name.endswith(ends)}
    weights = {name: value.float() for name, value in packed.items() if name.endswith(".weight")}
    return {name: value * scales.get(name.removesuffix(".weight"), 1) for name, value in weights.items()}


def write_single(path, weights, spiece):
    """Write ComfyUI's single file, the tokenizer inside."""
    save_file(weights | {"spiece_model": torch.tensor(list(spiece), dtype=torch.uint8)}, path)
    return path


def write_tokenizer(folder, spiece):
    """Write a tokenizer folder as Wan's with the sentencepiece model alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(spiece)
    return folder


def write_tokenizer_json(folder, spiece):
    """Write a tokenizer folder with the file that transformers prefers, made from the sentencepiece model."""
    from transformers.convert_slow_tokenizer import T5Converter

    class Slow:
        vocab_file, _extra_ids, legacy = str(write_tokenizer(folder, spiece) / "spiece.model"), 0, True

        def convert_tokens_to_ids(self, token):
            return ["<pad>", "</s>", "<unk>"].index(token)

    T5Converter(Slow()).converted().save(str(folder / "tokenizer.json"))
    (folder / "spiece.model").unlink()
    return folder


def embeddings(encoder, spiece, prompts, length):
    """Return what the plain umT5 of transformers makes of clean prompts, filled and masked as Wan does."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    texts = [[*processor.encode(prompt)[: length - 1], 1] for prompt in prompts]
    mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts])
    tokens = torch.tensor([text + [0] * (length - len(text)) for text in texts])
    return encoder(tokens, attention_mask=mask).last_hidden_state * mask[..., None]


def changed(weights, **changes):
    """Return the weights with some replaced, or taken away where ``None``, by the end of their names."""
    result = dict(weights)
    for end, value in changes.items():
        (name,) = (name for name in weights if name.endswith(end.replace("__", ".") + ".weight"))
        result[name] = value
    return {name: value for name, value in result.items() if value is not None}
