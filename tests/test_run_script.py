"""Runs whose prompt changes: however they were ended and changed, they are the undisturbed ones."""

import itertools
import shutil

import pytest
import tiny
import tiny_demo
import torch
from run_commands import aside, latents, manifest, run_words
from tiny_demo import refused

from sfpp_core import cli
from sfpp_core.anchor import anchoring
from sfpp_core.config import RolloutSettings
from sfpp_core.cues import SOFT, Change
from sfpp_core.encoder import video_info
from sfpp_core.errors import GeometryError, SettingsError
from sfpp_core.geometry import VideoGeometry
from sfpp_core.run.agreement import Wanted
from sfpp_core.run.folder import open_run
from sfpp_core.run.going_on import go_on
from sfpp_core.sampler import LongSampler
from sfpp_core.scenes import Scene, Script
from sfpp_core.timetable import begins, timetable

TEXTS = {"a": tiny.text(seed=3), "b": tiny.text(seed=4), "c": tiny.text(seed=5)}
KINDS = ["soft", "soft:1", "cut", "cut+sink", "blend:3"]


def geometry_of(chunks):
    return VideoGeometry(height=32, width=48, frames=12 * chunks - 3, chunk=3)


def table_of(chunks, *scenes):
    """Return the timetable of scenes such as ``(5, "b", "cut")``: from chunk 5 on."""
    geometry = geometry_of(max([chunks, *(scene[0] + 1 for scene in scenes)]))
    made = [
        Scene(
            prompt=prompt, seconds=begins(chunk, geometry), change=Change.parse(change[0]) if change else SOFT
        )
        for chunk, prompt, *change in scenes
    ]
    return timetable(Script(scenes=tuple(made)), geometry_of(chunks))


def sampler_of(chunks, *, anchor=0.0, context_sigma=0.0, storage="plain", **settings):
    return LongSampler(
        student=tiny.student(),
        geometry=geometry_of(chunks),
        settings=RolloutSettings(**{"window": 9, "steps": 2, **settings}),
        context_sigma=context_sigma,
        finish=anchoring(anchor),
        storage=storage,
    )


