"""Students of Wan's shape in training: random weights in the real formats, from prompts to an export."""

import hashlib
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import layouts
import pytest
import torch
import wan_commands

from sfpp_core import cli
from sfpp_core.checkpoint import load_student
from sfpp_core.config import WAN_1_3B, RolloutSettings
from sfpp_core.errors import SettingsError
from sfpp_core.geometry import VideoGeometry
from sfpp_core.inspection import inspect
from sfpp_core.lora import read_adapter
from sfpp_core.text_cache import encode_prompts as encode
from sfpp_core.text_encoder import TextEncoder
from training import encode_prompts, export, make_ode_pairs, parallel, train_dmd, train_grpo, train_ode
from training.config import ConfigError, load
from training.cost import forward_operations, held
from training.models import VideoSettings, load_role
from training.texts import INDEX, Texts
from training.trained import Trained

CONFIGS = Path(__file__).parent.parent / "training" / "configs"
PROMPTS = ["A cat surfs a wave", "two children run", "", "a red ball", "a red  ball"]


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """Return a folder of small random models, and prompts encoded in it."""
    folder = wan_commands.write(tmp_path_factory.mktemp("wan"))
    layouts.write(
        folder / "teacher/diffusion_pytorch_model.safetensors", layouts.tensors(wan_commands.CONFIG, seed=1)
    )
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    start(encode_prompts, encode_prompts.EncodeSettings, "wan_prompts", *encoding(folder))
    return folder


def start(stage, kind, name, *overrides):
    """Run one stage with its shipped settings but for ``overrides``."""
    stage.main(load(kind, [str(CONFIGS / f"{name}.toml"), *overrides], stage=name))


def encoding(folder, out="texts"):
    return [
        f"text_encoder={folder / 'umt5.safetensors'}",
        f"prompts={folder / 'prompts.txt'}",
        f"out={folder / out}",
        "device=cpu",
        "at_once=2",
    ]


def small(folder, out, *overrides):
    """Return what makes a shipped configuration small."""
    return [
        f"teacher_run={folder / 'teacher'}",
        f"student_run={folder / 'student.pt'}",
        f"autoencoder={folder / 'Wan2.1_VAE.pth'}",
        f"video.prompts={folder / 'texts'}",
        "video.height=32",
        "video.width=48",
        "video.sample_prompts=1",
        "loop.sample_seconds=[1]",
        f"loop.out={out}",
        "loop.tensorboard=false",
        "loop.device=cpu",
        "loop.effective_batch=2",
        "rollout.window=6",
        "segment=6",
        *overrides,
    ]


def dmd(name, *overrides):
    start(train_dmd, train_dmd.DmdSettings, name, *overrides)


def test_extended_matching_trains_wan_from_files_and_prompts_to_a_student_that_loads(wan, tmp_path):
    sizes = ["horizon=12", "loop.iterations=6", "every=2", "loop.effective_batch=1", "student.lr=1e-3"]
    dmd("wan_1_3b_8gpu", *small(wan, tmp_path, *sizes))
    (line, *_) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert line["iteration"] == 6
    assert line["seconds"] > 0
    assert line["peak_gigabytes"] > 0
    assert (tmp_path / "sample_000006.png").exists()
    out = tmp_path / "made.safetensors"
    start(export, export.ExportSettings, "wan_export", f"run={tmp_path}", f"out={out}", "dtype=float32")
    network, config, settings = load_student(out)
    assert (config, settings) == (wan_commands.CONFIG, RolloutSettings(window=6))  # as it was trained
    before, _, _ = load_student(wan / "student.pt")
    moved = (network.blocks[1].ffn[0].weight - before.blocks[1].ffn[0].weight).abs().max()
    assert 1e-5 < moved < 0.1
    # The exported file is where another stage may start, as is the run.
    for student in (out, tmp_path / "last.pt"):
        dmd("wan_1_3b_8gpu", *small(wan, tmp_path / "next", *sizes, f"student_run={student}", *DRY))


DRY = ["loop.dry_run=true", "loop.effective_batch=8"]


