"""The drift report as files, on the command line, while a video is recorded, and as a node."""

import csv
import io
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import clips
import numpy as np
import pack
import pytest
import torch
from PIL import Image

from sfpp_core import cli, drift_plot
from sfpp_core.drift import DriftMeter, Second
from sfpp_core.drift_report import NAMES, DriftWatch, ReportFiles, report_of, watched
from sfpp_core.errors import OutputError, PictureError
from sfpp_core.footage import open_footage
from sfpp_core.recording import Recording, record
from sfpp_core.video import open_writer

ROOT = Path(__file__).parent.parent


def reported(clip):
    meter = DriftMeter()
    return report_of(meter, [*meter.add(clip), *meter.finish()])


@pytest.fixture(scope="module")
def dark():
    return clips.darkening(clips.demo(100))


@pytest.fixture(scope="module")
def video(tmp_path_factory, dark):
    path = tmp_path_factory.mktemp("video") / "dark.mp4"
    with open_writer(path, width=112, height=80) as writer:
        writer.write(dark)
    return path


# --- the files --------------------------------------------------------------------------------------------


def test_the_table_has_a_row_per_second_and_a_column_per_measure(dark):
    report = reported(dark)
    rows = list(csv.DictReader(io.StringIO(report.as_csv())))
    assert [row["second"] for row in rows] == [str(second) for second in range(7)]
    assert set(rows[0]) == set(Second.__slots__)
    assert [float(row["luma"]) for row in rows] == pytest.approx([s.luma for s in report.seconds], abs=1e-5)
    single = reported(dark[:1])
    assert next(csv.DictReader(io.StringIO(single.as_csv())))["motion"] == ""


def test_the_json_says_its_version_and_everything_else(dark):
    report = reported(dark)
    whole = json.loads(report.as_json())
    assert (whole["format"], whole["version"], whole["frames"], whole["fps"]) == ("sfpp-drift", 1, 100, 16)
    assert (whole["chunk_frames"], whole["first_chunk_frames"]) == (12, 9)
    assert whole["findings"][0].startswith("luma falls by")
    assert whole["faults"][0]["name"] == "darkening"
    assert whole["faults"][0]["score"] > 1
    assert whole["thresholds"]["luma_step"] == 0.06
    assert len(whole["seconds"]) == 7
    assert {fault["name"] for fault in whole["faults"]} | set(whole["not_judged"]) >= {"freeze", "repetition"}
    assert json.loads(reported(dark[:1]).as_json())["seconds"][0]["motion"] is None


def test_the_text_says_what_counts_and_if_nothing_does_says_that(dark):
    lines = reported(dark).lines()
    assert lines[0].startswith("6.2 s, 100 frames at 16 per second; motion by ")
    assert lines[1].startswith("darkening (")
    (_, quiet) = reported(clips.demo(100)).lines()
    assert quiet.startswith("no fault: every score is below 1; nearest is ")
    assert "too short to judge drift: that takes 5 s." in reported(clips.demo(30)).lines()


def test_a_folder_gets_all_three_files_and_a_name_just_one(tmp_path, dark):
    report = reported(dark)
    pytest.importorskip("matplotlib")
    assert [path.name for path in ReportFiles.at(tmp_path / "new").write(report)] == list(NAMES.values())
    assert all((tmp_path / "new" / name).stat().st_size for name in NAMES.values())
    assert len(list((tmp_path / "new").iterdir())) == 3  # nothing half written is left
    for name in NAMES.values():
        files = ReportFiles.at(tmp_path / name)
        assert list(filter(None, (files.csv, files.json, files.plot))) == [tmp_path / name]
    with pytest.raises(OutputError, match=r"name a \.csv, \.json or \.png file, or a folder"):
        ReportFiles.at(tmp_path / "report.doc")


def test_the_plot_draws_every_column_and_shades_what_was_found(dark):
    pytest.importorskip("matplotlib")
    report = reported(dark)
    figure = drift_plot.figure_of(report)
    drawn = {line.get_label() for axes in figure.axes for line in axes.get_lines()}
    assert drawn >= {"luma", "contrast", "crushed", "blown", "blue", "red", "motion", "seam", "repetition"}
    luma = figure.axes[0]
    assert list(luma.get_lines()[0].get_ydata()) == [second.luma for second in report.seconds]
    assert luma.get_title(loc="right") == f"darkening {report.faults[0].score:.1f}"
    picture = drift_plot.plot_picture(report)
    assert picture.shape == (1, 1100, 1200, 3)
    assert 0 <= picture.min() < 0.5 < picture.max() <= 1


