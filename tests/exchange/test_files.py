"""Files as such: a failure here means that saving can lose what was there before."""

import os
from pathlib import Path
from typing import Any

import pytest

from tpmlp.exchange.files import check_file, written_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"old")
    return path


def test_a_file_is_replaced_when_the_new_one_is_whole(old: Path) -> None:
    with written_whole(old) as temporary:
        temporary.write_bytes(b"new")
        assert old.read_bytes() == b"old"
        assert temporary.parent == old.parent
    assert old.read_bytes() == b"new"
    assert names(old.parent) == ["weights"]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(old: Path, error: Any) -> None:
    def write() -> None:
        with written_whole(old) as temporary:
            temporary.write_bytes(b"half of the n")
            raise error

    with pytest.raises(type(error)):
        write()
    assert old.read_bytes() == b"old"
    assert names(old.parent) == ["weights"]


def test_a_replacement_that_fails_leaves_the_old_file_and_no_other(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError), written_whole(old) as temporary:
        temporary.write_bytes(b"new")
    assert old.read_bytes() == b"old"
    assert names(old.parent) == ["weights"]


def test_the_new_file_is_on_the_disk_before_it_takes_the_name(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, replace = [], Path.replace

    def sync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def move(self: Path, target: Path) -> Path:
        events.append("replace")
        return replace(self, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("asks Linux which file a descriptor is of")
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", move)
    with written_whole(old) as temporary:
        temporary.write_bytes(b"new")
    assert events == [str(temporary), "replace", str(old.parent)]


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with written_whole(tmp_path / "new") as temporary:
        # As safetensors does: another file in the place of the temporary one.
        temporary.unlink()
        temporary.touch(mode=0o600)
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_file_keeps_its_permissions(old: Path) -> None:
    old.chmod(0o640)
    with written_whole(old) as temporary:
        temporary.write_bytes(b"new")
    assert old.stat().st_mode & 0o777 == 0o640


def test_what_a_link_points_to_is_replaced_and_the_link_stays(old: Path) -> None:
    link = old.parent / "link"
    link.symlink_to(old)
    with written_whole(link) as temporary:
        temporary.write_bytes(b"new")
    assert link.is_symlink()
    assert old.read_bytes() == b"new"


@pytest.mark.parametrize("path", [None, 3, b"weights", ["weights"]])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(ValueError, match=r"path must be a str or an os\.PathLike: got path="):
        check_file(path)
    with pytest.raises(ValueError, match=r"path must be a str or an os\.PathLike: got path="):
        written_whole(path).__enter__()


def test_a_directory_is_no_place_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"path='{tmp_path}', which is a directory"):
        check_file(tmp_path)
    with pytest.raises(ValueError, match=f"path='{tmp_path}', which is a directory"):
        written_whole(tmp_path).__enter__()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"in a folder that is there: .*no/weights'"):
        written_whole(tmp_path / "no" / "weights").__enter__()


def test_a_file_that_is_not_there_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="weights"):
        check_file(tmp_path / "weights")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").touch()
    with pytest.raises(ValueError, match="weights', which is empty"):
        check_file(tmp_path / "weights")


def test_what_could_block_for_ever_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe', which is no regular file"):
        check_file(tmp_path / "pipe")
