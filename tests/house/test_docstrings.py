"""What users and plug-ins call has docstrings; tensors have their shapes in them everywhere, and an
`Args:` section adds to names and types. A method that overrides another has that one's docstring.
"""

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
    """A public function or method, with the docstring of the method that it overrides."""

    name: str
    docs: str
    signature: str
    kinds: dict[str, str]  # the annotation of each parameter
    tensors: bool
    overrides: bool


def functions(path: Path) -> Iterator[Public]:
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
    every = [*given, *filter(None, (node.args.vararg, node.args.kwarg))]
    types = [ast.unparse(a.annotation) for a in given if a.annotation]
    types += [ast.unparse(node.returns)] if node.returns else []
    return Public(
        node.name, ast.get_docstring(node) or inherited, "\n".join(lines[:body]) or lines[0],
        {a.arg: ast.unparse(a.annotation) if a.annotation else ""
         for a in every if a.arg not in ("self", "cls")},
        any(re.search(r"\bTensor\b", kind) for kind in types), overrides,
    )  # fmt: skip


def of_torch(function: object) -> bool:
    """torch's own text on a method says nothing of what ours does."""
    return getattr(function, "__module__", "").startswith("torch")


def public(node: Function | ast.ClassDef) -> bool:
    return not node.name.startswith("_")


# the rest of the public surface is in test_public_surface
SURFACE = ("adapter", "methods")


@pytest.mark.parametrize("package", SURFACE)
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
    return "\n".join([*comments, *function.kinds, function.docs])


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_said_of_a_parameter_is_more_than_its_name_and_type(package: str) -> None:
    for path in PACKAGES[package]:
        entries = [(f, *entry) for f in functions(path) for entry in entries_in(f.docs).items()]
        noise = [
            (f.name, names) for f, names, text in entries
            if words(text) <= words(names, *map(f.kinds.get, names.split(", ")))
        ]  # fmt: skip
        assert noise == [], path


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_said_is_of_parameters_that_there_are(package: str) -> None:
    for path in PACKAGES[package]:
        found = [f for f in functions(path) if not f.overrides]
        gone = {f.name: described_in(f.docs) - {"self", *f.kinds} for f in found}
        assert {name: names for name, names in gone.items() if names} == {}, path


IDLE = {"the", "a", "an", "its", "of", "to", "this", "that", "their", "these", "those", "one"}


def words(*texts: str | None) -> set[str]:
    """The words that say something, without a plural's s."""
    text = re.sub(r"([a-z])([A-Z])", r"\1 \2", " ".join(t or "" for t in texts))
    spaced = text.lower().replace("_", " ")
    found = re.findall(r"[a-z0-9]+", spaced)
    return {w[:-1] if w.endswith("s") and len(w) > 3 else w for w in found} - IDLE


def entries_in(docs: str) -> dict[str, str]:
    """The texts of an `Args:` section by the names, of which several may share one."""
    section = docs.partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    ([\w*][\w, *]*):(.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return {", ".join(n.strip("* ") for n in names.split(",")): text for names, text in found}


def described_in(docs: str) -> set[str]:
    return {name for names in entries_in(docs) for name in names.split(", ")}
