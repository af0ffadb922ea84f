"""What lorafold wrote is read as it was written, or not at all.

    manifest.json       {"files": {name: {"sha256": ..., "size": ...}}}, which `atomic` writes last

Whatever reads weights, configs, records or tokenizers checks the files that it is about to read,
and those alone: files that were added or are not read may be what they like. A directory without a
manifest, or with one of another program, is read as it is. A file is hashed as it streams from the
disk, once for each time it is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST, verify


def check_intact(directory: str | Path, patterns: Sequence[str]) -> None:
    """LorafoldError unless the files that match a pattern are those that lorafold wrote."""
    if not _has_manifest(Path(directory)):
        return
    if problems := verify(directory, patterns):
        raise LorafoldError(
            f"{directory}: {'; '.join(problems)}: damaged, or changed by hand: restore it, or"
            f" delete {MANIFEST} if you changed it yourself"
        )


def _has_manifest(directory: Path) -> bool:
    """Is there a manifest of ours, readable or not? Other programs' are objects without files."""
    try:
        found = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return not isinstance(found, dict) or "files" in found
