"""The whole report: groups of findings, what would be slow, and what is to be put right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lorafold.doctor.finding import Finding, FindingGroup, looked_at, unexamined
from lorafold.files.terminal import paragraph


@dataclass(frozen=True)
class DoctorReport:
    """`slow` is None where the machine could not be examined."""

    groups: tuple[FindingGroup, ...]
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


def diagnose(model: str = "smollm2", **how: Any) -> DoctorReport:
    """Look at everything: some ten seconds, most of them for importing each package.

    Args:
        model: Whose chat template is looked at.
        how: How it is opened, as fields of `resolve.base.Base`.
    """
    before = (
        FindingGroup("packages", "Packages", _found("installation", "packages"), compact=True),
        FindingGroup("optional", "Optional packages", _found("installation", "extras")),
    )
    machine, sentences = _machine()
    after = (
        FindingGroup("models", "Models and caches", _found("installation", "models")),
        FindingGroup("training", "Processes that train", _found("installation", "tuning")),
        FindingGroup("processes", "Several processes of one run", _found("hardware", "launchers")),
        FindingGroup("generating", "Completions on the processor", _found("hardware", "engine")),
        FindingGroup(
            "template",
            f"The chat template of {model}",
            _found("hardware", "template", model, **how),
        ),
    )
    return DoctorReport((*before, FindingGroup("machine", "Machine", machine), *after), sentences)


def _found(module: str, name: str, *given: Any, **how: Any) -> tuple[Finding, ...]:
    """What a function of this package finds. It is imported here, so that what is broken there is a
    finding too.
    """

    def look() -> Iterable[Finding]:
        found: Iterable[Finding] = getattr(
            import_module(f"lorafold.doctor.{module}"), name
        )(*given, **how)
        return found

    return looked_at(name, look)


def _machine() -> tuple[tuple[Finding, ...], tuple[str, ...] | None]:
    try:
        from lorafold.doctor.hardware import examine, findings, slow
        from lorafold.doctor.installation import set_threads, switched_off
        from lorafold.runtime.process_tuning import huge_pages

        hardware = examine()
        sentences = slow(hardware, huge_pages(), set_threads(), switched_off())
        return tuple(findings(hardware)), tuple(sentences)
    except Exception as error:
        return (unexamined("machine", error),), None
