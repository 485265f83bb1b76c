"""Files as such: a path that can be read, and one that is written whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_file(path: Any) -> Path:
    """Return the path of a file that is there and not empty.

    Raises:
        ValueError: no path, a directory or a device, an empty file.
        FileNotFoundError: nothing is there.
    """
    path = _check_path(path)
    status = path.stat()
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "no regular file"
        raise ValueError(f"path must be a file: got path={str(path)!r}, which is {kind}.")
    if status.st_size == 0:
        raise ValueError(
            f"path must be a file with something in it: got path={str(path)!r}, which is empty. "
            "Write it again, or copy it again."
        )
    return path


@contextmanager
def written_whole(path: Any) -> Iterator[Path]:
    """Give a name to write to, which then takes the place of path at once.

    What was at path stays until the new file is on the disk, whatever happens before. A symbolic
    link stays one, and what it points to is replaced; a file keeps its permissions.

    Args:
        path: where the file is to be.

    Raises:
        ValueError: no path, a directory, a folder that is not there.
    """
    target = _check_path(path).resolve()
    if target.is_dir() or not target.parent.is_dir():
        reason = "is a directory" if target.is_dir() else "has no such folder"
        raise ValueError(
            f"path must name a file in a folder that is there: got path={str(path)!r}, which "
            f"{reason}."
        )
    # In the same folder: only within a file system is a replacement one step.
    temporary = target.with_name(f".tpmlp-{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        # Asked for now: safetensors puts a file of its own here, for the owner alone.
        mode = (target if target.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(target.parent)


def _check_path(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path must be a str or an os.PathLike: got path={path!r}.")
    return Path(path)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
