"""One thing that was looked at, and how a group of them reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lorafold.files.terminal import paragraph


@dataclass(frozen=True)
class Finding:
    """A name, what was found as text, and as a `value` for JSON where the text would be awkward.

    `problem` is a sentence on what is wrong and what to do. Something `broken` keeps lorafold from
    working; any other problem does not.
    """

    name: str
    text: str
    value: Any = None
    problem: str = ""
    broken: bool = False

    @property
    def key(self) -> str:
        """The name as a key of JSON."""
        return self.name.lower().replace("'s ", " ").replace(" ", "_")

    def as_json(self) -> Any:
        """The value, or the text where there is none."""
        return self.text if self.value is None else self.value


@dataclass(frozen=True)
class FindingGroup:
    """Findings under a title (in JSON, a key). In a `compact` group those without a problem share
    a line.
    """

    key: str
    title: str
    findings: tuple[Finding, ...]
    compact: bool = False

    def lines(self) -> Iterator[str]:
        """The group as text: its title, then a line or more for each finding."""
        yield self.title
        fine = [f for f in self.findings if self.compact and not f.problem]
        if fine:
            yield from paragraph(", ".join(f"{f.name} {f.text}" for f in fine), "  ")
        own = [f for f in self.findings if f not in fine]
        width = max((len(f.name) for f in own), default=0)
        for f in own:
            yield from paragraph(f.text, f"{'!' if f.problem else ' '} {f.name:<{width}}  ")
            if f.problem:
                yield from paragraph(f.problem, " " * (width + 4))


def looked_at(name: str, look: Callable[[], Iterable[Finding]]) -> tuple[Finding, ...]:
    """What `look` finds. Where it fails, whatever the reason, that is the finding: a broken
    installation is what this is for.
    """
    try:
        return tuple(look())
    except Exception as error:
        return (unexamined(name, error),)


def unexamined(name: str, error: Exception) -> Finding:
    """The finding that something could not be examined, and why."""
    return Finding(name, "could not be examined", problem=reason(error), broken=True)


def reason(error: BaseException) -> str:
    """The kind of an error and its first line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"
