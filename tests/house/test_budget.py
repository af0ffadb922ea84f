"""The size of the source, within `budget.toml`. Other tests measure what a train request enters,
and options that are declared twice.
"""

import ast
from collections import Counter
from pathlib import Path

import pytest

import lorafold
from source_size import BUDGET, cpp_lines, docstrings, limit, python_lines

SRC = Path(lorafold.__file__).parent


@pytest.fixture(scope="module")
def size() -> dict[str, int]:
    python = {path: path.read_text(encoding="utf-8") for path in SRC.rglob("*.py")}
    cpp = [p.read_text(encoding="utf-8") for p in SRC.rglob("*") if p.suffix in (".cpp", ".h")]
    trees = [ast.parse(text) for text in python.values()]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    classes = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
    return {
        "code_lines": sum(map(python_lines, python.values())) + sum(map(cpp_lines, cpp)),
        "statements": sum(isinstance(node, ast.stmt) for node in nodes)
        - sum(len(docstrings(tree)) for tree in trees),
        "nodes": len(nodes),
        "files": len(python),
        "class_names_used_twice": sum(count > 1 for count in classes.values()),
    }


@pytest.mark.parametrize(
    "name", ["code_lines", "statements", "nodes", "files", "class_names_used_twice"]
)
def test_the_source_is_within_its_budget(name: str, size: dict[str, int]) -> None:
    assert size[name] <= limit(name)


def test_nobody_spends_more_than_an_issue_allows() -> None:
    spent: Counter[int] = Counter()
    allowed: dict[int, int] = {}
    for one in BUDGET.get("spent", ()):
        assert one["lines"] >= 0
        assert one["on"]
        assert allowed.setdefault(one["issue"], one["allowance"]) == one["allowance"]
        spent[one["issue"]] += one["lines"]
    assert {issue: n for issue, n in spent.items() if n > allowed[issue]} == {}


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('"""A module."""\n\nx = 1  # one\n# two\n', 1),
        ('def f():\n    """Text\n\n    on lines.\n    """\n    return """\n# none\n"""\n', 3),
    ],
)
def test_lines_of_python_are_those_of_code(text: str, lines: int) -> None:
    assert python_lines(text) == lines


def test_lines_of_cpp_are_those_of_code() -> None:
    assert cpp_lines("// one\n/* two\n   three */\nint x;  // four\n\n}\n") == 2
