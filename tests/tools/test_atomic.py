"""Files are whole or untouched."""

import os

import pytest

from evennorm import InputError
from evennorm.tools.atomic import write_text


def test_replaces_a_file_as_a_whole(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    write_text(target, "new ⋮\n")
    assert target.read_bytes() == "new ⋮\n".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_follows_a_link(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError) as error:
        write_text(target, "new")
    assert str(error.value) == (
        f"cannot write {str(target)!r}: No space left on device; choose a file in a folder that takes new files"
    )
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_name_that_no_file_can_have(tmp_path):
    with pytest.raises(InputError, match="cannot write 'a\\\\x00b'"):
        write_text("a\0b", "new")
