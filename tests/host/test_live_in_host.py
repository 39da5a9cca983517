"""A run while it goes on, in a real ComfyUI: previews that move, words, controls, and no memory left."""

import base64
import json
import os
import socket
import struct
import subprocess
import sys
import time
from io import BytesIO
from urllib.parse import urlparse

import pytest
import torch
from PIL import Image
from test_in_comfyui import ROOT, decoding, generating, latent_of, pictures, pixels, saving
from test_run_in_host import chunks, made, wait_for_chunks

from sfpp_core.video import video_info

pytestmark = pytest.mark.host

ANIMATIONS = 4
"""The host's number for a preview with what it is of."""

TEXT = 3
"""The host's number for a line of text on a node."""


class Browser:
    """The messages the host sends to a browser, over the least of a WebSocket."""

    def __init__(self, host):
        place = urlparse(host.url)
        self.id = "tests"
        self._stream = socket.create_connection((place.hostname, place.port), timeout=60)
        key = base64.b64encode(os.urandom(16)).decode()
        self._stream.sendall(
            f"GET /ws?clientId={self.id} HTTP/1.1\r\nHost: {place.netloc}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._read = self._stream.makefile("rb")
        while self._read.readline() != b"\r\n":
            pass
        self._send({"type": "feature_flags", "data": {"supports_preview_metadata": True}})

    def _send(self, table):
        content, mask = json.dumps(table).encode(), os.urandom(4)
        masked = bytes(byte ^ mask[place % 4] for place, byte in enumerate(content))
        self._stream.sendall(struct.pack(">BB", 0x81, 0x80 | len(content)) + mask + masked)

    def _message(self):
        first, length = self._read.read(2)
        if length == 126:
            (length,) = struct.unpack(">H", self._read.read(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", self._read.read(8))
        return first & 15, self._read.read(length)

    def until_the_end(self, number):
        """Return previews by node, texts by node, and messages, up to the end of a prompt."""
        previews, texts, told = [], [], []
        while True:
            kind, content = self._message()
            if kind == 1:
                message = json.loads(content)
                told.append(message)
                ends = {"execution_success", "execution_error", "execution_interrupted"}
                if message["type"] in ends and message["data"]["prompt_id"] == number:
                    return previews, texts, told
            elif kind == 2 and content[:4] == struct.pack(">I", ANIMATIONS):
                (length,) = struct.unpack(">I", content[4:8])
                about = json.loads(content[8 : 8 + length])
                previews.append((about["node_id"], Image.open(BytesIO(content[8 + length :]))))
            elif kind == 2 and content[:4] == struct.pack(">I", TEXT):
                (length,) = struct.unpack(">I", content[4:8])
                texts.append((content[8 : 8 + length].decode(), content[8 + length :].decode()))

    def run(self, host, prompt, **extra):
        """Run a prompt as a browser does; return what it was sent."""
        return self.until_the_end(host.queue(prompt, client_id=self.id, extra_data=extra))

    def close(self):
        self._read.close()
        self._stream.close()


@pytest.fixture
def browser(host):
    opened = Browser(host)
    yield opened
    opened.close()


def test_the_latest_chunk_moves_on_the_sampler_while_it_is_made(host, browser):
    previews, texts, _ = browser.run(host, generating(seconds=20, seed=31) | decoding("moving"))
    assert previews
    for node, picture in previews:
        assert node == "sampler"
        assert (picture.format, picture.size) == ("WEBP", (320, 320))
        assert 1 < picture.n_frames <= 12  # of frames that are equal one is left
    moves = [list(frames_of(picture)) for _, picture in previews]
    assert all(frames[0] != frames[-1] for frames in moves)
    assert (texts[-1][0], texts[-1][1][:13]) == ("video", "320 frames in")


def frames_of(picture):
    for number in range(picture.n_frames):
        picture.seek(number)
        yield picture.convert("RGB").tobytes()


def test_the_setting_of_the_host_turns_previews_off(host, new_host, browser):
    previews, *_ = browser.run(host, generating(seconds=8, seed=32) | decoding("none"), preview_method="none")
    assert not previews
    server = new_host().start("--preview-method", "none")
    other = Browser(server)
    try:
        previews, *_ = other.run(server, generating(seconds=8, seed=32) | decoding("none"))
        assert not previews
        previews, *_ = other.run(
            server, generating(seconds=8, seed=33) | decoding("some"), preview_method="auto"
        )
        assert previews
    finally:
        other.close()
        server.stop()


def test_a_stopped_video_is_shown_in_place_of_the_one_before(host, browser):
    number = host.queue(generating(seconds=60, seed=34) | decoding("stopped"), client_id=browser.id)
    growing = host.wait_for_file("video/stopped*.mp4")
    host.interrupt()
    *_, told = browser.until_the_end(number)
    (shown,) = [
        message["data"]
        for message in told
        if message["type"] == "executed" and message["data"]["node"] == "video"
    ]
    assert (shown["display_node"], shown["prompt_id"]) == ("video", number)
    (entry,) = shown["output"]["images"]
    assert host.output / entry["subfolder"] / entry["filename"] == growing
    assert 0 < video_info(growing).frames < 960
    assert told[-1]["type"] == "execution_interrupted"


def test_the_past_that_is_replayed_is_told(host, browser):
    prompt = generating(seconds=40, seed=35, run="runs/told") | decoding("told")
    number = host.queue(prompt, client_id=browser.id)
    wait_for_chunks(host, "runs/told", 40)
    host.interrupt()
    browser.until_the_end(number)
    kept = len(chunks(host, "runs/told"))
    _, texts, _ = browser.run(host, prompt)
    told = [text for node, text in texts if node == "video" and text.startswith("replaying chunk")]
    assert told
    assert all(text.endswith(f" of {kept} of run runs/told") for text in told)


def test_a_run_of_the_demo_is_decoded_on_the_command_line(host, tmp_path):
    outputs = host.run(generating(seconds=2, seed=36, run="runs/demo") | decoding("here"))
    out = tmp_path / "there.mp4"
    command = [sys.executable, "-m", "sfpp_core", "decode", str(host.output / "runs/demo")]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = host.files(outputs, "video")
    assert video_info(out).frames == video_info(path).frames == 32


def controls(**changes):
    chosen = {"anchor": 0.0, "context_sigma": 0.0} | changes
    return {"drift": ("SFPPDriftControls", chosen)}


def test_drift_controls_reach_the_rollout_and_count_for_a_run(host):
    def run(name="", drift=None):
        linked = {} if drift is None else {"drift": ["drift", 0]}
        prompt = generating(seconds=8, seed=37, run=name, **linked) | saving()
        return prompt if drift is None else prompt | drift

    plain = latent_of(host, host.run(run()))
    assert torch.equal(latent_of(host, host.run(run(drift=controls()))), plain)
    held = latent_of(host, host.run(run(drift=controls(anchor=0.5))))
    assert torch.equal(held[:, :, :21], plain[:, :, :21])
    assert not torch.equal(held[:, :, 21:24], plain[:, :, 21:24])
    blurred = latent_of(host, host.run(run(drift=controls(context_sigma=0.1))))
    assert torch.equal(blurred[:, :, :3], plain[:, :, :3])
    assert not torch.equal(blurred[:, :, 3:6], plain[:, :, 3:6])
    assert torch.equal(latent_of(host, host.run(run("runs/held", controls(anchor=0.5)))), held)
    kind, message = host.error(run("runs/held"))
    assert kind == "SFPPLongSampler"
    assert "anchor was 0.5 and is none" in message


@pytest.mark.parametrize(("replay", "keep_cache", "how"), [("window", 0, "window"), ("all", 5, "cache")])
def test_a_run_goes_on_as_run_settings_say(host, replay, keep_cache, how):
    name, seed = f"runs/{how}", 38
    prompt = generating(seconds=30, seed=seed, run=name, run_settings=["more", 0]) | decoding(how)
    prompt["more"] = ("SFPPRunSettings", {"replay": replay, "keep_cache": keep_cache})
    number = host.queue(prompt)
    wait_for_chunks(host, name, 25)
    host.interrupt()
    assert host.result(number)[1] == "execution_interrupted"
    assert (host.output / name / "cache.safetensors").exists() == bool(keep_cache)
    host.run(prompt)
    manifest = json.loads((host.output / name / "manifest.json").read_text())
    (resume,) = manifest["resumes"]
    assert (resume["how"], resume["exact"]) == (how, how == "cache")
    if how == "cache":
        assert resume["replayed"] <= 1
        host.run(generating(seconds=30, seed=seed, run="runs/whole_38") | decoding("whole"))
        assert torch.equal(made(host, name), made(host, "runs/whole_38"))


def without_memory(host, **when):
    """Let the host run out of memory: ``model`` or ``decoder``, at the calls that are named."""
    host.post("/sfpp_probe/memory", {name: list(calls) for name, calls in when.items()})


@pytest.mark.parametrize("where", ["model", "decoder"])
def test_where_memory_runs_out_once_the_video_is_the_same(host, browser, where):
    prompt = (
        generating(seconds=6, seed=39) | pictures("calm", ("video", 1)) | decoding("calm", image_seconds=9)
    )
    expected = pixels(host.files(host.run(prompt), "calm"))
    host.forget()
    without_memory(host, **{where: [3]})
    prompt = (
        generating(seconds=6, seed=39) | pictures("tight", ("video", 1)) | decoding("tight", image_seconds=9)
    )
    number = host.queue(prompt, client_id=browser.id)
    _, texts, _ = browser.until_the_end(number)
    outputs, kind, details = host.result(number)
    without_memory(host)
    assert kind == "execution_success", details
    assert (pixels(host.files(outputs, "tight")) == expected).all()
    assert any("model and decoder take turns now" in text for _, text in texts)
    assert "The GPU ran out of memory at chunk 4 of 9" in host.log


@pytest.mark.parametrize(
    ("where", "advice"),
    [("model", "storage fp8, host or fp8-host"), ("decoder", "tile 256 on Decode to Video")],
)
def test_where_memory_runs_out_again_the_user_is_told_what_to_change(host, where, advice):
    without_memory(host, **{where: range(3, 99)})
    prompt = generating(seconds=6, seed=40) | decoding(f"full_{where}")
    kind, message = host.error(prompt)
    without_memory(host)
    assert kind == "SFPPDecodeToVideo"
    assert "although model and decoder took turns on it" in message
    assert advice in message
    assert "This error means you ran out of memory on your GPU" in message  # the host has seen what it is
    assert "Got an OOM, unloading all loaded models." in host.log
    time.sleep(0.5)
    (path,) = host.files(host.run(prompt), "video")
    assert video_info(path).frames == 96
