"""The module that talks to ComfyUI, over a host in which every name exists and nothing is done."""

import importlib.util
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

ROOT = Path(__file__).parent.parent
HOST = (
    "comfy", "comfy.latent_formats", "comfy.model_management", "comfy.model_patcher", "comfy.sd",
    "comfy.supported_models_base", "comfy.utils", "comfy.cli_args", "comfy.ldm.modules", "comfy_api.latest",
    "comfy_execution.graph_utils", "comfy_execution.progress", "comfy_execution.utils", "folder_paths",
    "server",
)  # fmt: skip


@pytest.fixture
def host(monkeypatch):
    for name in HOST:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), MagicMock())
    spec = importlib.util.spec_from_file_location("host_alone", ROOT / "nodes/_host.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CancelError(Exception):
    """The interrupt of the host."""


@pytest.mark.parametrize("error", [OSError("disk"), AttributeError("save_to"), AssertionError(), KeyError(1)])
def test_a_video_that_cannot_be_sealed_stays_and_the_cancel_of_the_user_arrives(
    host, tmp_path, caplog, monkeypatch, error
):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"frames")

    def save_to(target, **_):
        Path(target).write_bytes(b"half")
        raise error

    monkeypatch.setattr(host, "video", lambda _: MagicMock(save_to=save_to))
    with pytest.raises(CancelError):
        try:
            raise CancelError
        finally:
            host.seal(path, {})
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"frames"]
    assert f"{path} plays, but its workflow could not be stored in it" in caplog.text


def test_nothing_is_sealed_where_nothing_was_written(host, tmp_path):
    host.seal(tmp_path / "a.mp4", {})
    assert not list(tmp_path.iterdir())
