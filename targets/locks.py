"""One run on a device at a time: a lock in a place that all runs of a user on this machine share.

The place may not follow HOME or XDG_STATE_HOME: two nightlies of one user with different ones would both hold the
device, and the sweep of the one would remove the files of the other.
"""

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from targets.errors import DeviceBusyError, SetupError

__all__ = ["device_lock", "lock_folder"]

# Not the temporary folder of the environment, which a job may have for itself.
_SHARED = Path("/tmp")


def lock_folder() -> Path:
    """Returns the folder of the locks: ``LAYERFOLD_LOCK_FOLDER``, else one a user below the machine's /tmp."""
    named = os.environ.get("LAYERFOLD_LOCK_FOLDER")
    if named:
        return Path(named).resolve()
    shared = _SHARED if os.access(_SHARED, os.W_OK) else Path(tempfile.gettempdir())
    return shared.resolve() / f"layerfold-locks-{os.getuid()}"


@contextmanager
def device_lock(identity: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Holds a device for this process, against every other process of this user on this machine.

    Args:
        identity: Serial or address.
        wait_s: How long to wait for another run to end, in seconds.

    Raises:
        DeviceBusyError: If another process still holds the device then.
        SetupError: If the folder of the locks is not this user's own.
    """
    folder = lock_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise SetupError(f"no lock can be kept in {folder}: {error.strerror}") from error
    # Anybody may make a folder below /tmp: one that others can write to would lock nothing.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise SetupError(f"{folder} is not this user's own folder", hint="remove it, or set LAYERFOLD_LOCK_FOLDER")
    lock = FileLock(folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.lock")
    try:
        lock.acquire(timeout=wait_s)
    except Timeout as error:
        hint = "wait for the other run to end, or raise lock_wait_s"
        raise DeviceBusyError(f"another run holds {identity}", hint=hint) from error
    try:
        yield
    finally:
        lock.release()
