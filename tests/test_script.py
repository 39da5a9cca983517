"""Prompts over time, as users write them: every form, every complaint, and when each scene is shown."""

import json
import random
import string

import pytest

from sfpp_core.cues import Change
from sfpp_core.errors import ScriptError
from sfpp_core.geometry import VideoGeometry
from sfpp_core.script import load_script, read_script
from sfpp_core.timetable import begins, chunk_at, timetable

VIDEO = VideoGeometry(height=64, width=64, frames=480)  # 30 s


def seen(text, *, switch="soft", video=VIDEO):
    """Return prompt, second and change of each scene."""
    script = read_script(text, change=Change.parse(switch))
    length = video.seconds
    return [(scene.prompt, scene.begins(length), str(scene.change)) for scene in script.scenes]


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "",
        "  two  spaces\nand a line ",
        "a [big] cat, 16:9 [16:9], [3 cats], (a:1.2)",
        "{cat} and [",
        "]",
        "5s: a cat",
        "[a: b]",
        "c:\\[",
    ],
)
def test_a_plain_prompt_is_one_scene_as_it_stands(prompt):
    assert seen(prompt) == [(prompt.replace("\\[", "["), 0, "soft")]


@pytest.mark.parametrize(
    ("text", "scenes"),
    [
        ("[0s: a cat] [12.5s: a dog]", [("a cat", 0, "soft"), ("a dog", 12.5, "soft")]),
        ("[0s:a cat]\n[1m30s cut : a dog]", [("a cat", 0, "soft"), ("a dog", 90, "cut")]),
        ("[0 s: a] [.5s#: b] [2m: c]", [("a", 0, "soft"), ("b", 0.5, "cut"), ("c", 120, "soft")]),
        ("red. [0s: a] [5s: b]", [("red. a", 0, "soft"), ("red. b", 5, "soft")]),
        ("red [5s: b] big [7s: c].", [
            ("red big .", 0, "soft"), ("red big . b", 5, "soft"), ("red big . c", 7, "soft"),
        ]),
        ("[0s-5s: a] [5s-9s blend:6: b]", [("a", 0, "soft"), ("b", 5, "blend:6")]),
        ("red [0s:] [5s: b]", [("red", 0, "soft"), ("red b", 5, "soft")]),
        ("[0s: a [big] cat] [5s: b \\] \\| c]", [("a [big] cat", 0, "soft"), ("b ] | c", 5, "soft")]),
        ("[0s: a | b] [5s: c]", [("a | b", 0, "soft"), ("c", 5, "soft")]),
        ("[0s: a] [5s cut+sink: b] [6s soft: c]", [("a", 0, "soft"), ("b", 5, "cut+sink"), ("c", 6, "soft")]),
        ("[0s: a] [5s blend: 4 dogs]", [("a", 0, "soft"), ("4 dogs", 5, "blend:4")]),
        ("a [5s] | b [10s#]", [("a", 0, "soft"), ("b", 5, "cut")]),
        ("a[5s]|b[10 sec blend:2]|c", [("a", 0, "soft"), ("b", 5, "blend:2"), ("c", 15, "soft")]),
        ("a [30s]", [("a", 0, "soft")]),
        ("a | b | c", [("a", 0, "soft"), ("b", 10, "soft"), ("c", 20, "soft")]),
        ("a | b [cut] | c [#] | d [blend:2]", [
            ("a", 0, "soft"), ("b", 7.5, "cut"), ("c", 15, "cut"), ("d", 22.5, "blend:2"),
        ]),
        ("a \\| b | c", [("a | b", 0, "soft"), ("c", 15, "soft")]),
    ],
)  # fmt: skip
def test_every_form_becomes_scenes(text, scenes):
    assert seen(text) == scenes


def test_scenes_that_do_not_say_take_the_way_that_is_asked_for():
    assert seen("a | b | c [cut]", switch="blend:7") == [
        ("a", 0, "blend:7"),
        ("b", 10, "blend:7"),
        ("c", 20, "cut"),
    ]


