"""The tests lie by folder, with helpers in `lib`, and no test imports another."""

import ast
import re
from pathlib import Path

from budgets import BUDGETS

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("*.py"))
IMPORT = re.compile(r"\b(?:from|import)\s+test_\w+")
HERE = Path(__file__).name


def test_every_test_lies_in_a_folder_with_a_budget_that_the_page_names() -> None:
    found = {str(path.parent.relative_to(TESTS)) for path in TESTS.rglob("test_*.py")}
    assert found == set(BUDGETS)
    page = (TESTS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.partition("| `tests/` |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == found


def test_no_test_imports_a_test() -> None:
    assert importing("from test_x import y") == ["from test_x"]
    assert importing("SCRIPT = 'import sys; import test_x'") == ["import test_x"]
    texts = {path.name: path.read_text(encoding="utf-8") for path in FILES if path.name != HERE}
    assert {name: found for name, text in texts.items() if (found := importing(text))} == {}


def importing(text: str) -> list[str]:
    nodes = list(ast.walk(ast.parse(text)))
    code = [ast.unparse(n) for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    scripts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [found for piece in (*code, *scripts) for found in IMPORT.findall(piece)]


def test_no_name_is_taken_twice() -> None:
    """Helpers, and files of tests, are imported by their bare names."""
    names = [path.stem for path in FILES if path.parent.parent == TESTS]
    assert len(names) == len(set(names))
