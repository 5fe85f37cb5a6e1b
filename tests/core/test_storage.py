"""What may be trusted on a disk that others write to."""

from __future__ import annotations

import os

import pytest

from spmd.core.storage import make_private


def test_a_private_directory_is_made_for_its_owner_alone(tmp_path):
    assert make_private(tmp_path / "new/own") == ""
    assert (tmp_path / "new/own").stat().st_mode & 0o777 == 0o700
    (tmp_path / "new/own").chmod(0o755)  # others may read
    assert make_private(tmp_path / "new/own") == ""


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_one_that_others_may_write_is_not(tmp_path, mode):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    assert f"writable by others (mode {mode:04o}" in make_private(tmp_path / "open")


def test_one_that_anyone_may_replace_is_not(tmp_path):
    own = tmp_path / "open/own"
    own.mkdir(parents=True, mode=0o700)
    own.parent.chmod(0o777)
    assert "anyone may replace it" in make_private(own)
    (tmp_path / "link").symlink_to(own)
    assert "anyone may replace it" in make_private(tmp_path / "link")
    own.parent.chmod(0o1777)  # as /tmp
    assert make_private(own) == ""


def test_another_users_is_not(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(theirs, 12345, -1)
        assert make_private(theirs) == "belongs to another user (uid 12345)"
    else:
        assert make_private(tmp_path / "/") == "belongs to another user (uid 0)"


def test_one_that_cannot_be_made_is_not(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be used" in make_private(tmp_path / "file/own")
