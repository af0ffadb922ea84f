"""`lorafold cache`: what lorafold keeps on the disk, and how to get the room back."""

from collections.abc import Sequence
from typing import Annotated

from lorafold.api.options import Option, verb
from lorafold.cli.other_commands import Told
from lorafold.errors import LorafoldError
from lorafold.files.cache import KINDS


@verb
def cache(
    kind: Annotated[Sequence[str], Option(f"Only this kind: {', '.join(KINDS)}.")] = (),
    *,
    clear: bool = False,
) -> Told:
    """List what lorafold keeps in its cache, or clear it.

    It keeps embedded models that were unpacked (models), large training data that was checked and
    tokenized (rows, tokens), and decompositions of base weights (svd). All of it is made again
    when it is needed; a run that is using an entry keeps it until it ends. The environment
    variable LORAFOLD_CACHE names the directory.

    Args:
        clear: Remove what is listed; it is made again when needed.

    Examples:
        lorafold cache
        lorafold cache --kind tokens
        lorafold cache --kind tokens --clear
    """
    from datetime import datetime

    from lorafold.files.cache import clear as remove
    from lorafold.files.cache import entries
    from lorafold.files.paths import cache_directory

    if unknown := [name for name in kind if name not in KINDS]:
        raise LorafoldError(f"--kind {unknown[0]}: expected one of {', '.join(KINDS)}")
    found = [entry for entry in entries() if entry.kind in (kind or KINDS)]
    busy = remove(found) if clear else []
    total = sum(entry.bytes for entry in found if entry not in busy)
    lines = [
        f"{entry.kind:<8}{entry.bytes / 1e6:>10,.1f} MB"
        f"  {datetime.fromtimestamp(entry.used):%Y-%m-%d %H:%M}  {entry.path.name}"
        f"{'  stays: another process is making it' if entry in busy else ''}"
        for entry in found
    ]
    state = "removed from" if clear else "kept in"
    lines.append(f"{total / 1e6:,.1f} MB {state} {cache_directory()}")
    listed = [
        {"kind": e.kind, "path": str(e.path), "bytes": e.bytes, "used": e.used} for e in found
    ]
    result = {"directory": str(cache_directory()), "bytes": total, "cleared": clear}
    return Told({**result, "entries": listed}, "\n".join(lines))
