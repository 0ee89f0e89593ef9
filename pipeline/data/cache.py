"""The folder where fetched data is kept between runs."""

__all__ = ["folder"]

import os
from pathlib import Path

import platformdirs


def folder(*parts: str) -> Path:
    """A place in the cache; it need not exist.

    The root is `$LAYERFOLD_CACHE` where that is set, else the user's cache folder (on Linux `~/.cache/layerfold`).
    """
    chosen = os.environ.get("LAYERFOLD_CACHE")
    root = Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("layerfold")
    return root.joinpath(*parts)
