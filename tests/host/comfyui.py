"""A real ComfyUI in a process of its own, driven through its HTTP API."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

START_SECONDS = 300
RUN_SECONDS = 600


class ComfyUI:
    """One server over a folder of its own, with the pack as its only custom node."""

    def __init__(self, source: Path, python: str, base: Path, pack: Path):
        for name in (
            "custom_nodes",
            "models/vae",
            "models/loras",
            "models/diffusion_models",
            "input",
            "user",
        ):
            (base / name).mkdir(parents=True)
        (base / "custom_nodes" / "ComfyUI-SelfForcingPP").symlink_to(pack)
        self.source, self.python, self.base = source, python, base
        self.output = base / "output"
        self._log = base / "log.txt"
        self._process = None

    def start(self, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        command = [self.python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
        command += ["--disable-api-nodes", "--base-directory", str(self.base)]
        command += ["--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}"]
        command += [option for option in options if option]
        quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.source, env=os.environ | quiet, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._wait(self._answers, START_SECONDS, "the server does not answer")
        except AssertionError:
            self.kill()
            raise
        return self

    def stop(self):
        self._process.terminate()
        self._process.wait(30)

    def kill(self):
        self._process.kill()
        self._process.wait(30)

    @property
    def options(self):
        """What the host says about its command line."""
        return (self.source / "comfy/cli_args.py").read_text()

    @property
    def log(self):
        return self._log.read_text(errors="replace")

    def open(self, path):
        return urllib.request.urlopen(self._url + path, timeout=30)

    def get(self, path):
        with self.open(path) as answer:
            return json.loads(answer.read() or "null")

    def post(self, path, table=None):
        request = urllib.request.Request(self._url + path, json.dumps(table or {}).encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} answered {error.code}: {error.read().decode()}") from error

    @property
    def url(self):
        """Where the server is."""
        return self._url

    def queue(self, prompt, **more):
        """Queue a prompt, ``{id: (class, inputs)}``; return its number."""
        table = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in prompt.items()}
        return self.post("/prompt", {"prompt": table, **more})["prompt_id"]

    def result(self, number):
        """Wait for a prompt; return ``(outputs by node, last message, its details)``."""
        self._wait(lambda: self.get(f"/history/{number}"), RUN_SECONDS, "the prompt does not end")
        entry = self.get(f"/history/{number}")[number]
        kind, details = entry["status"]["messages"][-1]
        return entry["outputs"], kind, details

    def run(self, prompt):
        """Run a prompt to its end; return the outputs by node."""
        outputs, kind, details = self.result(self.queue(prompt))
        assert kind == "execution_success", details
        return outputs

    def error(self, prompt):
        """Run a prompt that must fail; return the type of the node and the message."""
        _, kind, details = self.result(self.queue(prompt))
        assert kind == "execution_error", kind
        return details["node_type"], details["exception_message"]

    def interrupt(self):
        self.post("/interrupt")

    def forget(self):
        """Drop every cached output and model."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(1.5)

    def files(self, outputs, node):
        """Return the paths of what one node saved."""
        entries = [entry for found in outputs[node].values() for entry in found if isinstance(entry, dict)]
        return [self.output / entry["subfolder"] / entry["filename"] for entry in entries]

    def wait_for_file(self, pattern, *, larger_than=50_000):
        """Wait until a file of the output folder has begun to grow; return it."""

        def found():
            return next(
                (path for path in self.output.glob(pattern) if path.stat().st_size > larger_than), None
            )

        return self._wait(found, RUN_SECONDS, f"no file {pattern} appears")

    def _wait(self, ready, seconds, complaint):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := ready():
                return found
            assert self._process.poll() is None, f"the server died:\n{self.log[-3000:]}"
            time.sleep(0.1)
        raise AssertionError(f"{complaint}:\n{self.log[-3000:]}")

    def _answers(self):
        try:
            return self.get("/system_stats")
        except OSError:
            return None
