"""The findings of `lorafold doctor` and its report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lorafold.files.terminal import paragraph

# key, title, module, function; the module is imported late, so that a broken package is a finding
GROUPS = (
    ("packages", "Packages", "installation", "packages"),
    ("optional", "Optional packages", "installation", "extras"),
    ("machine", "Machine", "hardware", "machine"),
    ("models", "Models and caches", "installation", "models"),
    ("training", "Training processes", "installation", "tuning"),
    ("processes", "Multi-process training", "hardware", "launchers"),
    ("generating", "Generation on the CPU", "hardware", "engine"),
    ("template", "The chat template of {}", "hardware", "template"),
)


@dataclass(frozen=True)
class Finding:
    """A checked thing: its name, the finding as text, and a `value` for JSON if the text is
    unsuitable.

    `problem` is a sentence with the problem and its solution. `broken` means that lorafold can't
    work because of it.
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
    """Findings under a title. In a `compact` group, findings without a problem share a line."""

    key: str
    title: str
    findings: tuple[Finding, ...]
    compact: bool = False

    def lines(self) -> Iterator[str]:
        yield self.title
        fine = [f for f in self.findings if self.compact and not f.problem]
        if fine:
            yield from paragraph(", ".join(f"{f.name} {f.text}" for f in fine), "  ")
        others = [f for f in self.findings if f not in fine]
        width = max((len(f.name) for f in others), default=0)
        for f in others:
            yield from paragraph(f.text, f"{'!' if f.problem else ' '} {f.name:<{width}}  ")
            yield from paragraph(f.problem, " " * (width + 4)) if f.problem else ()


def findings_of(name: str, look: Callable[[], Iterable[Finding]]) -> tuple[Finding, ...]:
    """The findings of `look`, or its failure as a finding, because doctor has to work in broken
    installations.
    """
    try:
        return tuple(look())
    except Exception as error:
        return (Finding(name, "could not be examined", problem=reason(error), broken=True),)


def reason(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


@dataclass(frozen=True)
class DoctorReport:
    """The findings; `slow` is None if the machine could not be examined."""

    groups: tuple[FindingGroup, ...]
    slow: tuple[str, ...] | None

    @property
    def findings(self) -> list[Finding]:
        return [f for group in self.groups for f in group.findings]

    @property
    def problems(self) -> list[str]:
        return [f"{f.name}: {f.problem}" for f in self.findings if f.problem]

    @property
    def broken(self) -> bool:
        return any(f.broken for f in self.findings)

    def as_json(self) -> dict[str, Any]:
        groups = {
            g.key: {f.key: f.text if f.value is None else f.value for f in g.findings}
            for g in self.groups
        }
        return groups | {"slow": self.slow, "problems": self.problems, "broken": self.broken}

    def __str__(self) -> str:
        sentences = ("The machine could not be examined.",) if self.slow is None else self.slow
        lines = [line for group in self.groups for line in (*group.lines(), "")]
        lines.append("What is slow on this machine")
        for sentence in sentences or ("No performance problems found.",):
            lines += paragraph(sentence, "- ")
        verdict, count = "No problems found.", len(self.problems)
        if count:
            what = "1 problem is" if count == 1 else f"{count} problems are"
            works = "does not work in this state" if self.broken else "still works"
            verdict = f"{what} marked with ! above; lorafold {works}."
        return "\n".join([*lines, "", verdict])


def diagnose(model: str = "smollm2", **how: Any) -> DoctorReport:
    """Run all checks, which takes about ten seconds, mostly for imports. The chat template is that
    of `model`, loaded with the fields `how` of `resolve.base.Base`.
    """
    groups = []
    for key, title, module, name in GROUPS:

        def look(module: str = module, name: str = name) -> Any:
            given = (model,) if name == "template" else ()
            examine = getattr(import_module(f"lorafold.doctor.{module}"), name)
            return examine(*given, **how if given else {})

        groups.append(
            FindingGroup(key, title.format(model), findings_of(name, look), key == "packages")
        )
    try:
        slow = (*import_module("lorafold.doctor.hardware").slow_here(),)
    except Exception:  # reported as a finding of the machine
        slow = None
    return DoctorReport((*groups,), slow)