def test_adapters_on_shared_weights_are_streamed_resumed_and_exported_for_core(wan, tmp_path):
    sizes = ["horizon=12", "every=1", "student.lora.rank=4", "student.lora.alpha=8", "critic.lora.rank=4"]
    more = [
        *sizes,
        "student.lr=1e-2",
        "loop.sample_every=1000",
        "first_latent=mask",
        "video.sample_prompts=0",
    ]
    states = []
    for name, stops in (("whole", [3]), ("parts", [2, 3])):
        for stop in stops:
            changed = [*more, f"loop.iterations={stop}", "autoencoder=''"]
            dmd("wan_1_3b_lora_24gb", *small(wan, tmp_path / name, *changed))
        states.append(torch.load(tmp_path / name / "last.pt", weights_only=True))
    for part in ("model", "critic"):
        saved = states[0][part]["module"]
        assert saved
        assert all(".lora_" in name and value.dtype == torch.float32 for name, value in saved.items())
        for name, value in saved.items():
            torch.testing.assert_close(value, states[1][part]["module"][name], rtol=0, atol=0)
    out = tmp_path / "lora.safetensors"
    start(export, export.ExportSettings, "wan_export", f"run={tmp_path / 'whole'}", f"out={out}")
    adapter = read_adapter(out, wan_commands.CONFIG)
    network, _, _ = load_student(wan / "student.pt", adapters=[adapter])
    plain, _, _ = load_student(wan / "student.pt")
    name = "network.blocks.1.ffn.0"
    kept = states[0]["model"]["averaged"]
    down, up = (kept[f"module.{name}.lora_{half}.default.weight"] for half in "AB")
    change = network.blocks[1].ffn[0].weight - plain.blocks[1].ffn[0].weight
    assert change.abs().max() > 1e-4
    torch.testing.assert_close(change, 2 * up @ down, rtol=0.02, atol=1e-4)


