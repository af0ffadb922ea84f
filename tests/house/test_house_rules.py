"""The house rules that a machine can check: short files, imports that point down, and classes that
are abstract or final.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterable
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lorafold
from imports import FILES, SRC, changed_elsewhere, imported, is_module, name_of, ours

# From the top down: a package imports from its own layer, without a cycle, and from those below.
LAYERS = {
    "face": ["__main__", "cli", "api", "doctor", "quickstart"],
    "serving": ["serving"],
    "results": ["fragility_study", "comparing", "composing", "exporting", "inspecting", "merging"],
    "run": ["training", "memory", "config_import", "recipe"],
    "objectives": ["objectives", "evaluation"],
    "engine": ["conversation", "generation", "engine", "training_step"],
    "inputs": ["verification", "resolve", "rewards", "data"],
    "adapters": ["adapter", "fold", "identity", "peft"],
    "models": ["models"],
    "algebra": ["kernels", "methods", "layers", "ops", "core"],
    "ground": ["files", "runtime", "foreign_options", "errors"],
}
LAYER = {package: layer for layer, packages in LAYERS.items() for package in packages}
HEIGHT = {layer: height for height, layer in enumerate(reversed(LAYERS))}


def room(path: Path) -> str:
    return path.relative_to(SRC).with_suffix("").parts[0]


@cache
def imports(path: Path, for_checkers: bool = True) -> frozenset[str]:
    return frozenset(imported(path.read_text(encoding="utf-8"), name_of(path), for_checkers))


def test_every_package_has_a_layer_and_says_what_it_is() -> None:
    assert {room(path) for path in FILES} - {"__init__"} == LAYER.keys()
    for name in LAYER:
        module = importlib.import_module(f"lorafold.{name}") if name != "__main__" else lorafold
        print(f"{LAYER[name]:<10} {name:<12} {(inspect.getdoc(module) or '').splitlines()[0]}")
        assert inspect.getdoc(module), name


def test_the_architecture_s_page_has_these_layers() -> None:
    page = (SRC.parent.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = page.partition("| layer | packages |")[2].partition("\n\n")[0].splitlines()[2:]
    shown = {}
    for row in rows:
        layer, packages = (cell.strip() for cell in row.split("|")[1:3])
        shown[layer] = [re.split(r"[/.`]", part)[0] for part in packages.split("`")[1::2]]
    assert [*shown] == [*LAYERS]
    assert shown == {k: [p for p in v if p != "__main__"] for k, v in LAYERS.items()}


def test_files_are_short_and_say_what_they_are() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in FILES}
    assert [path for path, text in texts.items() if len(text.splitlines()) > 500] == []
    assert [path for path, text in texts.items() if not ast.get_docstring(ast.parse(text))] == []


def test_imports_point_down() -> None:
    up = {name_of(path): found for path in FILES if (found := upward(name_of(path), imports(path)))}
    assert up == {}


def test_packages_of_one_layer_have_an_order() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(room(path), set()).update(packages(imports(path)) - {room(path)})
    graph.pop("__init__")
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the packages


def packages(names: Iterable[str]) -> set[str]:
    """The packages of lorafold among the names of modules."""
    inside = (ours(name) for name in names)
    return {place.partition(".")[0] for place in inside if place is not None}


def upward(name: str, imports: Iterable[str]) -> set[str]:
    """The packages that a module imports from although they lie in a layer above its own."""
    own = LAYER.get(name.partition(".")[0])
    if own is None:  # the public names, which are imported from everywhere
        return set()
    top = len(LAYERS)
    heights = {other: HEIGHT.get(LAYER.get(other, ""), top) for other in packages(imports)}
    return {other for other, height in heights.items() if height > HEIGHT[own]}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import lorafold as lf", {""}),
        ("from lorafold import train", {"train"}),
        ("def f():\n    import lorafold.api.train", {"api"}),
        ("import_module('lorafold.cli.train')", {"cli"}),
        ("importlib.import_module(f'lorafold.cli.{name}')", {"cli"}),
        ("import_module(f'{__name__}.{name}')", set()),
        ("__import__('lorafold.serving')", {"serving"}),
        ("TABLE = {'loss': 'lorafold.training.loop'}", {"training"}),
        ("if sys.platform == 'linux':\n    from lorafold.engine import row", {"engine"}),
        ("RECORD = 'lorafold.json'\nfrom lorafold.errors import LorafoldError", set()),
    ],
)
def test_no_way_to_import_is_overlooked(text: str, found: set[str]) -> None:
    assert upward("core.delta", imported(text, "core.delta")) == found


# what is imported under a name that only a run knows: the packages of others, which are examined,
# and the files beside a table, which names them in its rows
UNKNOWN = {"doctor.installation", "kernels.registry"}


def test_what_is_imported_is_written_but_for_what_tables_name() -> None:
    assert {name_of(path) for path in FILES if "?" in imports(path)} == UNKNOWN


BASES = "from lorafold.layers import LAYERS\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (BASES + "LAYERS[Mine] = Layer", ["LAYERS[Mine]"]),
        (BASES + "LAYERS.update(mine)", ["LAYERS.update"]),
        ("from lorafold.ops import lora\ndef f():\n    lora.fast = mine", ["lora.fast"]),
        (BASES + "mine[LAYERS] = LAYERS[1]", []),
    ],
)
def test_no_way_to_change_another_file_is_overlooked(text: str, found: list[str]) -> None:
    assert list(changed_elsewhere(text)) == found


def test_no_file_changes_another() -> None:
    """A table is whole in its own file: whoever reads it need not know what else was imported."""
    changes = {name_of(path): [*changed_elsewhere(path.read_text("utf-8"))] for path in FILES}
    assert {name: found for name, found in changes.items() if found} == {}


# Imports that the layers allow and this project does not: who must not know of whom, and why.
MUST_NOT: list[tuple[str, set[str], str]] = [
    ("files", {"core", "ops", "layers", "methods", "runtime"}, "a directory knows no tensors' use"),
    ("fold", {"methods"}, "folding asks every delta alike"),
    ("kernels", {"methods", "layers"}, "an operator knows shapes and dtypes"),
    ("verification", {"models", "peft", "adapter", "core"}, "what hostile files reach stays small"),
    ("data", {"core", "methods", "layers", "fold", "peft", "adapter"}, "rows become tokens alone"),
    ("training_step", {"peft", "adapter", "fold", "verification", "identity"}, "it has no files"),
    ("engine", {"data", "verification", "memory", "config_import"}, "it takes token ids"),
    ("training", {"engine", "verification", "config_import", "conversation"}, "it serves nobody"),
    ("merging", {"training", "training_step", "evaluation", "engine", "methods"}, "it only folds"),
    ("comparing", {"merging", "composing", "inspecting", "engine"}, "a study stands alone"),
    ("inspecting", {"merging", "engine"}, "a study stands alone"),
    ("composing", {"merging", "engine"}, "a study stands alone"),
    ("serving", {"training", "evaluation", "merging", "config_import"}, "it answers requests"),
    *(
        ("methods", {f"layers.{storage}"}, "a method knows no storage")
        for storage in ("bitsandbytes", "compressed", "convolution", "quantization_config")
    ),
]


@pytest.mark.parametrize(("here", "others", "why"), MUST_NOT)
def test_who_must_not_know_of_whom(here: str, others: set[str], why: str) -> None:
    for name in (here, *others):
        assert is_module(f"lorafold.{name}")
    known = {
        (name_of(path), ours(found))
        for path in FILES
        if beneath(name_of(path), here)
        for found in imports(path)
        if any(beneath(ours(found) or "", other) for other in others)
    }
    assert known == set(), why


def beneath(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Not at the call of a function either; names for type checkers alone don't count."""
    files = {name_of(path): path for path in FILES}

    def needed(path: Path) -> set[str]:
        found = set()
        for name in imports(path, for_checkers=False):
            parts = (ours(name) or "").split(".")
            whole = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
            found.add(next((m for m in whole if m in files), ""))
        return found - {"", name_of(path)}  # a package may open what lies in it by name

    graph = {name: needed(path) for name, path in files.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if room(p) in ("core", "ops")],
    ids=lambda path: str(path.relative_to(SRC)),
)
def test_core_and_ops_know_torch_alone(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert roots & {"transformers", "bitsandbytes", "accelerate", "peft", "datasets"} == set()


def test_what_serves_knows_of_the_engine_what_its_backend_says() -> None:
    """So that another engine behind the server is a file beside `serving/engine_backend.py`."""
    serving = [path for path in FILES if room(path) == "serving"]
    knowing = {name_of(p) for p in serving if any("lorafold.engine" in n for n in imports(p))}
    assert knowing == {"serving.backend", "serving.engine_backend"}
    reaching = {
        name_of(path)
        for path in serving
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "engine"
    }
    assert reaching == {"serving.engine_backend"}


def modules(*rooms: str) -> list:
    names = [name_of(path) for path in FILES if room(path) in rooms]
    return [importlib.import_module(f"lorafold.{name}") for name in names]


def test_a_class_is_abstract_or_final_never_both():
    rooms = modules("core", "methods", "layers")
    classes = {c for m in rooms for c in vars(m).values() if inspect.isclass(c)}
    classes = {c for c in classes if c.__module__ in {m.__name__ for m in rooms}}
    bases = {base for c in classes for base in c.__mro__[1:] if base in classes}
    assert classes
    assert sorted(base.__qualname__ for base in bases if not inspect.isabstract(base)) == []
