"""The report of `lorafold doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lorafold.doctor import Finding, FindingGroup, run_check
from lorafold.files.terminal import paragraph

# (key, title, module, function); each check imports its module, so a broken package is a finding
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
class DoctorReport:
    """The findings of all checks. `slow` is None if the machine could not be examined."""

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


def diagnose(model: str = "smollm2", **model_options: Any) -> DoctorReport:
    """Runs all checks, which takes about ten seconds, mostly for imports. Of `model`, only the chat
    template is checked; `model_options` are fields of `Base`.
    """
    groups = []
    for key, title, module, name in GROUPS:

        def check(module: str = module, name: str = name) -> Any:
            given = (model,) if name == "template" else ()
            examine = getattr(import_module(f"lorafold.doctor.{module}"), name)
            return examine(*given, **model_options if given else {})

        groups.append(
            FindingGroup(key, title.format(model), run_check(name, check), key == "packages")
        )
    try:
        slow = (*import_module("lorafold.doctor.hardware").slow_here(),)
    except Exception:  # the check of the machine reports it
        slow = None
    return DoctorReport((*groups,), slow)
