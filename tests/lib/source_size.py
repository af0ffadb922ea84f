"""How large the source is, and how large it may be by `tests/house/budget.toml`."""

import ast
import re
import tomllib
from pathlib import Path

FILE = Path(__file__).parents[1] / "house" / "budget.toml"
BUDGET = tomllib.loads(FILE.read_text(encoding="utf-8"))
LINES_A_FILE, LINES_A_FUNCTION = 150, 100
STATEMENTS_A_LINE, NODES_A_LINE = 0.75, 10  # the source's own
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def limit(name: str) -> int:
    """A limit, with what issues have spent of their allowances."""
    spent = BUDGET.get("spent", ())
    lines = sum(one["lines"] for one in spent)
    more = {
        "code_lines": lines, "files": lines // LINES_A_FILE,
        "statements": int(
            sum(one.get("statements", STATEMENTS_A_LINE * one["lines"]) for one in spent)
        ),
        "nodes": sum(one.get("nodes", NODES_A_LINE * one["lines"]) for one in spent),
        "functions_of_a_train_request": lines // LINES_A_FUNCTION,
    }  # fmt: skip
    return int(BUDGET["limits"][name]) + more.get(name, 0)


def docstrings(tree: ast.AST) -> list[ast.stmt]:
    nodes = (node for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
    return [node.body[0] for node in nodes if ast.get_docstring(node, clean=False) is not None]


def python_lines(text: str) -> int:
    prose = {
        line
        for one in docstrings(ast.parse(text))
        for line in range(one.lineno, (one.end_lineno or one.lineno) + 1)
    }
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in prose
        for number, line in enumerate(text.splitlines(), 1)
    )


def cpp_lines(text: str) -> int:
    without = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return sum(
        bool(line.strip()) and not line.strip().startswith("//") for line in without.splitlines()
    )