def test_json_says_the_same():
    table = {
        "common": "red",
        "switch": "blend:2",
        "scenes": [{"at": 0, "prompt": "a"}, {"at": 5, "prompt": "b", "switch": "cut"}, {"at": 7.5}],
    }
    expected = [("red a", 0, "blend:2"), ("red b", 5, "cut"), ("red", 7.5, "blend:2")]
    assert seen(json.dumps(table)) == expected
    lasting = [{"for": 5, "prompt": "a"}, {"for": 2, "prompt": "b"}, {"prompt": "c"}]
    assert seen(json.dumps(lasting)) == [("a", 0, "soft"), ("b", 5, "soft"), ("c", 7, "soft")]
    shares = [{"prompt": "a"}, {"prompt": "b", "switch": "#"}]
    assert seen(json.dumps(shares, indent=1)) == [("a", 0, "soft"), ("b", 15, "cut")]


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        ("[0s: a] [5: b]", "5: b", None),
        ("[0s: a cat [5s: b]", "[5s", "a scene begins inside another; close the one before it with a ]"),
        ("x [0s: a cat", "[0s", "this bracket is never closed; put ] after the scene"),
        (
            "[3s: a]",
            "[3s",
            "nothing says what is shown before this scene; begin it at 0s, or put text before",
        ),
        (
            "[0s: a] [5s: b] [5s: c]",
            "5s: c",
            "begins at 5 s and the one before at 5 s; list scenes in the order",
        ),
        ("[0s-6s: a] [5s: b]", "5s: b", "begins at 5 s, before the one before ends at 6 s"),
        ("[0s: a] [5s-4s: b]", "4s", "this scene ends at 4 s and begins at 5 s"),
        ("[0s: a] [5s: ]", "]$", "this scene is empty; say what it shows"),
        (
            "[0s: a] [5s fade: b]",
            "fade",
            "'fade' names no way to change the prompt; use soft, cut, cut+sink or",
        ),
        ("[0s: a] [5s blend:0: b]", "blend", "a blend over 0 chunks cannot be; use 1 to 1000"),
        ("[0s: a] [5s cut b]", "b]", "a : or ] is missing, as in [5s: a dog] or a dog [5s]"),
        ("[0s: a] | [5s: b]", "|", "scenes that begin at a time need no | between them"),
        ("[0s: a] b [5s]", "[5s]", "two forms are mixed"),
        ("[0s: a] [cut]", "[cut]", "two forms are mixed"),
        ("[-5s: a]", "-5s", "a time is below 0; the video begins at 0s"),
        ("[0s: a] [5h: b]", "h: b", "the unit of 5 is missing or unknown; write seconds as 5s, or \\[ for"),
        (
            "a [5s] | b | c [2s]",
            "| c",
            "scene 2 does not say how long it lasts; end it with its length, e.g. [5s]",
        ),
        ("a || b", "| b", "this scene is empty"),
        (
            "a [5s] ; x | b [5s]",
            "; x",
            "a scene ends with its bracket; put | before the next one. Subtitles are",
        ),
        ("a [5s] [6s] | b", "[6s]", "this scene has two brackets; put | between scenes"),
        ("a [0s] | b", "0s", "a scene of 0 s is never seen"),
        ("a [3s-5s] | b", "]", "a range of time needs its scene, as in [3s-5s: a dog]; a length is [2s]"),
        ("a [5s | b", "| b", "a : or ] is missing"),
        ('{"scenes": [{"at": 0 "prompt": 3}]}', '"prompt"', "this is no JSON: Expecting ',' delimiter; mend"),
    ],
)
def test_a_complaint_points_at_the_character(text, place, says):
    with pytest.raises(ScriptError) as caught:
        read_script(text)
    said, line, pointer = str(caught.value).split("\n")
    assert (says or "the unit of 5 is missing") in said
    expected = len(text) - 1 if place == "]$" else text.index(place)
    if place == "5: b":
        expected += 1  # the character after the number
    assert line == f"  {text}"
    assert pointer.index("^") == 2 + expected
    assert pointer.endswith(f"^ character {expected + 1}")


