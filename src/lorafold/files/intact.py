"""Check that files which lorafold wrote are unchanged before they are read.

    manifest.json       {"files": {name: {"sha256": ..., "size": ...}}}, which `atomic` writes last

Code that reads weights, configs, records or tokenizers checks exactly the files that it is about to
read; other files in the directory do not matter. A directory without a manifest, or with that of
another program, is read without a check. A file is hashed each time it is read, as it streams from
the disk.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lorafold.errors import LorafoldError, as_one
from lorafold.files.atomic import MANIFEST, compare, on_disk


def check_intact(directory: str | Path, patterns: Sequence[str]) -> None:
    """Raise LorafoldError unless the files that match a pattern are as lorafold wrote them."""
    try:
        manifest = (Path(directory) / MANIFEST).read_bytes()
    except FileNotFoundError:
        return
    except OSError:
        manifest = b""  # which is compared as one that can't be read
    if is_ours(manifest):
        check(directory, compare(manifest, patterns, partial(on_disk, Path(directory))))


def check(directory: str | Path, problems: Sequence[str]) -> None:
    """Raise LorafoldError if a comparison with the manifest found problems."""
    if problems:
        raise LorafoldError(
            f"{directory}: {as_one(problems)}: damaged, or changed by hand; restore it, or"
            f" delete {MANIFEST} if you changed it yourself"
        )


def is_ours(manifest: bytes | bytearray) -> bool:
    """Whether lorafold wrote this manifest, readable or not; other programs' have no "files"."""
    try:
        found = json.loads(manifest)
    except ValueError:
        return True
    return not isinstance(found, dict) or "files" in found
