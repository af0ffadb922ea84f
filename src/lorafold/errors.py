"""Errors that the user can put right. The command prints such a message without a traceback and
exits with code 2.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath

UNTIL = "0.3"  # the version that no longer knows old names
LISTED = 5  # items that a message lists
ALONE = 240  # characters of the first of them
# what the system may give the next time
PASSING = (errno.EAGAIN, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
STOPS = (SystemExit, KeyboardInterrupt)  # the only errors that end a thread, panics do not


class LorafoldError(Exception):
    """A request that can't be carried out. The message names the file, row, field or site, what was
    found, what was expected, and what to do.
    """


class RewardFailed(LorafoldError):
    """A reward that judged nothing, or can't be learned from; the model is as good as before."""


class NotMergeable(LorafoldError):
    """A delta without a form in weight space, or a weight that can't store the changed values."""


class NoTarget(LorafoldError):
    """Targets that match no module of a model."""


class NoTokenizer(LorafoldError):
    """A model or adapter directory without the vocabulary of a tokenizer."""


class Busy(Exception):
    """The machine lacks what a request needs for now, such as time of its processor. Nothing is
    known of what was asked then, and it can be asked again.
    """


class Interrupted(Exception):
    """A run stopped because a signal asked it to.

    `code` is the shell's exit code for the signal; the message says how to continue the run.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def check_platform() -> None:
    """Raise LorafoldError on Windows, which lacks the limits and signals of processes."""
    if sys.platform == "win32":
        raise LorafoldError("lorafold runs on Linux and macOS; on Windows, install it in WSL 2")


def passes(error: BaseException | None) -> bool:
    """Whether an error, or one that it follows from, is about what the machine lacks for now, and
    not about what was asked.
    """
    if error is None or isinstance(error, Busy):
        return error is not None
    lacks = isinstance(error, OSError) and error.errno in PASSING
    return lacks or passes(error.__cause__ or error.__context__)


def called_now(old: str, now: str) -> str:
    """The line for an old name that was used."""
    return f"{old} is called {now} now; lorafold {UNTIL} no longer takes {old}"


def both_names(old: str, now: str) -> str:
    """The line for an old name that was used beside the new one."""
    return f"{old}: found it beside {now}, which is the same; expected {now} alone"


def place(error: BaseException) -> str:
    """The type of an error and where it was raised, without its message, which may hold what should
    stay private.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return type(error).__name__
    last = frames[-1]
    file = "/".join(PurePath(last.filename).parts[-2:])
    return f"{type(error).__name__} at {file}:{last.lineno} in {last.name}"


def why_unread(error: OSError | ValueError) -> str:
    """Why a file of text can't be read, in a few words: what the system says, or that it is none.
    """
    if isinstance(error, UnicodeDecodeError):
        return "it is no text in UTF-8"
    return getattr(error, "strerror", None) or str(error)


def printable(text: str) -> str:
    """A text that is one line wherever it is shown: other characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def listed(
    items: Iterable[object], by: str = ", ", room: int = 200, count: int | None = None
) -> str:
    """The first of some items in a message, at most five and as many as there is room for, and how
    many more there are. One that is too long alone is cut in its middle, since names tell most at
    their ends.
    """
    texts, shown, length = [*map(str, items)], list[str](), 0
    for item in texts[:LISTED]:
        short = shortened(item, max(room, ALONE))
        length += len(short) + len(by) * bool(shown)
        if shown and length > room:
            break
        shown.append(short)
    more = (len(texts) if count is None else count) - len(shown)
    return by.join(shown) + (f"{by.rstrip(', ')} and {more:,} more" if more else "")


def as_one(problems: Sequence[object]) -> str:
    """One problem whole, with what to do about it, or the first of several."""
    return str(problems[0]) if len(problems) == 1 else listed(problems, "; ")


def differing(a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    """The keys, sorted, whose values differ or that only one of both has."""
    return [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters, without its middle if it is longer."""
    if len(text) <= most:
        return text
    before = (most - 5) // 2
    return f"{text[:before]} ... {text[len(text) - (most - 5 - before):]}"


def cut(text: str, most: int) -> str:
    """A text of bounded length, which says how many more characters there are."""
    more = len(text) - most
    return text if more <= 0 else f"{text[:most]} ... and {more:,} more characters"
