"""Caches of a test's own."""

from pathlib import Path

from lorafold.files.paths import cache_directory


def shared(cache: Path) -> Path:
    """A new cache that has the compiled operators of the one in use, which take seconds to make."""
    native = cache_directory() / "native"
    native.mkdir(parents=True, exist_ok=True)
    cache.mkdir()
    (cache / "native").symlink_to(native.resolve())
    return cache
