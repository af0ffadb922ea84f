"""The cache directory."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """The directory for files that lorafold can make again: LORAFOLD_CACHE, or `lorafold` in the
    user's cache directory.
    """
    if own := os.environ.get("LORAFOLD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorafold"
