"""The drift report in a real ComfyUI: of a video just made, of one trimmed or in memory, and of images."""

import json

import pytest
from prompts import decoding, sampling

pytestmark = pytest.mark.host

STUDENT = ("SFPPLoadStudent", {"student": "demo (built in)"})


def reporting(prefix, **inputs):
    """Return the node that measures a video, and core's node that shows its text."""
    settings = {"filename_prefix": prefix, "chunk_frames": 12, "images_fps": 16.0}
    return {
        "report": ("SFPPDriftReport", settings | inputs),
        "said": ("PreviewAny", {"source": ["report", 0]}),
    }


def written(host, prefix):
    """Return the report of that name, and the files beside it."""
    (path,) = host.output.rglob(f"{prefix}*.json")
    return json.loads(path.read_text()), {other.suffix for other in host.output.rglob(f"{prefix}*")}


@pytest.mark.parametrize(
    ("name", "inputs"), [("video", {"video": ["video", 0]}), ("images", {"images": ["video", 1]})]
)
def test_a_video_just_made_is_measured(host, name, inputs):
    prompt = sampling(STUDENT, seconds=6.0) | decoding(vae=["demo", 1], image_seconds=10.0)
    outputs = host.run(prompt | reporting(f"drift_{name}", **inputs))
    report, files = written(host, f"drift_{name}")
    assert (report["frames"], report["fps"], len(report["seconds"])) == (96, 16, 6)
    assert files >= {".csv", ".json"}
    assert "6.0 s, 96 frames at 16 per second" in str(outputs["said"])
    if ".png" in files:
        assert [path.suffix for path in host.files(outputs, "report")] == [".png"]


def test_a_video_in_memory_is_measured(host):
    prompt = sampling(STUDENT, seconds=2.0) | decoding(vae=["demo", 1], image_seconds=10.0)
    prompt["made"] = ("CreateVideo", {"images": ["video", 1], "fps": 8.0})
    host.run(prompt | reporting("drift_memory", video=["made", 0]))
    report, _ = written(host, "drift_memory")
    assert (report["frames"], report["fps"]) == (32, 8)


def test_a_trimmed_video_is_measured_as_it_is_cut(host):
    if "Video Slice" not in host.get("/object_info"):
        pytest.skip("this ComfyUI cannot trim a video")
    prompt = sampling(STUDENT, seconds=4.0) | decoding(vae=["demo", 1], enlarge=2)
    prompt["cut"] = (
        "Video Slice",
        {"video": ["video", 0], "start_time": 1.0, "duration": 2.0, "strict_duration": False},
    )
    host.run(prompt | reporting("drift_trimmed", video=["cut", 0]))
    report, _ = written(host, "drift_trimmed")
    assert abs(report["frames"] - 32) <= 1


def test_nothing_connected_is_said(host):
    node, message = host.error({"report": reporting("drift_none")["report"]})
    assert (node, "nothing is connected to video and images" in message) == ("SFPPDriftReport", True)
