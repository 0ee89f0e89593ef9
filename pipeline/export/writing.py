"""Files that are either whole or absent."""

__all__ = ["replacing"]

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renames it to `path` when the block ends well.

    The temporary name keeps the suffix, since converters choose the format by it. When the block raises, or writes
    nothing, the temporary file is removed and an older file at `path` stays as it was.

    Raises:
        FileNotFoundError: The block ended well without writing the temporary file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.partial{target.suffix}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
