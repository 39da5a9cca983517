"""The module that talks to ComfyUI, over a host in which every name exists and nothing is done."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
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


@pytest.mark.parametrize(
    ("words", "in_settings", "method", "wanted"),
    [
        ([], None, "none", True),
        (["--preview-method", "none"], None, "none", False),
        (["--preview-method=none"], None, "none", False),
        ([], "none", "none", False),
        (["--preview-method", "auto"], "none", "none", False),
        (["--preview-method", "auto"], None, "auto", True),
        (["--preview-method", "none"], "latent2rgb", "latent2rgb", True),
    ],
)
def test_previews_are_made_unless_somebody_said_none(host, monkeypatch, words, in_settings, method, wanted):
    monkeypatch.setattr(sys, "argv", ["main.py", "--cpu", *words])
    said = {} if in_settings is None else {"preview_method": in_settings}
    running = {7: (0, "id", {}, said, ["6"])}
    host.PromptServer.instance.prompt_queue.currently_running = running
    host.args.preview_method = host.LatentPreviewMethod.NoPreviews if method == "none" else method
    assert host.previews_wanted() == wanted


def test_lack_of_memory_is_told_as_the_host_tells_it(host):
    class LackError(RuntimeError): ...

    management = host.comfy.model_management
    management.OOM_EXCEPTION = LackError
    del management.is_oom  # 0.8
    assert host.lacks_memory(LackError())
    assert not host.lacks_memory(RuntimeError())
    management.is_oom = lambda error: "memory" in str(error)
    assert host.lacks_memory(RuntimeError("out of memory"))


def test_a_video_is_shown_before_its_node_ends_to_whoever_queued_it(host):
    host.get_executing_context.return_value = SimpleNamespace(node_id="6.1", prompt_id="p")
    server = host.PromptServer.instance
    host.get_progress_state().dynprompt.get_display_node_id.return_value = "6"
    shown = SimpleNamespace(as_dict=lambda: {"images": []})
    server.client_id = None  # nobody: a prompt of the API
    host.show_now(shown)
    assert not server.send_sync.called
    server.client_id = "browser"
    host.show_now(shown)
    told = {"node": "6.1", "display_node": "6", "prompt_id": "p", "output": {"images": []}}
    server.send_sync.assert_called_once_with("executed", told, "browser")
