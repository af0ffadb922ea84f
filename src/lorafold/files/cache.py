"""The directory for what lorafold can make again."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """Where lorafold keeps what it can make again."""
    if own := os.environ.get("LORAFOLD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorafold"
