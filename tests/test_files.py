"""`write_atomically`: a file is whole or not there."""

import os
import stat
from pathlib import Path

import pytest

from dbtheory.files import write_atomically


def broken(temporary: Path) -> None:
    temporary.write_text("half")
    raise OSError("No space left on device")


def test_writes_the_file_and_its_folders(tmp_path: Path) -> None:
    """The file holds what `write` wrote, in folders that need not exist, and nothing else is left there."""
    path = tmp_path / "new" / "folder" / "record.json"
    write_atomically(path, lambda temporary: temporary.write_text("whole"))
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    """When the disk fills, the old file stays whole and the half of the new one is removed."""
    path = tmp_path / "record.json"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, broken)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_without_an_old_file_leaves_none(tmp_path: Path) -> None:
    """A file that never came into being must not look as if it had."""
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "record.json", broken)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_cleans_up_too(tmp_path: Path) -> None:
    """Ctrl-C is no Exception, and still leaves no temporary file."""

    def interrupted(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "record.json", interrupted)
    assert not list(tmp_path.iterdir())


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    """While `write` runs, `path` still holds the old text: a reader never sees a half."""
    path, seen = tmp_path / "record.json", []
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        seen.append(path.read_text())

    write_atomically(path, write)
    assert seen == ["old"]
    assert path.read_text() == "new"


def test_the_temporary_file_has_the_suffix(tmp_path: Path) -> None:
    """Writers such as Pillow and numpy choose the format by the suffix, so the temporary file must have it."""
    write_atomically(tmp_path / "a.tar.png", lambda temporary: temporary.write_text(temporary.suffix))
    assert (tmp_path / "a.tar.png").read_text() == ".png"


def test_a_long_name_still_fits(tmp_path: Path) -> None:
    """A name as long as the file system takes leaves no room for a longer temporary one."""
    path = tmp_path / ("x" * 251 + ".txt")
    write_atomically(path, lambda temporary: temporary.write_text("whole"))
    assert path.read_text() == "whole"


def test_the_file_has_the_permissions_of_an_ordinary_one(tmp_path: Path) -> None:
    """mkstemp makes files that only their owner reads; a result is for whom the umask says."""
    mask = os.umask(0o027)
    try:
        write_atomically(tmp_path / "record.json", lambda temporary: temporary.write_text("whole"))
        assert os.umask(0o027) == 0o027, "the umask itself is as it was"
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "record.json").stat().st_mode) == 0o640
