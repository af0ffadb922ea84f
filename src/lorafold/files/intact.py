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
from pathlib import Path

from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST, verify


def check_intact(directory: str | Path, patterns: Sequence[str]) -> None:
    """Raise LorafoldError unless the files that match a pattern are as lorafold wrote them."""
    if not _has_manifest(Path(directory)):
        return
    if problems := verify(directory, patterns):
        raise LorafoldError(
            f"{directory}: {'; '.join(problems)}: damaged, or changed by hand; restore it, or"
            f" delete {MANIFEST} if you changed it yourself"
        )


def _has_manifest(directory: Path) -> bool:
    """Whether lorafold wrote a manifest there, readable or not; other programs' have no "files"."""
    try:
        found = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return not isinstance(found, dict) or "files" in found