def test_a_complaint_shows_one_line_and_not_all_of_it():
    with pytest.raises(ScriptError) as caught:
        read_script("a cat.\n[0s: it sleeps]\n\t[5s run: it runs]\n")
    assert str(caught.value).split("\n")[1:] == ["   [5s run: it runs]", "       ^ line 3, character 6"]
    with pytest.raises(ScriptError) as caught:
        read_script("[0s: " + "very " * 40 + "far] [5x: b] " + "away " * 40)
    _, line, pointer = str(caught.value).split("\n")
    assert len(line) <= 82
    assert line[pointer.index("^") :].startswith("x: b]")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ([], None),
        ({}, "the script has no scenes"),
        ({"scenes": [], "switch": "soft"}, "the script has no scenes"),
        ({"scene": []}, "the script has an unknown key 'scene'; known keys: common, scenes, switch."),
        ([{"prompt": "a", "at": 0}, {"prompt": "b", "for": 2}], "some scenes say at and others for"),
        ([{"prompt": "a", "at": 0}, {"prompt": "b"}], 'scene 2 has no "at", and others have; give it one'),
        ([{"prompt": "a"}, {"prompt": "b", "for": 2}], 'scene 1 has no "for", and others have'),
        ([{"prompt": "a", "at": 1}], "scene 1 begins at 1 s; the first scene must begin at 0."),
        (
            [{"prompt": "a", "at": 0}, {"prompt": "b", "at": 0}],
            "scene 2 begins at 0 s and the one before at 0",
        ),
        ([{"prompt": "a", "for": 0}], "for of scene 1 is 0; it must be 0.001 seconds or more"),
        ([{"prompt": "a", "at": float("nan")}], "at of scene 1 is nan; it must be 0 seconds or more"),
        ([{"prompt": "a", "at": "5s"}], 'at of scene 1 is "5s"; it must be a number'),
        ([{"prompt": "a", "at": True}], "at of scene 1 is true; it must be a number"),
        ([{"prompt": 3}], "prompt of scene 1 is 3; it must be a text"),
        ([{"switch": "cut"}], 'scene 1 is empty; give it a "prompt"'),
        ([{"prompt": "a", "switch": "fade"}], "switch of scene 1: 'fade' names no way"),
        ({"scenes": ["a"]}, 'scene 1 is "a"; it must be a table'),
        ({"scenes": {"a": 1}}, 'scenes of the script is {"a": 1}; it must be a list'),
    ],
)
def test_json_that_says_something_impossible_is_refused(table, says):
    text = json.dumps(table)
    if says is None:
        assert seen(text) == [(text, 0, "soft")]  # two brackets are a prompt, if a poor one
        return
    with pytest.raises(ScriptError) as caught:
        read_script(text)
    assert says in str(caught.value)


def test_json_beyond_reason_is_refused():
    for text in ('{"scenes": ' + "[" * 100_000, '[{"prompt": "a", "at": ' + "9" * 5000 + "}]"):
        with pytest.raises(ScriptError, match="nested too deeply or holds too long a number"):
            read_script(text)
    assert seen('[{"prompt": "a", "for": ' + "9" * 400 + '}, {"prompt": "b"}]')[1][1] == 604800
    assert seen("a [" + "9" * 400 + "s] | b")[1][1] == 604800


def test_nothing_a_user_types_ends_in_another_error():
    pick, pieces = (
        random.Random(0),
        ["[", "]", "|", ":", "5s", "0s", " ", "#", "-", "cut", "blend:", "\\", "{", '"', "a"],
    )
    for _ in range(4000):
        text = "".join(
            pick.choice([*pieces, pick.choice(string.printable)]) for _ in range(pick.randrange(1, 14))
        )
        try:
            script = read_script(text)
        except ScriptError as error:
            assert "\n" in str(error) or text.lstrip().startswith(("{", "["))
            continue
        table = timetable(script, VIDEO)
        assert table.entries[0].chunk == 0
        assert script.scenes[0].begins(30) == 0