def test_without_matplotlib_the_plot_is_refused_with_a_remedy_and_a_folder_goes_without(
    tmp_path, dark, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OutputError, match="run `pip install matplotlib`"):
        ReportFiles(plot=tmp_path / "a.png").check()
    with pytest.raises(OutputError, match="run `pip install matplotlib`"):
        drift_plot.plot_picture(reported(dark))
    files = ReportFiles.at(tmp_path)
    assert files.plot is None
    assert "The report goes without its plot" in caplog.text
    assert len(files.write(reported(dark))) == 2


def test_files_that_cannot_be_written_are_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(OutputError, match="does not exist"):
        ReportFiles(csv=tmp_path / "missing/a.csv").check()
    with pytest.raises(OutputError, match="is a folder"):
        ReportFiles(json=tmp_path).check()
    with pytest.raises(OutputError, match=r"must end in one of \.png"):
        ReportFiles(plot=tmp_path / "a.doc").check()


# --- reading ----------------------------------------------------------------------------------------------


def test_a_video_is_read_to_its_last_frame(video, dark):
    footage = open_footage(video)
    assert (footage.width, footage.height, footage.fps) == (112, 80, 16)
    pieces = list(footage.pieces())
    assert max(map(len, pieces)) == 12
    assert torch.cat(pieces).shape == dark.shape
    assert (torch.cat(pieces) - dark).abs().mean() < 0.02


def test_pictures_are_read_in_order(tmp_path):
    for number in (10, 9, 100):
        Image.fromarray(np.full((16, 24, 3), number, np.uint8)).save(tmp_path / f"a{number}.png")
    footage = open_footage(tmp_path, picture_fps=8)
    assert (footage.width, footage.height, footage.fps, footage.announced) == (24, 16, 8, 3)
    assert [round(float(frame.mean()) * 255) for frame in torch.cat(list(footage.pieces()))] == [9, 10, 100]
    assert open_footage(tmp_path / "a%03d.png").announced == 3
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a200.png")
    with pytest.raises(PictureError, match=r"a200\.png is 8x8 and the first picture 24x16"):
        list(open_footage(tmp_path).pieces())


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(PictureError, match="holds no frame that plays"):
        open_footage(tmp_path / "text.mp4")
    with pytest.raises(PictureError, match="does not exist"):
        open_footage(tmp_path / "missing.mp4")
    with pytest.raises(PictureError, match="no numbered PNG pictures"):
        open_footage(tmp_path)


