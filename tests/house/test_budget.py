"""The size of the source, and of the part that a train request enters, within `budget.toml`."""

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from textwrap import dedent

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


REQUEST = dedent("""
    import json, sys, threading
    from pathlib import Path
    import lorafold as lf

    model, out = sys.argv[1:]
    source = f"{Path(lf.__file__).parent}/"
    entered = set()

    def enter(frame, event, _):
        code = frame.f_code
        is_function = code.co_flags & 1 and not code.co_name.startswith("<")
        is_function = is_function and code.co_filename.endswith(".py")  # no template is one
        if event == "call" and is_function and code.co_filename.startswith(source):
            entered.add((code.co_filename.removeprefix(source), code.co_qualname))

    def train(name):
        rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"{2 * i}."} for i in range(12)]
        recipe = lf.Recipe(steps=2, batch=4, rank=4, storage="fp32", max_length=64)
        lf.train(recipe, data=rows, out=f"{out}/{name}", model=model)

    train("warm")  # so that imports, caches and compiled kernels are not counted
    threading.setprofile(enter)
    sys.setprofile(enter)
    train("counted")
    sys.setprofile(None)
    print(json.dumps(sorted(entered)))
""")


@pytest.fixture(scope="module")
def entered(tiny_model_dir, tmp_path_factory) -> list[tuple[str, str]]:
    """The functions of lorafold that a warm request enters, each with its file."""
    model, out = str(tiny_model_dir("llama")), str(tmp_path_factory.mktemp("out"))
    command = [sys.executable, "-c", REQUEST, model, out]
    # with more threads than one, those of a busy machine enter more of `runtime.processor`
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    made = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return [(file, name) for file, name in json.loads(made.stdout.splitlines()[-1])]


def test_a_train_request_enters_few_functions(entered: list[tuple[str, str]]) -> None:
    assert ("training/run.py", "train") in entered
    assert len(entered) <= limit("functions_of_a_train_request"), by_package(entered)


def test_a_train_request_enters_few_files(entered: list[tuple[str, str]]) -> None:
    files = {file for file, _ in entered}
    assert len(files) <= limit("files_of_a_train_request"), by_package(entered)


def by_package(entered: list[tuple[str, str]]) -> dict[str, tuple[int, int]]:
    packages = {Path(file).parts[0] for file, _ in entered}
    inside = {p: [e for e in entered if Path(e[0]).parts[0] == p] for p in packages}
    return {p: (len(found), len({file for file, _ in found})) for p, found in inside.items()}
