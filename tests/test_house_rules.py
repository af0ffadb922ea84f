"""The house rules that a machine can check: short files, arrows that point down, abstract or final
classes, an exact public surface.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorafold

SRC = Path(lorafold.__file__).parent
FILES = sorted(SRC.rglob("*.py"))

# A file may import from its own level and from those below it.
LEVELS = [
    {"errors"},
    {"core"},
    {"ops"},
    {"bases"},
    {"methods"},
    {"io"},
    {"adapter"},
    {"train", "evaluate", "generate", "merge", "inspect", "memory", "compose"},
    {"compare", "quickstart", "quickstart_task"},
    {"cli"},
    {"__init__", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def room(path: Path) -> str:
    return path.relative_to(SRC).with_suffix("").parts[0]


def imported(path: Path) -> Iterator[str]:
    """Every module that the file imports, wherever in it: `from lorafold.io import peft` counts as
    lorafold.peft.directory.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_is_something_to_check():
    assert {"core", "io", "cli"} <= {room(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_files_are_short_and_say_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    if text:
        assert ast.get_docstring(ast.parse(text)), "no docstring"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_arrows_point_down(path):
    mine = LEVEL[room(path)]
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("lorafold.")}
    up = {name for name in rooms if LEVEL.get(name, LEVEL["__init__"]) > mine}
    assert up == set()


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if room(p) in ("core", "ops")],
    ids=lambda path: str(path.relative_to(SRC)),
)
def test_core_and_ops_know_torch_alone(path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert roots & {"transformers", "bitsandbytes", "accelerate", "peft", "datasets"} == set()


def modules(*rooms: str) -> list:
    names = [
        ".".join(("lorafold", *p.relative_to(SRC).with_suffix("").parts)).removesuffix(".__init__")
        for p in FILES
        if room(p) in rooms
    ]
    return [importlib.import_module(name) for name in names]


def test_a_class_is_abstract_or_final_never_both():
    rooms = modules("core", "methods", "bases")
    classes = {
        c
        for m in rooms
        for c in vars(m).values()
        if inspect.isclass(c) and c.__module__ == m.__name__
    }
    bases = {base for c in classes for base in c.__mro__[1:] if base in classes}
    assert classes
    assert sorted(base.__qualname__ for base in bases if not inspect.isabstract(base)) == []


def test_the_public_surface_is_exactly_all():
    assert sorted(lorafold.__all__) == sorted(set(dir(lorafold)))
    assert [name for name in lorafold.__all__ if getattr(lorafold, name, None) is None] == []
    assert all(inspect.getdoc(getattr(lorafold, name)) for name in lorafold.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lorafold.no_such_name  # type: ignore[attr-defined]