def test_a_file_is_read_as_text(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("[0s: a café]\n[5s: b]\n", encoding="utf-8-sig")
    assert seen(load_script(path)) == [("a café", 0, "soft"), ("b", 5, "soft")]
    for content, says in (
        (b" \n", "is empty; write a prompt, or scenes such as"),
        (b"caf\xe9", "is no text in UTF-8 at byte 3; save it as UTF-8"),
        (b"x" * 1_000_001, "is larger than 1 MB; that is no script"),
    ):
        path.write_bytes(content)
        with pytest.raises(ScriptError, match=says):
            load_script(path)
    with pytest.raises(ScriptError, match=r"cannot be read: No such file or directory; check the path"):
        load_script(tmp_path / "none.txt")
    with pytest.raises(ScriptError, match="cannot be read"):
        load_script(tmp_path)


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_scene_begins_at_the_nearest_border(lead, chunk):
    video = VideoGeometry(height=64, width=64, frames=100, chunk=chunk, lead=lead)
    borders = [begins(place, video) for place in range(video.chunks)]
    assert borders[:2] == [0, (1 + 4 * (chunk + lead - 1)) / 16]
    for step in range(130):
        seconds = step * 0.05
        nearest = min(range(video.chunks), key=lambda place: abs(borders[place] - seconds))
        assert chunk_at(seconds, video) == nearest


def test_the_table_says_when_each_scene_is_shown():
    table = timetable(read_script("a red cat [5s] | a dog [10.2s#] | a bird"), VIDEO)
    assert table.lines() == [
        "scene   wanted  chunk   actual  change  prompt",
        "    1   0.00 s      0   0.00 s       -  a red cat",
        "    2   5.00 s      7   5.06 s     cut  a dog",
        "    3  15.20 s     21  15.56 s    soft  a bird",
    ]
    assert table.prompts == ("a red cat", "a dog", "a bird")
    assert not table.warnings


@pytest.mark.parametrize(
    ("text", "prompts", "warning"),
    [
        ("[0s: a] [9s: b] [9.1s: c]", ["a", "c"],
         r"scene 2 \('b'\) and scene 3 \('c'\) both begin at 8\.81 s, where chunk 12 begins: only the second "
         r"is shown\. A prompt lasts whole chunks of 0\.75 s; leave more time between scenes"),
        ("[0s: a] [0.1s: b]", ["b"], "both begin at 0.00 s"),
        ("[0s: a] [30s: b]", ["a"],
         r"scene 2 \('b'\) begins at 30 s and the video ends at 30 s: it is not shown"),
        ("a [5s] | b [5s]", ["a", "b"], "nothing is said of 10 s to 30 s; the scene before goes on"),
        ("[0s-3s: a] [5s: b]", ["a", "b"], "nothing is said of 3 s to 5 s; the scene before goes on"),
        ("[0s cut: a] [5s: b]", ["a", "b"], "cut at the first scene does nothing: no scene comes before it"),
        ("a [5s#] | b", ["a", "b"], "cut at the first scene does nothing"),
    ],
)  # fmt: skip
def test_what_is_not_shown_as_written_is_warned_of(text, prompts, warning):
    table = timetable(read_script(text), VIDEO)
    assert list(table.prompts) == prompts
    assert len(table.warnings) == 1
    with pytest.raises(ValueError, match=warning):
        raise ValueError(table.warnings[0])


def test_a_scene_that_repeats_the_one_before_changes_nothing_unless_it_cuts():
    table = timetable(read_script("[0s: a] [5s: a] [10s blend:2: a] [15s cut: a] [20s: b]"), VIDEO)
    assert [entry.number for entry in table.entries] == [1, 4, 5]
    assert not table.warnings