class Maker:
    """Makes runs, and what an undisturbed sampler makes in their place."""

    def __init__(self, **way):
        self.way = way

    def cues(self, table):
        return table.cues([TEXTS[prompt] for prompt in table.prompts])

    def whole(self, chunks, *scenes):
        return list(sampler_of(chunks, **self.way).chunks(self.cues(table_of(chunks, *scenes))))

    def make(self, folder, chunks, *scenes, stop=None, replay="auto", keep_cache=0, **asked):
        """Make chunks of a run up to ``stop``; return all it then holds."""
        table = table_of(chunks, *scenes)
        decisions = {"seed": 0, **self.way}
        given = {"space": "wan2.1", "geometry": geometry_of(chunks), "decisions": decisions, "request": {}}
        with open_run(folder, Wanted(text=table.text, **given, **asked)) as run:
            made = go_on(
                run, sampler_of(chunks, **self.way), self.cues(table), replay=replay, keep_cache=keep_cache
            )
            for piece in itertools.islice(made, None if stop is None else max(0, stop - run.kept)):
                piece.keep()
            made.close()
        return latents(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny_demo.write(tmp_path_factory.mktemp("demo"))


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def some_fast(table):
    """Mark all but every sixth row as slow: with five kinds, each comes by."""
    rows = enumerate(tuple(row) for row in table)
    return [
        pytest.param(*row, marks=[pytest.mark.slow] if place % 6 else [], id=str(row)) for place, row in rows
    ]


TABLE = [(5, 5, 7), (8, 5, 8), (8, 1, 8), (3, 5, 7), (7, 6, 9)]
"""Chunks that are made, the one the prompt changes at, and chunks that are wanted then."""

WAYS = [
    {"sink": 3},
    {"sink": 3, "sink_positions": "relative"},
    {"overlap": 3},
    {"context_sigma": 0.1},
    {"anchor": 0.5, "sink": 3},
    {"storage": "fp8-host"},
]


@pytest.mark.parametrize(("way", "kind"), some_fast((way, kind) for way in WAYS for kind in KINDS))
def test_a_run_goes_on_exactly_across_a_change(tmp_path, way, kind):
    """Stopped before the change, at it, after it, and when the first window has passed."""
    maker, scenes = Maker(**way), [(0, "a"), (4, "b", kind), (9, "c", "soft")]
    expected = maker.whole(11, *scenes)
    stops = (3, 4, 5, 8, 9, 10, None)
    for name, options in {"cache": {"keep_cache": 1}, "all": {"replay": "all"}}.items():
        for stop in stops:
            done = maker.make(tmp_path / name, 11, *scenes, stop=stop, **options)
        assert equal(done, expected)
        assert all(each["exact"] for each in manifest(tmp_path / name)["resumes"])


@pytest.mark.parametrize(
    ("made", "place", "chunks", "keep_cache", "kind"),
    some_fast((*row, keep, kind) for row in TABLE for keep in (0, 1) for kind in KINDS),
)
def test_a_prompt_changed_on_the_way_keeps_what_came_before(tmp_path, made, place, chunks, keep_cache, kind):
    """A run made so far, changed from a chunk on, of a new length: the undisturbed run with that change."""
    maker, run, scenes = Maker(sink=3), tmp_path / "run", [(0, "a"), (place, "b", kind)]
    before = maker.make(run, chunks, (0, "a"), stop=made, keep_cache=keep_cache)
    after = maker.make(run, chunks, *scenes, keep_cache=keep_cache)
    assert equal(after, maker.whole(chunks, *scenes))
    assert equal(after[: min(made, place)], before[:place])
    assert len(list((run / "aside").rglob("*.safetensors"))) == max(0, made - place)
    again = maker.make(run, chunks, (0, "a"), keep_cache=keep_cache)  # and back
    assert equal(again, maker.whole(chunks, (0, "a")))


def test_kept_keys_of_the_first_chunk_after_a_change_are_not_taken_for_those_before_it(tmp_path):
    maker, run = Maker(), tmp_path / "run"
    maker.make(run, 7, (0, "a"), (4, "b", "soft"), stop=5, keep_cache=5)
    assert equal(maker.make(run, 7, (0, "a")), maker.whole(7, (0, "a")))


@pytest.mark.parametrize("kind", ["soft", "cut"])
def test_only_the_stretch_is_recalled(tmp_path, kind):
    """A long past before a change is not looked at; a long one after it is recalled from its last windows."""
    maker, run, scenes = Maker(window=6), tmp_path / "run", [(0, "a"), (12, "b", kind)]
    maker.make(run, 26, *scenes, stop=14)
    maker.make(run, 26, *scenes, stop=24, replay="window")
    first, *_ = manifest(run)["resumes"]
    assert (first["how"], first["exact"]) == ("all", True)
    expected = maker.whole(26, *scenes)
    assert equal(latents(run), expected[:24])
    made = maker.make(run, 26, *scenes, replay="window")
    last = manifest(run)["resumes"][-1]
    assert (last["how"], last["exact"], last["replayed"]) == ("window", False, 3)
    assert max(float((a - b).abs().max()) for a, b in zip(made[24:], expected[24:], strict=True)) < 0.01


def test_a_branch_under_a_script_is_what_a_change_in_place_makes(tmp_path):
    maker, old = Maker(sink=3), tmp_path / "old"
    before = maker.make(old, 8, (0, "a"))
    scenes = [(0, "a"), (3, "b", "cut"), (6, "c", "blend:2")]
    asked = {"seconds_kept": begins(5, geometry_of(8))}
    made = maker.make(tmp_path / "new", 9, *scenes, branch=old, **asked)
    assert equal(made[:5], before[:5])
    assert equal(latents(old), before)
    assert equal(maker.make(old, 9, *scenes, **asked), made)
    others = [(0, "a"), (1, "c", "cut"), (3, "b", "cut"), (6, "c", "blend:2")]
    with pytest.raises(SettingsError, match="earlier prompts was"):
        maker.make(old, 9, *others)


def test_an_anchor_begins_anew_with_every_video():
    finish = anchoring(0.5)
    chunks = [tiny.latents(1, chunk=3, seed=seed) * (1 + seed) for seed in range(9)]
    videos = [[finish(number, chunk) for number, chunk in enumerate(chunks)] for _ in range(2)]
    assert equal(*videos)
    assert equal(videos[0][:7], chunks[:7])
    assert not torch.equal(videos[0][8], chunks[8])


def test_prompts_over_time_stay_where_they_are_in_a_longer_run(files, tmp_path, capsys):
    """Of equal shares of 3 s the second begins at 1.5 s, in a longer video too."""
    run, prompt = tmp_path / "run", "a red circle | a blue circle"
    assert cli.main(run_words(files, run, "--switch", "cut", prompt=prompt)) == 0
    before = latents(run)
    assert cli.main(["generate", "--run", str(run), "--extend", "1", "--quiet"]) == 0
    assert all(torch.equal(a, b) for a, b in zip(latents(run), before, strict=False))
    assert not aside(run)
    assert [chunk for chunk, _ in manifest(run)["sections"][-1]["texts"]] == [0, 2]
    assert cli.main(["info", str(run)]) == 0
    assert "[1.3125s cut: a blue circle]" in capsys.readouterr().out
    assert cli.main(run_words(files, run, prompt="a red circle", seconds="4")) == 0
    assert all(torch.equal(a, b) for a, b in zip(latents(run)[:2], before[:2], strict=True))
    assert not torch.equal(latents(run)[2], before[2])


def test_a_report_of_a_run_is_made_afterwards(files, tmp_path, capsys):
    words = ("--report", str(tmp_path / "drift.json"))
    refused(capsys, run_words(files, tmp_path / "run", *words), "python -m sfpp_core report")
    assert not (tmp_path / "run").exists()
    assert cli.main(tiny_demo.command(files, tmp_path / "a.mp4", *words, "--anchor", "0.5", "--quiet")) == 0
    assert (tmp_path / "drift.json").stat().st_size


def test_a_copied_run_leaves_the_video_of_the_other_alone(files, tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    assert cli.main(run_words(files, run, seconds="0.5")) == 0
    before = (run / "video.mp4").read_bytes()
    shutil.copytree(run, copy)
    assert cli.main(["generate", "--run", str(copy), "--extend", "0.5", "--quiet"]) == 0
    assert (run / "video.mp4").read_bytes() == before
    assert video_info(copy / "video.mp4").frames == 16


def test_a_start_that_leaves_nothing_to_make_is_refused(tmp_path):
    sampler, geometry = sampler_of(2), geometry_of(2)
    wanted = Wanted(space="wan2.1", geometry=geometry, decisions={}, request={}, text=str)
    start = torch.zeros(1, 16, geometry.latent_frames, *geometry.chunk_shape[1:])
    with open_run(tmp_path / "run", wanted) as run, pytest.raises(GeometryError, match="a longer video"):
        next(go_on(run, sampler, TEXTS["a"], start=start))
