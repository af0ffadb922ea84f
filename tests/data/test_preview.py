"""The preview: turns and masks of the first rows, and what is found in all of them."""

from __future__ import annotations

import io
import json
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import lorafold as lf
from conversation_cases import ROWS, jsonl, said, user
from lorafold.api.arguments import as_rows, as_stream
from lorafold.cli import app
from lorafold.data import rows as reading
from lorafold.data import tokenizing
from lorafold.data.row_checks import Findings, find_problems
from lorafold.data.row_sources import AS_IS
from lorafold.data.row_store import Origins, RowPlace, Rows
from lorafold.errors import LorafoldError
from lorafold.recipe.recipe import Recipe
from lorafold.resolve import Base
from lorafold.training.inputs import RunRequest
from lorafold.training.preview import show


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
    assert "--html: requires --preview" in str(done.exception) + done.stderr


COUNTED = ("duplicates", "held_out_in_training", "empty_answers", "contradictions", "ends_lost",
           "untrained")  # fmt: skip


def asked(n: object, answer: str = "yes") -> dict[str, Any]:
    return {"prompt": f"Is {n} a number?", "completion": answer}


def pair(n: object, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": f"Is {n} a number?", "chosen": chosen, "rejected": rejected}


def judged(n: object, answer: str, label: bool) -> dict[str, Any]:
    return asked(n, answer) | {"label": label}


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    return jsonl(path, *rows)


def finding(
    base: Path, data: Any, eval_data: Any = None, html: Path | None = None, **fields: Any
) -> tuple[Findings, list[str]]:
    """What a preview finds, and the lines of it that say so."""
    console, recipe = Console(file=io.StringIO(), width=200), Recipe(**fields)
    given = as_stream if recipe.streaming else partial(as_rows, recipe=recipe)
    rows = given(data, AS_IS, None, objective=recipe.objective)
    held_out = eval_data and as_rows(eval_data, objective=recipe.objective)
    request = RunRequest(Base(base), Path("none"), recipe, rows, "rows.jsonl", held_out)
    findings = show(request, console, html=html)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for line in findings.lines:
        assert f"{line}\n" in text
    return findings, findings.lines


@pytest.fixture
def found(tiny_model_dir: Any) -> Any:
    return partial(finding, tiny_model_dir("llama"))


def counts(findings: Findings) -> dict[str, int]:
    """How many rows each finding that found something has."""
    return {name: one.count for name, one in findings.found.items() if one.count}


def test_duplicates_are_counted_and_named(found: Any, tmp_path: Path) -> None:
    first = written(tmp_path / "a.jsonl", [asked(1), asked(2), asked(1), asked(3)])
    (tmp_path / "b.jsonl").write_text(f"\n\n{json.dumps(asked(4))}\n\n{json.dumps(asked(2))}\n")
    second = str(tmp_path / "b.jsonl")
    findings, lines = found([first, second])
    assert lines == [  # b.jsonl has its row in line 5
        f"data: 2 of 6 rows are identical to an earlier row: {first}: row 3 (see row 1),"
        f" {second}: row 5 (see {first}: row 2)"
    ]
    named = [
        {"file": first, "row": 3, "as": {"file": first, "row": 1}},
        {"file": second, "row": 5, "as": {"file": first, "row": 2}},
    ]
    assert findings.as_json()["duplicates"] == {"rows": 2, "of": 6, "first": named}


def test_only_so_many_rows_are_named(found: Any) -> None:
    _, lines = found([asked(1)] * 9)
    named = ", ".join(f"row {n} (see row 1)" for n in range(2, 7))
    assert lines == [f"data: 8 of 9 rows are identical to an earlier row: {named} and 3 more"]


ORDINARY: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "one prompt, several answers": ("sft", [asked(1, "yes"), asked(1, "no"), asked(1, "maybe")]),
    "turns of one conversation": (
        "sft",
        [{"messages": [user("a"), said("b"), user("a"), said("b"), user("a"), said("b")]}],
    ),
    "a call says something": (
        "sft",
        [{"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [
            {"function": {"name": "f", "arguments": "{}"}}]}]}],
    ),
    "a turn that rows leave out": (
        "sft", [{"messages": [user("a"), said("") | {"weight": 0}, user("b"), said("c")]}],
    ),
    "another turn is trained": (
        "sft",
        [{"messages": [user("a"), said("b"), user("c"), said("d")]},
         {"messages": [user("a"), said("b") | {"weight": 0}, user("c"), said("d")]}],
    ),
    "a ranking": ("dpo", [pair(1, "a", "b"), pair(1, "b", "c"), pair(1, "a", "c")]),
    "one answer to two prompts": ("dpo", [pair(1, "a", "b"), pair(2, "b", "a")]),
    "votes on several answers": ("kto", [judged(1, "a", True), judged(1, "b", False)]),
    "pairs as judged completions": ("kto", [pair(1, "a", "b"), pair(2, "a", "b")]),
    "texts": ("sft", [{"text": "one"}, {"text": "two"}]),
    "classes": ("classify", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]),
    "rewards": ("reward", [pair(1, "a", "b"), pair(2, "a", "b")]),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_rows_raise_no_alarm(name: str, found: Any) -> None:
    objective, rows = ORDINARY[name]
    fields = {"chat_template": "tools"} if name == "a call says something" else {}
    findings, lines = found(rows, objective=objective, **fields)
    assert lines == []
    assert findings.nothing.startswith("no problems found (checked: ")
    assert findings.found["duplicates"].of == len(rows)


