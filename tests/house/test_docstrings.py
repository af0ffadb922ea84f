"""Every public function, method and class says what it does; tensors come with their shapes, and
more than two parameters with an `Args:` section.

`pytest tests/test_docstrings.py -k bases` is for one package. A method that overrides one of ours
is documented by the one that it overrides. A Typer `command` needs no `Args:`: its options have
help.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import lorafold

SRC = Path(lorafold.__file__).parent
FILES = [path for path in sorted(SRC.rglob("*.py")) if path.name != "__main__.py"]
PACKAGES: dict[str, list[Path]] = {}
for file in FILES:
    PACKAGES.setdefault(file.relative_to(SRC).parts[0].removesuffix(".py"), []).append(file)
# (out, r), (..., k), (*matrices, k), (k,), (); or a name with a suffix of dimensions, as in
# ids_BT; or one of these words.
SHAPE = re.compile(
    r"\(((\w|\.\.\.|\*\w)[^()]*,[^()]*)?\)|\b[a-z]\w*_[A-Z][A-Z0-9]*\b"
    r"|\bscalars?\b|\b(any|same|own) shapes?\b"
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Public(NamedTuple):
    """A public function or method: its docstring, or that of the method that it overrides, the text
    of its signature with comments, and its parameters but for self.
    """

    name: str
    docs: str
    signature: str
    parameters: list[str]
    tensors: bool
    overrides: bool


def functions(path: Path) -> Iterator[Public]:
    """The public functions of a file, and the public methods of its public classes."""
    text = path.read_text(encoding="utf-8")
    name = ".".join(path.relative_to(SRC.parent).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    for node in ast.parse(text).body:
        if isinstance(node, Function) and public(node):
            yield described(node, text, "", False)
        elif isinstance(node, ast.ClassDef) and public(node):
            ancestors = getattr(module, node.name).__mro__[1:]
            for method in node.body:
                if isinstance(method, Function) and public(method):
                    found = [vars(c)[method.name] for c in ancestors if method.name in vars(c)]
                    docs = next((d for f in found if not of_torch(f) and (d := f.__doc__)), "")
                    yield described(method, text, docs, bool(found))


def described(node: Function, text: str, inherited: str, overrides: bool) -> Public:
    lines = text.splitlines()[node.lineno - 1 : node.body[0].lineno]
    body = node.body[0].lineno - node.lineno
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    types = [ast.unparse(a.annotation) for a in given if a.annotation]
    types += [ast.unparse(node.returns)] if node.returns else []
    return Public(
        node.name,
        ast.get_docstring(node) or inherited,
        "\n".join(lines[:body]) or lines[0],
        [a.arg for a in given if a.arg not in ("self", "cls")],
        any(re.search(r"\bTensor\b", kind) for kind in types),
        overrides,
    )


def of_torch(function: object) -> bool:
    """torch's own text on a method says nothing of what ours does."""
    return getattr(function, "__module__", "").startswith("torch")


def public(node: Function | ast.ClassDef) -> bool:
    return not node.name.startswith("_")


@pytest.mark.parametrize("package", PACKAGES)
def test_all_that_is_public_says_what_it_does(package: str) -> None:
    for path in PACKAGES[package]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and public(n)]
        silent = [n.name for n in classes if not ast.get_docstring(n)]
        assert silent + [f.name for f in functions(path) if not f.docs] == [], path


@pytest.mark.parametrize("package", PACKAGES)
def test_tensors_come_with_shapes(package: str) -> None:
    for path in PACKAGES[package]:
        found = [f for f in functions(path) if f.tensors]
        assert [f.name for f in found if not SHAPE.search(shapes_in(f))] == [], path


def shapes_in(function: Public) -> str:
    """Where a shape may stand: comments of the signature, names in it, and the docstring."""
    comments = re.findall(r"#.*", function.signature)
    return "\n".join([*comments, *function.parameters, function.docs])


@pytest.mark.parametrize("package", PACKAGES)
def test_more_than_two_parameters_are_described_one_by_one(package: str) -> None:
    # the help of its options describes the parameters of a command
    options = {"command"} if package == "cli" else set()
    for path in PACKAGES[package]:
        found = [f for f in functions(path) if f.name not in options]
        many = [f for f in found if len(f.parameters) > 2 and not f.overrides]
        lacking = {f.name: [p for p in f.parameters if p not in described_in(f.docs)] for f in many}
        assert {name: missing for name, missing in lacking.items() if missing} == {}, path


def described_in(docs: str) -> set[str]:
    """The names in an `Args:` section; several may share a line, as in `batch, length: ...`."""
    section = docs.partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^\s*([\w, *]+):", section, re.MULTILINE)
    return {name.strip("* ") for names in found for name in names.split(",")}
