"""What the user sees while a video is made: bar, text, and a preview that moves, made aside."""

import time
from concurrent.futures import Future
from io import BytesIO
from threading import Event
from types import SimpleNamespace

import pack
import pytest
import torch
from PIL import Image

progress = pack.module("nodes.progress")
animation = pack.module("nodes.animation")
pace = pack.module("nodes.pace")
host = pack.module("nodes._host")


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    """What nodes other than the one at work show."""
    found = []
    monkeypatch.setattr(host, "show_progress", lambda *entry: found.append(entry))
    return found


def frames(count, *, width=64, height=48):
    """Return frames each of another grey."""
    return torch.linspace(0, 1, count).view(-1, 1, 1, 1).expand(-1, 3, height, width)


def written(picture):
    """Return what the host sends of a picture, read again."""
    file = BytesIO()
    picture.save(file, format="JPEG", quality=95, compress_level=1)
    return Image.open(file)


def previews(shown):
    return [entry[3] for entry in shown if len(entry) > 3]


def test_a_chunk_is_sent_as_an_animation_that_never_ends(shown):
    with progress.Progress(3, "7") as bar:
        bar.show(1, "chunk 1 of 3", lambda: (frames(12), 16))
    (picture,) = previews(shown)
    assert isinstance(picture, Image.Image)
    assert picture.size == (320, 240)
    sent = written(picture)
    assert (sent.format, sent.n_frames, sent.size, sent.info["loop"]) == ("WEBP", 12, (320, 240), 0)
    brightness = []
    for number in range(12):
        sent.seek(number)
        sent.load()
        assert sent.info["duration"] == 62
        brightness.append(sent.convert("L").getpixel((160, 120)))
    assert brightness == sorted(brightness)
    assert brightness[-1] - brightness[0] > 240


@pytest.mark.parametrize(
    ("count", "size", "expected", "fps"),
    [
        (12, (832, 480), (12, 3, 185, 320), 16),
        (9, (64, 64), (9, 3, 320, 320), 16),
        (84, (480, 832), (12, 3, 320, 185), 16 / 7),
        (3, (104, 60), (3, 3, 180, 312), 16),
        (1, (320, 16), (1, 3, 16, 320), 16),
        (13, (2048, 2), (7, 3, 1, 320), 8),
    ],
)
def test_previews_are_small_however_large_the_pictures(count, size, expected, fps):
    seen, rate = animation.small(frames(count, width=size[0], height=size[1]), 16)
    assert (tuple(seen.shape), seen.dtype) == (expected, torch.uint8)
    assert rate == fps


def test_the_video_does_not_wait_for_its_previews(shown, monkeypatch):
    """A preview takes as long as it likes, and none is begun before it is over."""
    began, over = [], Event()

    def endless(seen, fps):
        began.append(seen)
        assert over.wait(60)
        return "picture"

    monkeypatch.setattr(progress, "animated", endless)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_PREVIEWS", 0.0)
    with progress.Progress(1000, "7") as bar:
        for number in range(100):
            bar.show(number, "", lambda: (frames(1), 16))
            time.sleep(0.002)
        assert not previews(shown)
        over.set()
    assert len(began) == 1
    assert previews(shown) == ["picture"]


def test_the_last_chunk_stays_to_be_seen_even_where_an_earlier_one_is_still_encoded(shown, monkeypatch):
    over, began = Event(), Event()

    def slow(seen, fps):
        began.set()
        assert over.wait(60)
        return int(seen[0, 0, 0, 0])

    monkeypatch.setattr(progress, "animated", slow)
    with progress.Progress(2, "7") as bar:
        bar.show(1, "", lambda: (frames(1), 16))
        assert began.wait(60)
        bar.show(2, "", lambda: (frames(1) + 1, 16))
        over.set()
    assert previews(shown) == [0, 255]


def test_no_thread_is_the_first_to_show_anything_on_a_node(shown, monkeypatch):
    class AtOnce:
        def __init__(self, *_):
            pass

        def submit(self, function, *values):
            done = Future()
            done.set_result(function(*values))
            return done

        def shutdown(self):
            pass

    monkeypatch.setattr(progress, "ThreadPoolExecutor", AtOnce)
    with progress.Progress(2, "7") as bar:
        bar.show(1, "", lambda: (frames(1), 16))
    assert [len(entry) for entry in shown] == [3, 4]