def test_rows_of_both_sides_are_named(found: Any, tmp_path: Path) -> None:
    train = written(tmp_path / "train.jsonl", [asked(n) for n in range(6)])
    held_out = written(tmp_path / "test.jsonl", [asked(9), asked(4), asked(4, "no")])
    findings, lines = found(train, held_out)
    assert lines == [
        "held out: 1 of 3 rows are also in the training data, so held-out results look better than"
        f" they are: {held_out}: row 2 (see {train}: row 5)"
    ]
    assert counts(findings) == {"held_out_in_training": 1}


def test_rows_of_both_sides_of_a_split_are_named_as_in_their_file(found: Any, tmp_path) -> None:
    data = written(tmp_path / "rows.jsonl", [asked(n // 2) for n in range(12)])
    findings, _ = found(data, eval_fraction=0.25)
    one = findings.found["held_out_in_training"]
    assert one.of == 3
    assert one.count + 2 * counts(findings).get("duplicates", 0) > 0
    for held_out, trained in one.first:
        assert trained is not None
        assert held_out.row != trained.row
        assert (held_out.row - 1) // 2 == (trained.row - 1) // 2  # the other of the two


def test_each_kind_of_rows_is_looked_for_in_training(found: Any) -> None:
    texts = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    for objective, rows in (
        ("classify", texts),
        ("dpo", [pair(1, "a", "b"), pair(2, "a", "b")]),
        ("kto", [judged(1, "a", True), judged(1, "b", False)]),
        ("sft", [{"text": "one"}, {"text": "two"}]),
    ):
        findings, _ = found([*rows, rows[0]], rows[1:], objective=objective)
        assert counts(findings) == {"duplicates": 1, "held_out_in_training": 1}, objective


def test_empty_answers_are_named(found: Any) -> None:
    told = ["data: 1 of 1 rows have an empty answer to train on: row 1"]
    kept = {"messages": [user("a"), said("") | {"weight": 1}]}  # as it asks for it
    several = {"messages": [user("a"), said(" \n"), user("b"), said("c")]}
    assert found([asked(1), asked(1) | {"prompt": "b"}, asked(2, "")])[1] == []
    assert found([kept])[1] == found([several])[1] == told
    assert found([several], train_on="last")[1] == []
    pairs = [pair(1, "a", "b"), pair(2, "a", ""), pair(3, "", "b"), pair(4, "c", "d")]
    for objective in ("dpo", "kto", "reward"):
        findings, lines = found(pairs, objective=objective)
        assert (findings.rows, lines) == (2, [])


def test_contradictions_are_named(found: Any) -> None:
    pairs = [pair(1, "a", "b"), pair(2, "b", "a"), pair(1, "b", "a")]
    _, lines = found(pairs, objective="dpo")
    assert lines == [
        "data: 1 of 3 rows swap the chosen and the rejected answer of an earlier row: row 3 (see"
        " row 1)"
    ]
    rows = [judged(1, "a", True), judged(1, "b", False), judged(1, "a", False)]
    _, lines = found(rows, objective="kto")
    assert lines == [
        "data: 1 of 3 rows repeat the prompt and the completion of an earlier row with the opposite"
        " label: row 3 (see row 1)"
    ]
    ranking = [pair(1, "a", "b"), pair(1, "b", "c")]  # b is judged both ways
    findings, _ = found(ranking, objective="kto")
    assert counts(findings) == {"contradictions": 1}
    texts = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "a", "label": "y"}]
    _, lines = found(texts, objective="classify")
    assert lines == [
        "data: 1 of 3 rows have the same text as an earlier row, but another label: row 3 (see"
        " row 1)"
    ]


def test_labels_of_one_kind_are_told(found: Any) -> None:
    rows = [judged(n, "a", True) for n in range(3)]
    findings, lines = found(rows, objective="kto")
    assert lines == ["data: no row has the label false (true 3)"]
    assert findings.as_json()["labels"] == {"true": 3, "false": 0}
    rows = [{"text": f"{n}", "label": "x"} for n in range(3)] + [{"text": "b", "label": "y"}]
    for seed in range(20):  # until the only row of a class is held out
        findings, lines = found(rows, objective="classify", eval_fraction=0.25, seed=seed)
        if findings.labels["y"] == 0:
            assert lines == ["data: no row has the label y (x 3)"]
            break
    else:
        pytest.fail("the row of the class y was never held out")


def test_ends_that_are_cut_off_are_named(found: Any) -> None:
    long = asked(2, "yes " * 200)
    rows = [asked(1), long, {"prompt": "no " * 200, "completion": "yes"}]
    findings, lines = found(rows, max_length=100)
    assert lines == [
        "data: 1 of 3 rows are truncated at max_length 100 and lose the end of an answer: row 2",
        "data: 1 of 3 rows are left out of training: row 3",
    ]
    assert counts(findings) == {"ends_lost": 1, "untrained": 1}
    pairs = [pair(1, "a", "b"), pair(2, "yes " * 200, "b"), pair(3, "a", "no " * 200)]
    told = "data: 2 of 3 rows are truncated at max_length 100 and lose the end of an answer: row 2,"
    told += " row 3"
    for objective in ("dpo", "kto"):
        assert found(pairs, objective=objective, max_length=100)[1] == [told]
    after = [{"messages": [user("a"), said("b"), user("c " * 200)]}]  # is no lost end
    assert found(after, max_length=60)[1] == []


def test_a_file_without_trained_turns_is_named(found: Any, tmp_path: Path) -> None:
    left = [{"messages": [user("a"), said("b") | {"weight": 0}, user(str(n))]} for n in range(3)]
    names = [
        written(tmp_path / "a.jsonl", [{"messages": [user("a"), said("b"), user("c"), said("d")]}]),
        written(tmp_path / "b.jsonl", left),
    ]
    findings, lines = found(names)
    assert lines[-1] == f"data: {names[1]}: none of its 3 assistant turns is trained on"
    assert findings.as_json()["untrained_files"] == {names[1]: 3}
    roles = {"user": {"turns": 8, "trained": 0}, "assistant": {"turns": 5, "trained": 2}}
    assert findings.as_json()["roles"] == roles
    assert findings.turns == 2  # questions in the longest conversation


def test_a_stream_says_what_was_not_looked_at(found: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", [asked(1), asked(1)])
    fields = {"streaming": True, "steps": 1, "batch": 2}
    findings, lines = found(data, **fields)
    [line] = lines
    assert line.startswith("data: rows are streamed, so lorafold does not check them for")
    assert all(findings.as_json()[name] is None for name in COUNTED)


def test_large_data_is_named_the_same_and_previewed_in_part(found, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LORAFOLD_CACHE", str(tmp_path / "cache"))
    for module in (reading, tokenizing):
        monkeypatch.setattr(module, "MAX_IN_MEMORY", 100)
    row = len(json.dumps(asked(10)))
    monkeypatch.setattr("lorafold.training.preview.MAX_CHECKED_BYTES", 20 * row)
    (tmp_path / "rows.jsonl").write_text(
        "\n" + "".join(json.dumps(asked(n % 15 + 10)) + "\n" for n in range(30))
    )
    data = str(tmp_path / "rows.jsonl")
    for _ in range(2):  # and from the cache
        findings, lines = found(data)
        assert lines[0].startswith("data: only the first rows are checked (20 to train on); a run")
        assert lines[1].startswith(
            f"data: 5 of 20 rows are identical to an earlier row: {data}: row 17 (see row 2)"
        )
    assert findings.rows == 20


def test_places_of_rows() -> None:
    origins = Origins((("a", 1, 2), ("b", 3, 1), ("a", 4, 2)))
    places = (("a", 1), ("a", 2), ("b", 3), ("a", 4), ("a", 5))
    assert origins.places(range(5)) == [RowPlace(*place) for place in places]
    some = origins.select(np.array([1, 2, 4])).select(np.array([1, 2]))
    assert some.places([0, 1]) == [RowPlace("b", 3), RowPlace("a", 5)]
    names, numbers = some.files(2)
    assert [names[n] for n in numbers] == ["b", "a"]
    assert Origins().select(np.array([3, 5])).places([1]) == [RowPlace("", 6)]


def test_the_page_has_what_was_found(found: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    found([asked(1), asked(1)], html=page)
    text = page.read_text()
    assert "1 of 2 rows are identical to an earlier row: row 2 (see row 1)" in text
    assert "<td>assistant</td><td>2</td><td>2</td>" in text
    found([asked(1), asked(2)], html=page)
    assert "no problems found (checked: duplicates" in page.read_text()


def test_rows_that_are_refused_are_named_by_their_file(found: Any, tmp_path: Path) -> None:
    first = written(tmp_path / "a.jsonl", [pair(1, "a", "b"), pair(2, "a", "b")])
    second = written(tmp_path / "b.jsonl", [pair(3, "a", "b"), pair(4, "a", "a")])
    with pytest.raises(LorafoldError, match=rf"^{second}: row 2: fields chosen and rejected"):
        found([first, second], objective="dpo")
    written(tmp_path / "b.jsonl", [pair("n " * 200, "a", "b")])
    told = rf"^data: truncation to max_length 100 .*: {second}: row 1: no trained token of a"
    with pytest.raises(LorafoldError, match=told):
        found([first, second], objective="dpo", max_length=100)


def test_examples_of_no_table_say_that_they_are_not_looked_at() -> None:
    findings = find_problems([object()], Rows.of([asked(1)]), 100)
    told = "data: the objective's examples are not in a table, so lorafold does not check them"
    assert findings.lines == [told]
    assert findings.as_json()["duplicates"] is None


@pytest.mark.usefixtures("unestimated")
def test_a_run_and_its_preview_give_the_figures(tiny_model_dir: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", [asked(1), asked(1), asked(2, ""), asked(3)])
    held_out = written(tmp_path / "test.jsonl", [asked(1), {"prompt": " ", "completion": None}])
    model = str(tiny_model_dir("llama"))
    given = ["train", "--model", model, "--data", data, "--eval-data", held_out, "--json"]
    given += ["--steps", "1", "--storage", "fp32"]
    shown = []
    for more in (["--preview"], ["--out", str(tmp_path / "out")]):
        done = CliRunner().invoke(app, [*given, *more], catch_exceptions=False)
        shown.append(json.loads(done.stdout.splitlines()[-1])["data"])
        one_line = done.stderr.replace("\n", "")
        assert f"{data}: 1 rows have an empty answer and are left out" in one_line
        assert f"; the first: {data}: row 3" in one_line
        assert f"{held_out}: 1 rows are blank and are left out" in one_line
    assert shown[0] == shown[1]
    figures = {name: shown[0][name] and shown[0][name]["rows"] for name in COUNTED}
    assert figures == {
        "duplicates": 1, "held_out_in_training": 1, "empty_answers": 0, "contradictions": None,
        "ends_lost": 0, "untrained": 0,
    }  # fmt: skip
    recipe = lf.Recipe(steps=1, storage="fp32")
    trained = lf.train(recipe, data=data, eval_data=held_out, model=model, out=tmp_path / "b")
    assert trained.data == shown[0]
