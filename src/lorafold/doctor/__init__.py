"""`lorafold doctor`: problems and slow settings of this machine and installation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lorafold.files.terminal import paragraph


@dataclass(frozen=True)
class Finding:
    """The result of one check. `value` replaces the text in JSON. `problem` is a sentence with a
    problem and its solution; `broken` means that lorafold does not work because of the problem.
    """

    name: str
    text: str
    value: Any = None
    problem: str = ""
    broken: bool = False

    @property
    def key(self) -> str:
        return self.name.lower().replace("'s ", " ").replace(" ", "_")


@dataclass(frozen=True)
class FindingGroup:
    """Findings under a title. In a `compact` group, all findings without a problem share a line."""

    key: str
    title: str
    findings: tuple[Finding, ...]
    compact: bool = False

    def lines(self) -> Iterator[str]:
        yield self.title
        if fine := [f for f in self.findings if self.compact and not f.problem]:
            yield from paragraph(", ".join(f"{f.name} {f.text}" for f in fine), "  ")
        others = [f for f in self.findings if f not in fine]
        width = max((len(f.name) for f in others), default=0)
        for f in others:
            yield from paragraph(f.text, f"{'!' if f.problem else ' '} {f.name:<{width}}  ")
            yield from paragraph(f.problem, " " * (width + 4)) if f.problem else ()


def run_check(name: str, check: Callable[[], Iterable[Finding]]) -> tuple[Finding, ...]:
    """Runs a check. An exception is returned as a finding, because doctor has to work in broken
    installations.
    """
    try:
        return tuple(check())
    except Exception as error:
        return (Finding(name, "could not be examined", problem=reason(error), broken=True),)


def reason(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"