def test_a_critic_of_adapters_shares_its_weights_with_the_teacher_and_leaves_them_alone(wan, tmp_path):
    changed = ["loop.iterations=1", "horizon=6", "critic.lr=1.0"]
    settings = load(
        train_dmd.DmdSettings,
        [str(CONFIGS / "wan_1_3b_lora_24gb.toml"), *small(wan, tmp_path, *changed)],
        stage="x",
    )
    texts = Texts(Path(settings.video.prompts))
    _, teacher, critic = train_dmd.load_models(settings, texts, torch.device("cpu"))
    noisy, sigma = torch.randn(1, 16, 3, 4, 6), torch.full((1, 1), 0.5)
    before, same = (model.bind(["a red ball"]).whole(noisy, sigma) for model in (teacher, critic))
    torch.testing.assert_close(same, before, rtol=0, atol=0)
    trained = Trained(critic, settings.critic, updates=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = trained.module.bind(["a red ball"]).whole(noisy, sigma).square().mean()
    trained.update(loss, 0)
    with torch.autocast("cpu", torch.bfloat16):
        moved = trained.module.bind(["a red ball"]).whole(noisy, sigma)
    assert (moved - before).abs().max() > 0.1
    assert {id(p) for p in teacher.parameters()} < {id(p) for p in trained.module.parameters()}
    torch.testing.assert_close(teacher.bind(["a red ball"]).whole(noisy, sigma), before, rtol=0, atol=0)


def test_trajectories_of_wan_lead_to_a_causal_student(wan, tmp_path, monkeypatch):
    video = [f"video.prompts={wan / 'texts'}", "video.height=32", "video.width=48"]
    pairs = [f"teacher={wan / 'teacher'}", f"out={tmp_path / 'pairs'}", "pairs=2", "steps=4", "threads=1"]
    make = (make_ode_pairs, make_ode_pairs.PairSettings, "wan_ode_pairs", *pairs, *video)
    with monkeypatch.context() as shared:  # the second of two ranks makes every other one
        shared.setattr(parallel, "ranks", lambda: 2)
        shared.setattr(parallel, "rank", lambda: 1)
        start(*make)
    assert [path.name for path in (tmp_path / "pairs").iterdir()] == ["pairs_00001.safetensors"]
    before = (tmp_path / "pairs" / "pairs_00001.safetensors").stat()
    (wan / "teacher" / "Wan2.1_VAE.pth").write_bytes(b"downloaded later")
    start(*make)
    (wan / "teacher" / "Wan2.1_VAE.pth").unlink()
    assert (tmp_path / "pairs" / "pairs_00001.safetensors").stat() == before
    made = make_ode_pairs.Pairs(tmp_path / "pairs", (16, 21, 4, 6))
    assert made.captions == ["A cat surfs a wave", "two children run"]
    states, captions, _ = made.batch(0, 0, 2)
    assert states.shape == (5, 2, 16, 21, 4, 6)
    file = tmp_path / f"pairs/pairs_{made.captions.index(captions[0]):05d}.safetensors"
    stored = make_ode_pairs.load_states(file, 0).float()
    assert torch.equal(states[:, 0], stored)  # not moved: no torus
    with pytest.raises(ConfigError, match=r"are of shape \(16, 21, 4, 6\) and this stage wants"):
        make_ode_pairs.Pairs(tmp_path / "pairs", (16, 21, 8, 8))
    ode = [f"pairs={tmp_path / 'pairs'}", f"teacher_run={wan / 'teacher'}", "autoencoder=preview"]
    loop = [f"loop.out={tmp_path / 'ode'}", "loop.iterations=1", "loop.effective_batch=1", "loop.device=cpu"]
    start(
        train_ode,
        train_ode.OdeSettings,
        "wan_ode",
        *ode,
        *loop,
        *video,
        "loop.tensorboard=false",
        "loop.sample_seconds=[1]",
    )
    assert (tmp_path / "ode" / "sample_000001.png").exists()
    exported = [f"run={tmp_path / 'ode'}", f"out={tmp_path / 'ode.safetensors'}", "stage=ode"]
    start(export, export.ExportSettings, "wan_export", *exported)
    assert inspect(tmp_path / "ode.safetensors").stage == "ode"


def test_prompts_are_encoded_once_kept_at_their_length_and_missed_with_a_word(wan, tmp_path, monkeypatch):
    texts = Texts(wan / "texts")
    assert texts.prompts == ("A cat surfs a wave", "two children run", "a red ball")
    plain = encode(wan / "umt5.safetensors", [*texts.prompts, texts.negative], dtype=torch.bfloat16)
    torch.testing.assert_close(texts([*texts.prompts, ""]), plain)
    (folder := tmp_path / "texts").mkdir()
    for file in (wan / "texts").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    assert max(sizes) < 512 * 24 * 2  # of full length
    with pytest.raises(ConfigError, match="no usable embeddings of 'a dog'; add the prompt to your file"):
        Texts(folder)(["a dog"])
    first = Texts(folder)._cache.path("two children run")
    first.unlink()
    with pytest.raises(ConfigError, match="lacks the embeddings of 1 of 4 prompts, first of 'two children"):
        Texts(folder)
    encoded = []
    plain_rows = TextEncoder.rows
    monkeypatch.setattr(
        TextEncoder,
        "rows",
        lambda self, texts: encoded.extend(t.prompt for t in texts) or plain_rows(self, texts),
    )
    again = [word.replace(str(wan / "texts"), str(folder)) for word in encoding(wan)]
    start(encode_prompts, encode_prompts.EncodeSettings, "wan_prompts", *again)
    assert encoded == ["two children run"]
    (folder / INDEX).unlink()
    with pytest.raises(ConfigError, match=r"holds no embeddings of prompts; run training\.encode_prompts"):
        Texts(folder)


SMALL = {
    "encode_prompts": ["device=cpu", "dtype=float32"],
    "make_ode_pairs": ["pairs=1", "steps=4"],
    "train_ode": ["loop.iterations=1", "loop.effective_batch=1", "loop.sample_seconds=[1]"],
    "train_dmd": [
        *["segment=6", "horizon=9", "rollout.window=6", "loop.iterations=1", "loop.effective_batch=1"],
        "loop.sample_seconds=[1]",
    ],
    "train_grpo": [
        *["latent_frames=6", "prompts=1", "group=2", "rollout.window=6", "loop.iterations=1"],
        "loop.sample_seconds=[1]",
    ],
    "export": [],
}
"""What makes each stage small; of the paths nothing is changed."""


def test_reinforcement_moves_adapters_of_a_wan(wan, tmp_path):
    models = [f"student_run={wan / 'student.pt'}", f"autoencoder={wan / 'taew2_1.safetensors'}"]
    video = [f"video.prompts={wan / 'texts'}", "video.height=32", "video.width=48", "video.sample_prompts=1"]
    loop = [f"loop.out={tmp_path}", "loop.iterations=1", "loop.tensorboard=false", "loop.device=cpu"]
    sizes = ["latent_frames=6", "prompts=1", "group=2", "loop.sample_seconds=[1]", "rollout.window=6"]
    start(train_grpo, train_grpo.GrpoSettings, "wan_grpo", *models, *video, *loop, *sizes, "chunk_share=1.0")
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert line["telling"] == 1
    assert line["norm"] > 0
    assert (tmp_path / "sample_000001.png").exists()
    start(train_grpo, train_grpo.GrpoSettings, "wan_grpo", f"loop.out={tmp_path / 'x'}", "--dry-run")
    out = tmp_path / "lora.safetensors"
    start(export, export.ExportSettings, "wan_export", f"run={tmp_path}", f"out={out}")
    assert read_adapter(out, wan_commands.CONFIG).changed


def test_every_command_of_the_readme_runs_at_small_size(wan, tmp_path, monkeypatch):
    models = tmp_path / "models"
    shutil.copytree(wan / "teacher", models / "Wan2.1-T2V-1.3B")
    for source, place in {
        "Wan2.1_VAE.pth": "Wan2.1-T2V-1.3B/Wan2.1_VAE.pth",
        "umt5.safetensors": "Wan2.1-T2V-1.3B/models_t5_umt5-xxl-enc-bf16.pth",
        "student.pt": "self-forcing/ode_init.pt",
        "taew2_1.safetensors": "taew2_1.safetensors",
        "prompts.txt": "../prompts.txt",
    }.items():
        (models / place).parent.mkdir(exist_ok=True)
        shutil.copyfile(wan / source, models / place)
    shutil.copyfile(wan / "student.pt", models / "self-forcing/self_forcing_dmd.pt")
    (tmp_path / "training").symlink_to(CONFIGS.parent)
    monkeypatch.chdir(tmp_path)
    parts = re.findall(r"```sh\n(.*?)```", (CONFIGS.parent / "README.md").read_text(), re.DOTALL)
    lines = [line for part in parts for line in part.splitlines() if "wan_" in line or "plus" in line]
    assert len(lines) == 18
    for line in lines:
        words = shlex.split(line)
        _, name, *rest = words[words.index("-m") :]
        if name == "sfpp_core":
            small = ["--seconds", "1", "--width", "48", "--height", "32"] if rest[0] == "generate" else []
            assert cli.main([*rest, *small]) == 0
            continue
        stage = importlib.import_module(name)
        kind = next(getattr(stage, kind) for kind in KINDS if hasattr(stage, kind))
        changed = list(SMALL[stage.__name__.removeprefix("training.")])
        if "video" in kind.__annotations__:
            changed += ["video.height=32", "video.width=48"]
        if "loop" in kind.__annotations__:
            changed += ["loop.tensorboard=false", "loop.device=cpu"]
        stage.main(load(kind, [*rest, *changed], stage=name))
    assert inspect(tmp_path / "plus.safetensors").stage == "self-forcing++"
    for name in ("plus_lora", "steady_lora"):
        assert inspect(tmp_path / f"{name}.safetensors").kind == "adapter"
    for name in ("plus", "plus_lora"):
        assert (tmp_path / f"{name}.mp4").stat().st_size > 1000


KINDS = ("EncodeSettings", "PairSettings", "OdeSettings", "DmdSettings", "GrpoSettings", "ExportSettings")


def test_the_negative_prompt_is_that_of_wan(tmp_path):
    settings = load(encode_prompts.EncodeSettings, [str(CONFIGS / "wan_prompts.toml")], stage="x")
    digest = hashlib.sha256(settings.negative.encode()).hexdigest()
    assert digest == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"
    with pytest.raises(ConfigError, match="which is not a file; write one prompt per line into it"):
        encode_prompts.read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("name", "ranks", "words"),
    [
        (
            "wan_1_3b_8gpu",
            8,
            ["(1, 16, 21, 60, 104)", "in all 51.6 GB", "effective batch 8: 8 ranks x 1 pieces"],
        ),
        ("wan_1_3b_1gpu", 1, ["18 + 21: 11.2 GB", "latent frame: 4.56 GB", "in all 81.8 GB", "22.2 hours"]),
        ("wan_1_3b_lora_24gb", 1, ["87,490,560 of them trained", "9 + 21: 3.98 GB", "in all 16.1 GB"]),
    ],
)
def test_a_dry_run_of_full_size_needs_no_weights(name, ranks, words, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with caplog.at_level("INFO"):
        dmd(name, f"loop.out={tmp_path / 'run'}", "--dry-run")
    told = "\n".join(caplog.messages)
    assert "is not there: it is taken for a Wan 2.1 of 1.3B" in told
    for word in words:
        assert word in told, told
    assert not (tmp_path / "run").exists()


def test_operations_and_memory_are_those_of_wan():
    chunk, clip = (forward_operations(WAN_1_3B, tokens, 32_760) for tokens in (4_680, 32_760))
    assert chunk == pytest.approx(40.5e12, rel=0.01)
    assert clip == pytest.approx(283e12, rel=0.01)
    geometry = VideoGeometry(height=480, width=832, frames=81)
    sizes = held(WAN_1_3B, geometry, batch=1, ring=21, past=18, checkpointing=True)
    assert [round(size / 1e9, 2) for size in sizes.values()] == [6.04, 11.21, 3.02, 3.37]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["autoencoder=''"], "needs an autoencoder, and autoencoder is empty; name Wan2.1_VAE"),
        (["video.prompts=''", "student_loras=['x']"], "it takes no student_loras and needs its autoencoder"),
    ],
)
def test_impossible_settings_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load(train_dmd.DmdSettings, [str(CONFIGS / "wan_1_3b_8gpu.toml"), *override], stage="x")


