"""Files that are whole or not there."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sfpp_core.durable import copy_file, remove_parts, share_file, unwritable, whole_file, write_text
from sfpp_core.errors import OutputError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_ends_the_writing_leaves_the_earlier_file_and_no_trace(tmp_path, error):
    path = tmp_path / "a.txt"
    write_text(path, "é")
    with pytest.raises((OutputError, KeyboardInterrupt)), whole_file(path) as part:
        part.write_text("half")
        raise error
    assert path.read_bytes() == "é".encode()
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_kill_leaves_the_earlier_file_and_a_part_that_can_be_removed(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "whole")
    program = "import os\nfrom pathlib import Path\nfrom sfpp_core.durable import whole_file\n"
    program += f"with whole_file(Path({str(path)!r})) as part:\n    part.write_text('half')\n"
    program += "    os.kill(os.getpid(), 9)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert path.read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 2
    remove_parts(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free some room"), (errno.EDQUOT, "free some room"), (errno.EROFS, "choose another")],
)
def test_the_error_says_what_to_do(tmp_path, number, remedy):
    said = str(unwritable(tmp_path / "a.txt", OSError(number, os.strerror(number))))
    assert f"a.txt cannot be written: {os.strerror(number)}; {remedy}" in said


def test_a_folder_that_is_not_there_is_an_error_of_ours(tmp_path):
    with pytest.raises(OutputError, match=r"a\.txt cannot be written: No such file"):
        write_text(tmp_path / "none" / "a.txt", "")
    with pytest.raises(OutputError, match=r"cannot be made of .*none: No such file"):
        copy_file(tmp_path / "none", tmp_path / "a.txt")


def test_a_shared_file_is_a_copy_where_the_disk_cannot_share(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"abc")
    share_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").samefile(tmp_path / "a")

    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    share_file(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == b"abc"
    assert not (tmp_path / "c").samefile(tmp_path / "a")
    monkeypatch.setattr(shutil, "copyfileobj", refuse)
    with pytest.raises(OutputError):
        share_file(tmp_path / "a", tmp_path / "d")
    assert not (tmp_path / "d").exists()
