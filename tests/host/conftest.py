"""A ComfyUI named by two environment variables.

``SFPP_COMFYUI`` is its folder, ``SFPP_COMFYUI_PYTHON`` a Python with its requirements and those of this pack.
"""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session")
def new_host(tmp_path_factory):
    """Return a function that makes a ComfyUI, not yet started."""
    from comfyui import ComfyUI

    source, python = (os.environ.get(name) for name in ("SFPP_COMFYUI", "SFPP_COMFYUI_PYTHON"))
    if not source or not python:
        pytest.skip("SFPP_COMFYUI and SFPP_COMFYUI_PYTHON name no ComfyUI")

    def make():
        server = ComfyUI(Path(source), python, tmp_path_factory.mktemp("comfyui"), ROOT)
        (server.base / "custom_nodes/probe").symlink_to(HERE / "probe")
        return server

    return make


@pytest.fixture(scope="session")
def host(new_host):
    """Return a running ComfyUI, shared by all tests."""
    server = new_host().start()
    yield server
    server.stop()
