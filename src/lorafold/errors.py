"""lorafold's exceptions, and helpers for their messages. Commands print a LorafoldError without a
traceback and exit with code 2.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath

WINDOWS = "lorafold runs on Linux and macOS; on Windows, install it in WSL 2"
OLD_NAMES_REMOVED_IN = "0.3"
TRANSIENT_ERRNOS = (errno.EAGAIN, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
EXITS = (SystemExit, KeyboardInterrupt)  # these end a thread; a Rust panic does not
MAX_ITEMS = 5  # shown per list in a message
MAX_SINGLE_ITEM = 320  # characters


class LorafoldError(Exception):
    """An error that the user can fix. Its message says what is wrong and, if this is known, what
    was expected or how to fix it.
    """


class RewardFailed(LorafoldError):
    """A reward function failed or returned unusable rewards, before this step changed the model."""


class NotMergeable(LorafoldError):
    """An adapter can't be merged, for example because no parameter of the base can represent its
    update, or because the weight's format can't store the merged values.
    """


class NoTarget(LorafoldError):
    """A target matches no module of the model or one that the method can't adapt, or is not a valid
    regular expression.
    """


class NoTokenizer(LorafoldError):
    """The model or adapter directory contains no tokenizer."""


class Busy(Exception):
    """The machine temporarily lacks a resource, such as CPU time. The request may be valid and can
    be retried.
    """


class Interrupted(Exception):
    """A signal stopped the run. `code` is the shell's exit code for the signal."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def is_transient(error: BaseException | None) -> bool:
    """Whether an error, or one in its chain, may be temporary: a lack of resources or a failed
    read or write.
    """
    if error is None or isinstance(error, Busy):
        return error is not None
    lacks = isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS
    return lacks or is_transient(error.__cause__ or error.__context__)


def renamed_warning(old: str, now: str) -> str:
    return f"{old} is now called {now}; lorafold {OLD_NAMES_REMOVED_IN} will no longer accept {old}"


def two_names_message(old: str, now: str) -> str:
    return f"{old}: has the same meaning as {now}, which is set too; use only {now}"


def error_location(error: BaseException) -> str:
    """The type and location of an error, without its message, which may contain private data."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return type(error).__name__
    last = frames[-1]
    file = "/".join(PurePath(last.filename).parts[-2:])
    return f"{type(error).__name__} at {file}:{last.lineno} in {last.name}"


def read_failure(error: OSError | ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return getattr(error, "strerror", None) or str(error)


def escape_unprintable(text: str) -> str:
    """The text on one line, with all non-printable characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def listed(
    items: Iterable[object], separator: str = ", ", max_chars: int = 200, count: int | None = None
) -> str:
    """The first items of a list, at most `MAX_ITEMS` and about `max_chars` characters, followed by
    the number of omitted items. Long items are truncated in the middle.
    """
    texts, shown, length = [*map(str, items)], list[str](), 0
    for item in texts[:MAX_ITEMS]:
        short = truncate_middle(item, max(max_chars, MAX_SINGLE_ITEM))
        length += len(short) + len(separator) * bool(shown)
        if shown and length > max_chars:
            break
        shown.append(short)
    more = (len(texts) if count is None else count) - len(shown)
    return separator.join(shown) + (f"{separator.rstrip(', ')} and {more:,} more" if more else "")


def join_problems(problems: Sequence[object]) -> str:
    return str(problems[0]) if len(problems) == 1 else listed(problems, "; ")


def differing_keys(a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    """The sorted keys whose values differ. A missing key counts as None."""
    return [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def changes(a: Mapping[str, object], b: Mapping[str, object], name: str = "") -> Iterator[str]:
    """`NAME: was OLD, now NEW` for each differing key, also of mappings in these."""
    for key in differing_keys(a, b):
        old, new = a.get(key), b.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changes(old, new, f"{name}{key}.")
        else:
            was, now = (truncate_middle(repr(value), 80) for value in (old, new))
            yield f"{name}{key}: was {was}, now {now}"


def truncate_middle(text: str, max_chars: int) -> str:
    """The text, shortened in the middle to at most `max_chars` characters."""
    if len(text) <= max_chars:
        return text
    before = (max_chars - 5) // 2
    return f"{text[:before]} ... {text[len(text) - (max_chars - 5 - before):]}"


def truncate(text: str, max_chars: int) -> str:
    """The first `max_chars` characters of the text, and the number of omitted characters."""
    more = len(text) - max_chars
    return text if more <= 0 else f"{text[:max_chars]} ... and {more:,} more characters"
