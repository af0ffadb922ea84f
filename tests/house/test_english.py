"""Pages and messages are in plain English: phrases that a reader has to translate are rare."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WHAT = r"(is|was|are|were|it|they|he|a|an|the|has|have|does|did|can|could|comes|goes|trains|holds)"
TURNS = {  # a turn of phrase, and how often it may stand in 1,000 words
    "what as a noun": (rf"\b[Ww]hat {WHAT}\b(?![^.\n]{{0,90}}\?)", 0.5),
    "says, tells": (r"\b(says?|said|told|tells?)\b", 0.3),
    "that of, those that": (r"\b(that|those) (of|that|which)\b", 0.3),
}
DATA = {"task.py", "gguf_metadata.py", "built_in_templates.py"}  # texts for models, not for people
ASIDE = (r"(?s)^---\n.*?\n---\n", r"(?s)```.*?```", r"(?s)<!--.*?-->", r"<[^>]+>", r"(?m)^\|.*$")


def prose(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    for pattern in ASIDE:
        text = re.sub(pattern, "", text)
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "X", text))


def messages(file: Path) -> Iterator[str]:
    """The texts of a module that are not docstrings, f-strings with X for their values."""
    tree, seen = ast.parse(file.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        first = getattr(node, "body", None)
        if isinstance(first, list) and first and isinstance(first[0], ast.Expr):
            seen.add(first[0].value)
        if isinstance(node, ast.JoinedStr):
            seen |= {*node.values}
            yield "".join(p.value if isinstance(p, ast.Constant) else "X" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in seen:
            yield node.value


def texts(kind: str) -> str:
    if kind == "pages":
        return "\n".join(map(prose, [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]))
    files = [file for file in (ROOT / "src").rglob("*.py") if file.name not in DATA]
    every = (text for file in files for text in messages(file))
    return "\n".join(text for text in every if len(text.split()) > 3)


@pytest.mark.parametrize("kind", ["pages", "messages"])
@pytest.mark.parametrize("turn", TURNS)
def test_it_is_plain(kind: str, turn: str) -> None:
    text, (pattern, most) = texts(kind), TURNS[turn]
    found = [match[0] for match in re.finditer(pattern, text)]
    assert len(found) <= most * len(text.split()) / 1000, found
