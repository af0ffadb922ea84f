"""What a file of lorafold imports, by every way in which Python can be asked to."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import lorafold

SRC = Path(lorafold.__file__).parent
FILES = sorted(SRC.rglob("*.py"))
ASKS = {"import_module", "__import__"}
CHANGES = {"update", "setdefault", "append", "extend", "insert", "add", "register"}


def name_of(path: Path) -> str:
    """A module's name within lorafold; that of the face is `__init__`."""
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


def ours(name: str) -> str | None:
    """A module's name within lorafold, which is "" for all of it, or None if it lies elsewhere."""
    first, _, rest = name.partition(".")
    return rest if first == "lorafold" else None


def imported(text: str, own: str, for_checkers: bool = True) -> Iterator[str]:
    """Every module that a file imports, wherever in it; `own` is the file's name within lorafold.

    Names that are computed count as far as they are known: `import_module(f"lorafold.cli.{name}")`
    as lorafold.cli, and `import_module(name)` as `?`. So does a text that is a module's name.
    """
    for node in within(ast.parse(text), for_checkers):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{own}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and called(node.func) in ASKS:
            yield asked(node.args[0], own)
        elif isinstance(node, ast.Constant) and is_module(node.value):
            yield node.value


def called(function: ast.expr) -> str:
    """The last part of a function's name."""
    return str(getattr(function, "attr", getattr(function, "id", "")))


def is_module(value: object) -> bool:
    """Is a value the name of a module or package of lorafold?"""
    if not isinstance(value, str) or not re.fullmatch(r"lorafold(\.\w+)+", value):
        return False
    place = SRC.parent.joinpath(*value.split("."))
    return place.is_dir() or place.with_suffix(".py").exists()


def within(node: ast.AST, for_checkers: bool) -> Iterator[ast.AST]:
    """All that stands in a node, without what is under TYPE_CHECKING where that is asked."""
    for child in ast.iter_child_nodes(node):
        skipped = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not skipped or for_checkers:
            yield child
            yield from within(child, for_checkers)


def asked(name: ast.expr, own: str) -> str:
    """The module of a call that imports, or the package that it is in, as far as it is written."""
    if isinstance(name, ast.Constant):
        return str(name.value)
    start = ""
    for part in name.values if isinstance(name, ast.JoinedStr) else []:
        if isinstance(part, ast.Constant):
            start += str(part.value)
        elif isinstance(part, ast.FormattedValue) and ast.unparse(part.value) == "__name__":
            start += f"lorafold.{own}"
        else:
            break
    return start.rpartition(".")[0] or "?"


def changed_elsewhere(text: str) -> Iterator[str]:
    """What a file changes of modules that it imports from lorafold: a row of theirs or an attribute
    that it sets, wherever in it, and a table of theirs that it fills when it is imported itself.
    """
    tree = ast.parse(text)
    theirs = {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lorafold")
        for alias in node.names
    }
    changed: list[ast.expr | None] = []
    for node in ast.walk(tree):
        changed += getattr(node, "targets", [getattr(node, "target", None)])
    for node in tree.body:
        function = getattr(getattr(node, "value", None), "func", None)
        if isinstance(function, ast.Attribute) and function.attr in CHANGES:
            changed.append(function)
    for target in changed:
        if isinstance(target, ast.Attribute | ast.Subscript) and root(target) in theirs:
            yield ast.unparse(target)


def root(node: ast.expr) -> str:
    """The name that an attribute of an attribute, or a row of a row, begins with."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return ast.unparse(node)
