"""The packages that lorafold declares in its metadata: there, in range, and able to be imported."""

from __future__ import annotations

import importlib
import logging
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lorafold.diagnosis.finding import Finding, reason

MODULES = {"pyyaml": "yaml"}  # of distributions that are imported under another name
INTEROPERATES = ("peft",)  # optional, and worth a line of its own
PURPOSES = {
    "dev": "tests and lint",
    "bench": "benchmarks beside PEFT and TRL",
    "serve": "an HTTP server",
    "rl": "rewards by schema, and of reasoning-gym",
    "docs": "the documentation as a site",
    "quantized": "further packed storages",
}


def packages(name: str = "lorafold") -> Iterator[Finding]:
    """The package itself, Python, and everything that is required, each with its declared range."""
    own = distribution(name)
    place = Path(__file__).parents[1]
    yield Finding(name, own.version, {"version": own.version, "path": str(place)})
    yield _python((own.metadata.get_all("Requires-Python") or [""])[0])
    for requirement in _requirements(name):
        if not _extras_of(requirement) and _applies(requirement):
            yield check(requirement, required=True)
    optional = {r.name: r for r in _requirements(name) if _extras_of(r)}
    for requirement in (optional[n] for n in INTEROPERATES if n in optional):
        if _version(requirement.name) is not None:
            yield check(requirement, required=False)


def extras(name: str = "lorafold") -> Iterator[Finding]:
    """Each optional group of packages: complete, or what is missing from it."""
    for extra in distribution(name).metadata.get_all("Provides-Extra") or []:
        members = [r for r in _requirements(name) if _applies(r, extra) and not _applies(r)]
        missing = [r.name for r in members if _version(r.name) is None]
        outside = [r.name for r in members if r.name not in missing and not _in_range(r)]
        purpose = PURPOSES.get(extra, ", ".join(r.name for r in members))
        install = f"pip install '{name}[{extra}]'"
        text = f"{purpose}: complete"
        if missing:
            text = f"{purpose}: without {', '.join(missing)}; for them: {install}"
        problem = f"outside the declared range: {', '.join(outside)}; {install}" if outside else ""
        value = {"complete": not missing and not outside, "missing": missing, "outside": outside}
        yield Finding(extra, text, value, problem)


def check(requirement: Requirement, required: bool) -> Finding:
    """Is the package there, in its range, and does it import?"""
    name, declared = requirement.name, str(requirement.specifier)
    wish = f"pip install '{name}{declared}'"
    version = _version(name)
    value = {"version": version, "declared": declared, "problem": ""}
    if version is None:
        problem, text = f"not installed; run: {wish}", "missing"
    else:
        text = version
        problem = "" if _in_range(requirement) else f"expected {declared}; run: {wish}"
        if failure := _import_failure(name):
            problem = f"it can't be imported ({failure}); run: {wish} --force-reinstall"
    broken = required and bool(problem)
    return Finding(name, text, value | {"problem": problem}, problem, broken)


def _python(declared: str) -> Finding:
    version = platform.python_version()
    fine = SpecifierSet(declared).contains(version, prereleases=True)
    problem = "" if fine else f"expected Python {declared}; install one and make a new environment"
    value = {"version": version, "declared": declared, "problem": problem}
    return Finding("Python", version, value, problem, broken=not fine)


def _requirements(name: str) -> list[Requirement]:
    return [Requirement(text) for text in distribution(name).requires or []]


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _extras_of(requirement: Requirement) -> bool:
    return requirement.marker is not None and "extra" in str(requirement.marker)


def _in_range(requirement: Requirement) -> bool:
    return requirement.specifier.contains(_version(requirement.name) or "", prereleases=True)


def _version(name: str) -> str | None:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def _import_failure(name: str) -> str:
    """Why the package can't be imported, or nothing where it can."""
    module = MODULES.get(name.lower(), name.replace("-", "_"))
    try:
        with _quiet():
            importlib.import_module(module)
    except Exception as error:  # libraries that are broken fail in every way there is
        return reason(error)
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what libraries say when they are imported."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
