"""The preview: tools, turns and masks of the first rows, in the terminal and as a page."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from rich.console import Console
from typer.testing import CliRunner

from conversation_cases import ROWS, said, user
from lorafold.cli import app
from lorafold.errors import LorafoldError
from lorafold.recipe.recipe import Recipe
from lorafold.resolve import Base
from lorafold.training.preview import show
from lorafold.training.request import RunRequest


def previewed(
    base: Path, rows: list[dict[str, Any]], html: Path | None = None, **fields: Any
) -> str:
    console, fields = Console(file=io.StringIO(), width=200), {"max_length": 1024} | fields
    request = RunRequest(Base(base), Path("none"), Recipe(**fields), rows, "rows.jsonl")
    show(request, console, html=html)
    return console.file.getvalue()  # type: ignore[attr-defined]


class Page(HTMLParser):
    """What a page marks, its headings, and whether its tags are closed as they are opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.links = list[str](), list[str]()
        self.marked, self.headings = list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.open.append(tag)
        if tag in ("mark", "h3"):
            (self.marked if tag == "mark" else self.headings).append("")

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.open, tag
        while self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "mark":
            self.marked[-1] += data
        if self.open and self.open[-1] == "h3":
            self.headings[-1] += data


def test_tools_turns_and_masks_are_shown(tiny_model_dir: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    how: dict[str, Any] = {"chat_template": "tools", "mask_reasoning": True}
    text = previewed(tiny_model_dir("llama"), [ROWS["both"]], page, **how)
    for line in [
        "tool: get_weather(city, days) The weather of a city.",
        "user: How is Rome?",
        'assistant: thinks: A tool. | calls get_weather {"city": "Rome", "days": 2}',
        'tool: {"degrees": 21}',
        "assistant: thinks: Easy. | It is 21 degrees.",
        "user: And in Oslo?",
    ]:
        assert f"\n  {line}\n" in text
    assert "A tool.\n</think>\n\n⟦<tool_call>" in text
    assert "⟦It is 21 degrees.<|im_end|>⟧" in text
    found = Page(page.read_text(encoding="utf-8"))
    assert found.links == []  # it needs no other file
    assert found.marked[1:] == [  # the first one explains the mark
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n'
        "</tool_call><|im_end|>",
        "It is 21 degrees.<|im_end|>",
        "I do not know.<|im_end|>",
    ]
    [heading] = found.headings
    assert heading.startswith("row 1: ")
    assert heading in text


def test_texts_are_escaped_and_brackets_kept(tiny_model_dir: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    rows = [{"messages": [user("<script>alert(1)</script> ⟦a⟧"), said("<b>⟦x⟧ & y")]}]
    text = previewed(tiny_model_dir("llama"), rows, page)
    assert "<script>" not in page.read_text()
    found = Page(page.read_text(encoding="utf-8"))
    assert found.marked[1].startswith("<b>⟦x⟧ & y")
    assert "user: <script>alert(1)</script> ⟦a⟧" in text


def test_a_row_of_several_examples_and_one_that_is_cut(tiny_model_dir: Any, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}"
        "<think></think>{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    rows = [{"messages": [user("a"), said("b"), user("c"), said("d")]}]
    how: dict[str, Any] = {"chat_template": str(template)}
    text = previewed(tiny_model_dir("llama"), rows, **how)
    assert all(f"row 1, example {n} of 2: " in text for n in (1, 2))
    assert "cut at 40" in previewed(tiny_model_dir("llama"), rows, max_length=40, **how)


def test_texts_and_labels_are_shown_too(tiny_model_dir: Any, tmp_path: Path) -> None:
    text = previewed(tiny_model_dir("llama"), [{"text": "a plain text"}], tmp_path / "a.html")
    assert "row 1: " in text
    rows = [{"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"}]
    text = previewed(tiny_model_dir("llama"), rows, tmp_path / "b.html", objective="classify")
    assert "good ⟦pos⟧" in text
    assert "pos" in "".join(Page((tmp_path / "b.html").read_text()).marked)


def test_the_command_writes_the_page(tiny_model_dir: Any, tmp_path: Path) -> None:
    data, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    data.write_text(json.dumps(ROWS["plain"]) + "\n")
    asked = ["train", "--model", str(tiny_model_dir("llama")), "--data", str(data), "--out",
             str(tmp_path / "out"), "--html", str(page)]  # fmt: skip
    done = CliRunner().invoke(app, [*asked, "--preview"])
    assert done.exit_code == 0
    assert page.exists()
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, asked)
    assert isinstance(done.exception, LorafoldError) or done.exit_code == 2
    assert "--html writes the page of --preview" in str(done.exception) + done.stderr