def test_previews_take_a_small_share_of_the_time(shown, monkeypatch):
    now, sleep = [0.0], time.sleep

    def half_a_second(seen, fps):
        now[0] += 0.5
        return "picture"

    def until(count):
        """Show until there are so many previews, or for a while."""
        for _ in range(200):
            bar.show(1, "", lambda: (frames(1), 16))
            sleep(0.02)
            if len(previews(shown)) == count:
                break
        sleep(0.1)  # until the thread has nothing more to do

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(progress, "animated", half_a_second)
    with progress.Progress(10, "7") as bar:
        until(1)
        now[0] = 0.5 / progress.SHARE - 0.01
        for _ in range(5):
            bar.show(1, "", lambda: (frames(1), 16))
            sleep(0.02)
        assert len(previews(shown)) == 1
        now[0] += 0.02
        until(2)
        bar.show(9, "", lambda: (frames(1), 16))
        bar.show(10, "", lambda: (frames(1), 16))
    assert [entry[1] for entry in shown if len(entry) > 3] == [1, 1, 10]


def test_none_are_made_where_the_user_wants_none(shown, monkeypatch):
    monkeypatch.setattr(host, "previews_wanted", lambda: False)
    with progress.Progress(3, "7") as bar:
        bar.show(1, "chunk 1 of 3", lambda: pytest.fail("it was asked for"))
    with progress.Progress(3) as bar:
        bar.show(1, "chunk 1 of 3", lambda: pytest.fail("there is no node to show it on"))
    assert not previews(shown)


def test_where_there_is_nothing_to_see_nothing_is_shown(shown):
    with progress.Progress(3, "7") as bar:
        bar.show(1, "chunk 1 of 3", lambda: None)
    assert [entry[:3] for entry in shown] == [("7", 1, 3)]


def test_a_preview_that_fails_is_said_once_and_the_video_goes_on(shown, monkeypatch, caplog):
    def broken(seen, fps):
        raise OSError("no encoder")

    monkeypatch.setattr(progress, "animated", broken)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_PREVIEWS", 0.0)
    with progress.Progress(99, "7") as bar:
        for number in range(50):
            bar.show(number, "", lambda: (frames(1), 16))
            time.sleep(0.002)
    assert [record.message for record in caplog.records] == ["There are no previews: no encoder"]
    caplog.clear()
    with progress.Progress(1, "7") as bar:
        bar.show(1, "", lambda: (frames(1), 16))
    assert [record.message for record in caplog.records] == ["There are no previews: no encoder"]


def test_replayed_chunks_are_told_unless_it_takes_no_time(monkeypatch):
    said = []
    monkeypatch.setattr(host, "say", said.append)
    tell = progress.replaying(35, "run runs/a")
    tell(0)
    assert not said
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_UPDATES", 0.0)
    for chunk in (11, 34, 35):  # the last was made now
        tell(chunk)
    assert said == ["replaying chunk 12 of 35 of run runs/a", "replaying chunk 35 of 35 of run runs/a"]
    progress.replaying(3, "")(0)
    assert said[-1] == "replaying chunk 1 of 3"


def test_the_pace_is_that_of_the_latest_chunks():
    now = [0.0]
    watch = pace.Pace(81, kept=20, clock=lambda: now[0])
    assert watch.text() == "chunk 0 of 81"
    for _ in range(20):  # chunks that were there already: decoding them again says nothing of the rest
        now[0] += 0.01
        text = watch.tick(12)
    assert text == "chunk 20 of 81"
    now[0] += 0.5
    assert watch.tick(12) == "chunk 21 of 81, 24 fps, 30 s left"
    for _ in range(19):
        now[0] += 0.5
        text = watch.tick(12)
    assert text == "chunk 40 of 81, 24 fps, 20 s left"
    for _ in range(41):
        now[0] += 1
        text = watch.tick(12)
    assert text == "972 frames in 51 s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (40, "40 s"), (75, "1 min 15 s"), (3599.7, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations_are_said_as_people_do(seconds, text):
    assert pace.duration(seconds) == text


def test_slow_speeds_keep_two_figures():
    assert [pace.rate(fps) for fps in (0.256, 3.14, 21.4)] == ["0.26", "3.1", "21"]