def test_a_reader_that_is_left_early_leaves_no_process(video):
    pieces = open_footage(video).pieces()
    next(pieces)
    pieces.close()
    children = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "comm="], capture_output=True, text=True
    )
    assert "ffmpeg" not in children.stdout


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_tells_the_findings_and_writes_the_files(video, tmp_path, capsys):
    table, whole = tmp_path / "a.csv", tmp_path / "a.json"
    assert cli.main(["report", str(video), "--csv", str(table), "--json", str(whole)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("darkening (")
    assert said[-2:] == [f"written: {table}", f"written: {whole}"]
    assert json.loads(whole.read_text())["frames"] == 100
    assert cli.main(["report", str(video), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_the_command_refuses_in_one_line(video, tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "missing.mp4")]) == 2
    assert cli.main(["report", str(video), "--csv", str(tmp_path / "no/a.csv")]) == 2
    assert cli.main(["report", str(video), "--chunk-frames", "-3"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert all(line.startswith("error: ") for line in said)


def test_a_video_cut_short_is_measured_up_to_the_cut(video, tmp_path, capsys):
    """The videos of this package play up to their last fragment."""
    short = tmp_path / "short.mp4"
    short.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    assert cli.main(["report", str(short), "--json", str(tmp_path / "a.json")]) in (0, 2)
    assert 0 < json.loads((tmp_path / "a.json").read_text())["frames"] < 100


def test_ctrl_c_keeps_what_was_measured(video, tmp_path, monkeypatch, capsys):
    original = DriftMeter.add

    def add(meter, frames):
        if meter.frames >= 48:
            raise KeyboardInterrupt
        return original(meter, frames)

    monkeypatch.setattr(DriftMeter, "add", add)
    assert cli.main(["report", str(video), "--json", str(tmp_path / "a.json")]) == 130
    assert json.loads((tmp_path / "a.json").read_text())["frames"] == 48


# --- while a video is recorded ----------------------------------------------------------------------------


def recording(folder):
    return Recording(out=str(folder / "a.mp4"), width=112, height=80, fps=16, enlarge=1, chunks=9)


def test_a_video_is_measured_while_it_is_recorded(tmp_path, dark):
    watch = DriftWatch(ReportFiles.at(tmp_path / "drift.json"), fps=16)
    outcome = record(iter(dark.split(12)), recording(tmp_path), report=lambda _: None, observe=watch.add)
    assert (outcome.frames, watch.finish()) == (100, reported(dark))
    assert json.loads((tmp_path / "drift.json").read_text())["findings"]


def test_watching_is_one_line_and_tells_what_it_found(tmp_path, dark, caplog):
    with watched(tmp_path / "drift.csv", fps=16) as observe:
        for frames in dark.split(12):
            observe(frames)
    assert (tmp_path / "drift.csv").read_text() == reported(dark).as_csv()
    assert f"drift, darkening ({reported(dark).faults[0].score:.1f}): luma falls by" in caplog.text
    with watched(None, fps=16) as observe:
        assert observe is None


def test_a_run_that_is_stopped_gets_the_report_of_what_it_made(tmp_path, dark):
    def stopped():
        yield from dark[:36].split(12)
        raise KeyboardInterrupt

    watch = DriftWatch(ReportFiles.at(tmp_path / "drift.csv"), fps=16)
    outcome = record(stopped(), recording(tmp_path), report=lambda _: None, observe=watch.add)
    assert not outcome.complete
    assert watch.finish().frames == 36
    assert (tmp_path / "drift.csv").exists()


def test_trouble_with_the_report_never_costs_the_video(tmp_path, dark, caplog):
    watch = DriftWatch(ReportFiles.at(tmp_path / "drift.csv"), fps=16)
    broken = dark.clone()
    broken[30] = float("nan")
    outcome = record(iter(broken.split(12)), recording(tmp_path), report=lambda _: None, observe=watch.add)
    assert (outcome.frames, outcome.complete) == (100, True)
    assert watch.finish().frames == 24
    assert caplog.text.count("the drift report ends at frame 24") == 1
    late = DriftWatch(ReportFiles(csv=tmp_path / "late.csv"), fps=16)
    late.add(dark)
    (tmp_path / "late.csv").mkdir()
    assert late.finish() is None
    assert "the drift report could not be written" in caplog.text
    assert DriftWatch(ReportFiles(), fps=16).finish() is None


# --- the node ---------------------------------------------------------------------------------------------


@pytest.fixture
def node(tmp_path, monkeypatch):
    host = pack.module("nodes._host")

    @contextmanager
    def on_disk(value):
        yield Path(value)

    def output_file(prefix, width, height, suffix):
        return tmp_path / f"{prefix}_00001_{suffix}", ""

    monkeypatch.setattr(host, "output_file", output_file, raising=False)
    monkeypatch.setattr(host, "video_on_disk", on_disk, raising=False)
    monkeypatch.setattr(host, "picture", lambda *values: values, raising=False)
    return pack.module("nodes.report").SFPPDriftReport


SETTINGS = {"filename_prefix": "a", "chunk_frames": 12, "images_fps": 16.0}


def test_the_node_measures_a_video_and_saves_the_files(node, video, tmp_path):
    pytest.importorskip("matplotlib")
    result = node.execute(video=video, **SETTINGS)
    text, plot = result.values
    assert text.splitlines()[1].startswith("darkening (")
    assert plot.shape == (1, 1100, 1200, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a_00001_.csv",
        "a_00001_.json",
        "a_00001_.png",
    ]
    assert result.ui == (tmp_path / "a_00001_.png", "")
    assert json.loads((tmp_path / "a_00001_.json").read_text())["frames"] == 100


def test_the_node_measures_images_and_goes_without_a_plot_where_there_is_no_matplotlib(
    node, dark, monkeypatch
):
    monkeypatch.setattr(pack.module("nodes.report"), "missing", lambda: "pip install matplotlib")
    text, plot = node.execute(images=dark.movedim(1, -1), first_chunk_frames=13, **SETTINGS).values
    assert text.splitlines()[0] == reported(dark).lines()[0]
    assert plot == ("blocked", "pip install matplotlib")


@pytest.mark.parametrize(("inputs", "seen"), [({}, "nothing is"), ({"video": 1, "images": 1}, "both are")])
def test_the_node_wants_a_video_or_images(node, inputs, seen):
    with pytest.raises(ValueError, match=f"{seen} connected to video and images; connect one of them"):
        node.execute(**inputs, **SETTINGS)
