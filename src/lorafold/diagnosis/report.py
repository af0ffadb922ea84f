"""The whole report: groups of findings, what would be slow, and what is to be put right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lorafold.diagnosis.finding import Finding, Group, looked_at, unexamined
from lorafold.files.terminal import paragraph


@dataclass(frozen=True)
class Report:
    """`slow` is None where the machine could not be examined."""

    groups: tuple[Group, ...]
    slow: tuple[str, ...] | None

    @property
    def findings(self) -> list[Finding]:
        """The findings of all groups."""
        return [f for group in self.groups for f in group.findings]

    @property
    def problems(self) -> list[str]:
        """What is wrong, a line each."""
        return [f"{f.name}: {f.problem}" for f in self.findings if f.problem]

    @property
    def broken(self) -> bool:
        """Is something that lorafold needs missing or broken?"""
        return any(f.broken for f in self.findings)

    def as_json(self) -> dict[str, Any]:
        """The report under the keys of `lorafold doctor --json`."""
        groups = {g.key: {f.key: f.as_json() for f in g.findings} for g in self.groups}
        return groups | {"slow": self.slow, "problems": self.problems, "broken": self.broken}

    def __str__(self) -> str:
        lines: list[str] = []
        for group in self.groups:
            lines += [*group.lines(), ""]
        lines.append("What would be slow here, and why")
        known = ("Nothing that lorafold knows of.",) if self.slow == () else self.slow
        for sentence in known or ("The machine could not be examined.",):
            lines += paragraph(sentence, "- ")
        return "\n".join([*lines, "", self._verdict()])

    def _verdict(self) -> str:
        if not self.problems:
            return "Nothing is wrong."
        works = "lorafold can't work like this" if self.broken else "lorafold works all the same"
        count = len(self.problems)
        what = "1 problem is" if count == 1 else f"{count} problems are"
        return f"{what} marked with ! above; {works}."


def diagnose(model: str = "smollm2", **how: Any) -> Report:
    """Look at everything: some ten seconds, most of them for importing each package.

    Args:
        model: Whose chat template is looked at.
        how: How it is opened, as fields of `opening.base.Base`.
    """
    packages, extras = looked_at("packages", _packages), looked_at("extras", _extras)
    machine, sentences = _machine()
    return Report(
        (
            Group("packages", "Packages", packages, compact=True),
            Group("optional", "Optional packages", extras),
            Group("machine", "Machine", machine),
            Group("models", "Models and caches", looked_at("models", _storage)),
            Group("training", "Processes that train", looked_at("tuning", _tuning)),
            Group("processes", "Several processes of one run", looked_at("launchers", _launchers)),
            Group("generating", "Completions on the processor", looked_at("engine", _generating)),
            Group("template", f"The chat template of {model}", _template(model, how)),
        ),
        sentences,
    )


# Each imports what it needs when it is called, so that what is broken there is a finding too.


def _packages() -> Iterable[Finding]:
    from lorafold.diagnosis.packages import packages

    return packages()


def _extras() -> Iterable[Finding]:
    from lorafold.diagnosis.packages import extras

    return extras()


def _machine() -> tuple[tuple[Finding, ...], tuple[str, ...] | None]:
    try:
        from lorafold.diagnosis.hardware import examine, findings
        from lorafold.diagnosis.slow import slow
        from lorafold.diagnosis.tuning import set_threads, switched_off
        from lorafold.machine.tuning import huge_pages

        hardware = examine()
        sentences = slow(hardware, huge_pages(), set_threads(), switched_off())
        return tuple(findings(hardware)), tuple(sentences)
    except Exception as error:
        return (unexamined("machine", error),), None


def _storage() -> Iterable[Finding]:
    from lorafold.diagnosis.storage import findings

    return findings()


def _tuning() -> Iterable[Finding]:
    from lorafold.diagnosis.tuning import findings

    return findings()


def _launchers() -> Iterable[Finding]:
    from lorafold.diagnosis.launchers import findings

    return findings()


def _template(model: str, how: Mapping[str, Any]) -> tuple[Finding, ...]:
    def look() -> Iterable[Finding]:
        from lorafold.diagnosis.template import findings
        from lorafold.opening.base import Base

        return findings(Base(model, **how))

    return looked_at("template", look)


def _generating() -> Iterable[Finding]:
    from lorafold.diagnosis.generating import findings

    return findings()
