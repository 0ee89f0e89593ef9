"""What the operating system refuses when a folder is written, said with what to do about it."""

__all__ = ["os_errors_named"]

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import RunFolderError

_ELSEWHERE = "give another folder with --out"
_WRITABLE = "give a writable folder with --out"
_MESSAGES = {
    errno.EROFS: ("the file system is read-only", _WRITABLE),
    errno.EACCES: ("no permission to write", _WRITABLE),
    errno.EPERM: ("no permission to write", _WRITABLE),
    errno.ENOENT: ("the folder cannot be made there", _ELSEWHERE),
    errno.ENOTDIR: ("a part of the path is a file", _ELSEWHERE),
    errno.EEXIST: ("there is a file of that name", _ELSEWHERE),
}
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


@contextmanager
def os_errors_named(folder: Path, *, again: str = "run the same command again") -> Iterator[None]:
    """Turns what the operating system refuses inside the block into an error that says what to do.

    Args:
        folder: The folder that is written, named where the error itself names no file.
        again: What to do once there is space.

    Raises:
        RunFolderError: The folder cannot be made or written, or the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            what, hint = _FULL[error.errno], f"free some space and {again}"
        elif error.errno in _MESSAGES:
            what, hint = _MESSAGES[error.errno]
        else:
            raise
        raise RunFolderError(f"{error.filename or folder}: {what}", hint=hint) from error
