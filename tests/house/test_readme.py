"""The README: short, and its examples run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lorafold.cli import COMMANDS
from lorafold.methods import METHODS

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")
LINKS = re.findall(r"\]\(([^)#]+)", TEXT)


def test_it_is_short() -> None:
    assert len(TEXT.split()) <= 700


def test_it_names_every_method_and_every_command() -> None:
    named = set(re.findall(r"`([a-z0-9-]+)`", TEXT))
    named |= set(re.findall(r"lorafold ([a-z]+)", TEXT))
    assert set(METHODS) <= named
    assert set(COMMANDS) <= named


def test_it_names_the_methods_that_do_not_run_everywhere() -> None:
    sentence = re.search(r"^Each runs on .*?\n\n", TEXT, re.DOTALL | re.MULTILINE)
    specs = {name: make() for name, make in METHODS.items()}
    odd = {n for n, s in specs.items() if s.trains_base or s.head_alone}
    assert sentence is not None
    assert set(re.findall(r"`([a-z-]+)`", sentence[0])) == odd


@pytest.mark.parametrize("link", LINKS)
def test_its_links_lead_somewhere(link: str) -> None:
    assert (README.parent / link).exists()


@pytest.mark.slow
def test_its_python_examples_run(tmp_path: Path) -> None:
    program = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "exact match" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter", "merged", "mine"}
