"""Which files a directory or a pattern such as `data/*.jsonl` stands for, and which it leaves out.

Files are taken in the order of their names, with numbers by size: part-2 comes before part-10. If
names say that files are of the split `train`, those of other splits are left out, as hubs have
them: `train` and the like are whole words of a file's name or of a folder's.
"""

import re
from collections.abc import Iterable
from glob import glob, has_magic
from pathlib import Path
from typing import NamedTuple

from lorafold.data.readers import KINDS, kind_of_file
from lorafold.errors import LorafoldError, listed

SHOWN = 10  # files that one line names
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
ABOUT = ("dataset_info.json", "dataset_infos.json")  # which `datasets` writes beside rows


class Files(NamedTuple):
    """The files of rows, and the reasons why others, by name, are none of them."""

    paths: list[Path]
    left_out: dict[str, str]

    def __str__(self) -> str:
        """What is left out, and why; empty for nothing."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        return "; ".join(f"{shown(names)} ({reason})" for reason, names in by_reason.items())


def is_pattern(name: str) -> bool:
    """Whether a name stands for all files that match it."""
    return has_magic(name) and not Path(name).exists()


def files_of(name: str) -> Files:
    """The files of rows that a directory or a pattern stands for.

    Raises LorafoldError if there is none, and for splits of which none is for training.
    """
    directory, matched = Path(name), is_pattern(name)
    if matched:
        names = {Path(path): path for path in glob(name, recursive=True)}
    else:
        names = {path: path.relative_to(directory).as_posix() for path in directory.rglob("*")}
        # of what is hidden, such as .git, only rows are worth a word
        names = {p: n for p, n in names.items() if not _hidden(n) or kind_of_file(p)}
    paths, left_out = list[Path](), dict[str, str]()
    if matched and "**" not in name:
        left_out = {n: "a directory" for path, n in names.items() if path.is_dir()}
    for path in sorted(filter(Path.is_file, names), key=_natural):
        if reason := _reason(path, "" if matched else names[path]):
            left_out[names[path]] = reason
        else:
            paths.append(path)
    if not matched:
        paths, others = _for_training(name, {path: names[path] for path in paths})
        left_out |= others
    if not paths:
        beside = f" ({Files([], left_out)})" if left_out else ""
        what = "no file that matches" if matched else "no file of rows"
        raise LorafoldError(f"{name}: found {what}{beside}, expected {KINDS}")
    return Files(paths, left_out)


def shown(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    first = list(names)
    more = f" and {len(first) - SHOWN:,} more" if len(first) > SHOWN else ""
    return ", ".join(first[:SHOWN]) + more


def _reason(path: Path, name: str) -> str:
    """Why a file of this name within a directory is none of rows; empty if it may be one."""
    if _hidden(name):
        return "hidden"
    if path.name in ABOUT:
        return "about a dataset"
    return "" if kind_of_file(path) else "of no kind that is read"


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__")) for part in name.split("/"))


def _for_training(name: str, files: dict[Path, str]) -> tuple[list[Path], dict[str, str]]:
    """(the files to train on, the others with the reason)."""
    splits = {path: _split(file) for path, file in files.items()}
    if "train" not in splits.values():
        known = sorted(set(splits.values()))
        if len(known) > 1 and "" not in known:
            raise LorafoldError(
                f"{name}: found the splits {listed(known)}; expected only one, or one named"
                f" train; a pattern such as {Path(name) / f'*{known[0]}*'} takes one"
            )
        return list(files), {}
    taken = [path for path, split in splits.items() if split in ("train", "")]
    reason = "of another split; name a file to take it"
    return taken, {files[path]: reason for path in files if path not in taken}


def _split(name: str) -> str:
    """The split that a path within a directory names: train, validation, test, or none."""
    found = [SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS]
    return "train" if "train" in found else (found or [""])[0]


def _natural(path: Path) -> tuple[list[str | int], str]:
    """By which paths are sorted: text without case, and numbers by size."""
    pieces = re.split(r"([0-9]+)", path.as_posix().casefold())
    return [int(p) if n % 2 else p for n, p in enumerate(pieces)], str(path)
