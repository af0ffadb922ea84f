"""The house rules that a machine can check: short files, arrows that point down, abstract or final
classes, an exact public surface.
"""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lorafold
from lorafold.methods import METHODS

SRC = Path(lorafold.__file__).parent
FILES = sorted(SRC.rglob("*.py"))

# From the top down: a package imports from the floors below its own, and no two share one.
FLOORS = [
    "__main__",
    "cli",
    "api",
    "diagnosis",
    "quickstart",
    "serving",
    "undoing",
    "comparing",
    "composing",
    "inspecting",
    "merging",
    "training",
    "memory",
    "translating",
    "recipe",
    "objectives",
    "evaluation",
    "conversation",
    "generation",
    "engine",
    "step",
    "screening",
    "data",
    "adapter",
    "fold",
    "identity",
    "peft",
    "models",
    "kernels",
    "files",
    "methods",
    "methods.parts",
    "bases",
    "ops",
    "core",
    "machine",
    "errors",
]
HEIGHT = {name: height for height, name in enumerate(reversed(FLOORS))}
# Names that the public surface has or will have, which no module may take.
RESERVED = {
    "train", "evaluate", "generate", "merge", "estimate", "inspect", "compose", "compare",
    "fragility", "load_model", "load_tokenizer", "score", "Recipe",
}  # fmt: skip


def floor(module: str) -> str:
    """The floor of a module, named as within the package: `methods.parts.bias`."""
    return max((f for f in FLOORS if f"{module}.".startswith(f"{f}.")), key=len, default=module)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


def room(path: Path) -> str:
    return path.relative_to(SRC).with_suffix("").parts[0]


def imported(path: Path, for_checkers: bool = True) -> Iterator[str]:
    """Every module that the file imports, wherever in it: `from lorafold.ops import norm` counts as
    lorafold.ops.norm. `for_checkers`: those under TYPE_CHECKING too.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not for_checkers:
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_has_a_floor_and_says_what_it_is() -> None:
    rooms = {floor(name_of(path)) for path in FILES} - {"__init__"}
    assert rooms == set(FLOORS)
    for name in FLOORS:
        module = importlib.import_module(f"lorafold.{name}") if name != "__main__" else lorafold
        print(f"{HEIGHT[name]:>2}  {name:<14} {(inspect.getdoc(module) or '').splitlines()[0]}")
        assert inspect.getdoc(module), name


def test_the_architecture_s_page_has_these_floors() -> None:
    page = (SRC.parent.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page.partition("```text\n")[2].partition("```")[0]
    shown = [line.partition(" ")[0].removesuffix(",") for line in tree.splitlines()]
    ours = [f for f in FLOORS if f not in ("__main__", "methods.parts")]
    assert [name.removesuffix("/").removesuffix(".py") for name in shown] == ours


def test_files_are_short_and_say_what_they_are() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in FILES}
    assert [path for path, text in texts.items() if len(text.splitlines()) > 300] == []
    assert [path for path, text in texts.items() if not ast.get_docstring(ast.parse(text))] == []


def test_arrows_point_down() -> None:
    up = {str(path.relative_to(SRC)): found for path in FILES if (found := upward(path))}
    assert up == {}


def upward(path: Path) -> set[str]:
    """The floors from which a file imports although they do not lie below its own."""
    own = floor(name_of(path))
    if own == "__init__":
        return set()
    floors = {floor(name.removeprefix("lorafold.")) for name in imported(path) if ours(name)}
    return {other for other in floors - {own} if HEIGHT.get(other, len(FLOORS)) >= HEIGHT[own]}


def ours(name: str) -> bool:
    return name.startswith("lorafold.")


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Not at the call of a function either; names for type checkers alone don't count."""
    files = {name_of(path): path for path in FILES}

    def beneath(path: Path) -> set[str]:
        found = set()
        for name in imported(path, for_checkers=False):
            parts = name.removeprefix("lorafold.").split(".") if ours(name) else []
            whole = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
            found |= {next((m for m in whole if m in files), "")} - {""}
        return found

    graph = {name: beneath(path) for name, path in files.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


def test_no_public_name_is_a_module_and_importing_all_changes_none() -> None:
    names = {path.name.removesuffix(".py") for path in SRC.iterdir()}
    assert names & (RESERVED | set(lorafold.__all__)) == set()
    before = {name: getattr(lorafold, name) for name in lorafold.__all__}
    for path in FILES:
        if path.name != "__main__.py":
            importlib.import_module(f"lorafold.{name_of(path)}" if name_of(path) else "lorafold")
    assert {name: getattr(lorafold, name) for name in lorafold.__all__} == before


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if room(p) in ("core", "ops")],
    ids=lambda path: str(path.relative_to(SRC)),
)
def test_core_and_ops_know_torch_alone(path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert roots & {"transformers", "bitsandbytes", "accelerate", "peft", "datasets"} == set()


def modules(*rooms: str) -> list:
    names = [name_of(path) for path in FILES if room(path) in rooms]
    return [importlib.import_module(f"lorafold.{name}") for name in names]


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


def test_spec_classes_are_public_names_that_type_checkers_see():
    """Each is imported as itself, which a checker takes for an export, in one place."""
    tree = ast.parse((SRC / "methods" / "__init__.py").read_text(encoding="utf-8"))
    aliases = [a for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names]
    exported = {alias.name for alias in aliases if alias.name == alias.asname}
    assert exported == set(METHODS.classes)
    assert exported | {"attach", "load", "only"} <= set(lorafold.__all__)
    assert {type(make()).__name__ for make in METHODS.values()} == exported


@pytest.mark.slow
def test_a_star_import_gives_the_public_names_and_only_they_load_torch():
    script = """
import sys
import lorafold
from lorafold import cli, errors
for name in ("no_such", "__wrapped__"):
    assert not hasattr(lorafold, name)
assert "torch" not in sys.modules
before = set(globals()) | {"before"}
from lorafold import *
assert set(globals()) - before == set(lorafold.__all__), set(globals()) - before
assert "torch" in sys.modules
assert LoRA is lorafold.LoRA and not hasattr(lorafold, "NoSuch")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
