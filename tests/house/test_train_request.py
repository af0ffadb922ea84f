"""How much of the source one training request runs through: functions and files."""

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from source_size import limit

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
    made = subprocess.run(command, capture_output=True, text=True, check=True)
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
