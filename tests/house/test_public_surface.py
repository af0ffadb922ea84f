"""`import lorafold` gives the names that type checkers see and that the page on the API has."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

import lorafold
from imports import FILES, SRC, name_of
from lorafold.methods import METHODS

# Names that the public surface has or will have, which no module may take.
RESERVED = {
    "train", "evaluate", "generate", "merge", "estimate", "inspect", "compose", "compare",
    "fragility", "load_model", "load_tokenizer", "score", "Recipe",
}  # fmt: skip


def test_no_public_name_is_a_module_and_importing_all_changes_none() -> None:
    names = {path.name.removesuffix(".py") for path in SRC.iterdir()}
    assert names & (RESERVED | set(lorafold.__all__)) == set()
    before = {name: getattr(lorafold, name) for name in lorafold.__all__}
    for path in FILES:
        if path.name != "__main__.py":
            importlib.import_module(f"lorafold.{name_of(path)}" if name_of(path) else "lorafold")
    assert {name: getattr(lorafold, name) for name in lorafold.__all__} == before


def exported(path: str) -> set[str]:
    """The names that a file imports as themselves, which a type checker takes for exports."""
    tree = ast.parse((SRC / path).read_text(encoding="utf-8"))
    aliases = [a for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names]
    return {alias.name for alias in aliases if alias.name == alias.asname}


def test_the_public_surface_is_what_type_checkers_see_and_what_the_page_on_the_api_has():
    names = sorted(lorafold.__all__)
    assert names == sorted(exported("__init__.py") | exported("methods/__init__.py"))
    docs = SRC.parents[1] / "docs"
    pages = [docs / "api.md", *sorted((docs / "api").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    shown = re.findall(r"^::: lorafold(?:\.methods\.\w+)?\.(\w+)$", text, re.MULTILINE)
    assert names == sorted(shown)
    assert all(inspect.getdoc(getattr(lorafold, name)) for name in names)
    assert lorafold.__version__ == version("lorafold")
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lorafold.no_such_name  # type: ignore[attr-defined]


def test_spec_classes_are_public_names_that_type_checkers_see():
    names = exported("methods/__init__.py")
    assert names == set(METHODS.classes)
    assert {type(make()).__name__ for make in METHODS.values()} == names


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