def test_roles_of_another_kind_are_refused(wan, tmp_path):
    with pytest.raises(SettingsError, match="cannot encode the frames to start from"):
        tiny = [f"autoencoder={wan / 'taew2_1.safetensors'}", "horizon=6"]
        dmd("wan_1_3b_8gpu", *small(wan, tmp_path, *tiny))
    sizes = ["horizon=6", "loop.iterations=1", "video.sample_prompts=0", "autoencoder=''"]
    adapters = ["every=1", "loop.effective_batch=1", "student.lora.rank=2", "critic.lora.rank=2"]
    dmd("wan_1_3b_lora_24gb", *small(wan, tmp_path, *sizes, *adapters))
    with pytest.raises(ConfigError, match="holds adapters of a model, not a model; export them"):
        run = [f"student_run={tmp_path / 'last.pt'}", f"loop.out={tmp_path / 'next'}"]
        dmd("wan_1_3b_lora_24gb", *small(wan, tmp_path, *sizes, *run))


def test_a_lora_is_merged_into_the_start(wan):
    texts = Texts(wan / "texts")
    video = VideoSettings(prompts=str(wan / "texts"))
    start_of = {"video": video, "texts": texts, "device": torch.device("cpu")}
    plain = load_role(str(wan / "student.pt"), **start_of)
    merged = load_role(str(wan / "student.pt"), **start_of, loras=[f"{wan / 'lora.safetensors'}:0.5"])
    apart = [(a - b).abs().max() > 0 for a, b in zip(plain.parameters(), merged.parameters(), strict=True)]
    assert sum(apart) == 1
    assert all(parameter.requires_grad for parameter in merged.parameters())
