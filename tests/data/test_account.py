"""Training reports what a chat template drops, adds by itself, and which date it asks for."""

from __future__ import annotations

import copy
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from conversation_cases import WEATHER, said, user
from families import embedded
from families import tokenizer_of as family
from lorafold.data.chat_template import date_used, with_date
from lorafold.data.examples import encode, encode_row, tokenizer_identity
from lorafold.data.row_checks import describe_template
from lorafold.doctor.hardware import template as looked_at
from lorafold.errors import LorafoldError
from lorafold.training.checkpoint import RunDirectory
from lorafold.training.setup import set_up
from template_cases import CASES, tokenizer_of
from training_cases import quiet, request

ASKED = user("Rome and Oslo?")
RESULT = {"role": "tool", "content": "Oslo: 3", "tool_call_id": "call0002"}


def call(city: str, number: int = 1, name: str = "get_weather") -> dict[str, Any]:
    function = {"name": name, "arguments": {"city": city}}
    return {"id": f"call000{number}", "type": "function", "function": function}


def with_template(text: str) -> Any:
    made = copy.deepcopy(embedded())
    made.chat_template = text
    return made


def template(shown: str) -> Any:
    """A tokenizer whose template shows of a turn with calls what the expression gives."""
    return with_template(
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.tool_calls %}" + shown + "{% else %}{{ m.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


FIRST = "{{ m.tool_calls[0].function | tojson }}"
EACH = "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
BY_ID = "{% for c in m.tool_calls %}{{ c.id + (c.function.arguments | tojson) }}{% endfor %}"


@pytest.mark.parametrize(
    ("shown", "part"),
    [(FIRST, r"messages\[1\].tool_calls\[1\].name"), (BY_ID, "does not render tool calls")],
)
def test_what_is_lost_of_a_call_is_not_found_in_another_turn(shown: str, part: str) -> None:
    """The result and the answer have the name and the town that the second call lacks."""
    turn = {"role": "assistant", "content": None, "tool_calls": [call("Rome"), call("Oslo", 2)]}
    answer = said("get_weather says Oslo has 3 degrees in the city.")
    row = {"messages": [ASKED, turn, RESULT, answer], "tools": [WEATHER]}
    with pytest.raises(LorafoldError, match=part):
        encode_row(row, template(shown))
    encode_row(row, template(EACH))


def test_what_is_said_beside_a_call_is_counted_where_it_is_left_out() -> None:
    turn = said("Let me look.") | {"tool_calls": [call("Oslo", 2)]}
    row = {"messages": [ASKED, turn, RESULT, said("Let me look. It has 3.")], "tools": [WEATHER]}
    assert encode([row], template(EACH), 512).report.reasoning_hidden == 1
    assert encode([row], template("{{ m.content }}" + EACH), 512).report.reasoning_hidden == 0


@pytest.mark.parametrize(
    ("tokenizer", "parts"),
    [
        (lambda: family("qwen3"), ["turns end with <|im_end|>"]),
        (lambda: family("deepseek_r1_distill"), ["opens a reasoning block (<think>)"]),
        (lambda: family("qwen3_5_nothink"), ["has an empty reasoning block (<think></think>)"]),
        (lambda: family("qwen2_5"), ["the default system message is 'You are Qwen"]),
        (lambda: family("llama3"), ["does not render tools, tool calls, reasoning"]),
        (lambda: family("llama3_1"), ["text next to a tool call", "a second tool call"]),
        (lambda: tokenizer_of(CASES["glm"]), ["<|user|>, which the template writes only"]),
        (lambda: tokenizer_of(CASES["minicpm"]), ["no end token: training adds <|im_end|>"]),
    ],
)
def test_one_line_says_what_a_template_does(tokenizer: Any, parts: list[str]) -> None:
    line = "; ".join(describe_template(tokenizer()).lines)
    print(line)
    assert "\n" not in line
    assert all(part in line for part in parts), line


DATED = (
    "{{ strftime_now('%d %B %Y') }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' +"
    " m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_date_is_that_of_the_rendering_and_part_of_what_ids_depend_on() -> None:
    tokenizer = copy.deepcopy(embedded())
    assert tokenizer_identity(tokenizer)["day"] == ""
    tokenizer.chat_template = DATED
    assert "the template inserts today's date" in "; ".join(describe_template(tokenizer).lines)
    row = {"prompt": "How?", "completion": "So."}
    fixed = with_date(tokenizer, "2024-02-03")
    [[example], _] = encode_row(row, fixed)
    assert tokenizer.decode(example.ids).startswith("03 February 2024")
    assert tokenizer_identity(fixed)["day"] == ""
    tokenizer.chat_template = "{% if strftime_now is defined %}" + DATED + "{% endif %}"
    assert date_used(tokenizer)
    assert not date_used(with_date(tokenizer, "2024-02-03"))
    tokenizer.chat_template = "{% set form = '%d' %}{{ strftime_now(form) }}" + DATED
    # the day of each rendering, which a run says
    assert date_used(with_date(tokenizer, "2024-02-03"))
    tokenizer.chat_template = DATED
    [[example], _] = encode_row(row, tokenizer)
    assert tokenizer.decode(example.ids).startswith(date.today().strftime("%d %B %Y"))
    assert tokenizer_identity(tokenizer)["day"] == date.today().isoformat()


class Day(date):
    """A day long ago."""

    @classmethod
    def today(cls) -> date:
        return date(2024, 2, 3)


def test_a_run_keeps_the_day_on_which_it_began(tiny_model_dir, tmp_path: Path, monkeypatch) -> None:
    file, model = tmp_path / "dated.jinja", tiny_model_dir("llama")
    file.write_text(DATED)
    recipe: dict[str, Any] = {"chat_template": str(file)}
    monkeypatch.setattr("lorafold.data.chat_template.date", Day)
    setup = set_up(request(model, tmp_path / "a", **recipe), quiet())
    began = RunDirectory(tmp_path / "a")
    began.start({"day": setup.day})
    monkeypatch.setattr("lorafold.data.chat_template.date", date)
    again = set_up(request(model, tmp_path / "a", resume=True, **recipe), quiet())
    assert setup.day == again.day == "2024-02-03"
    for run in (setup, again):
        example = next(iter(run.feed.after(0)))[0]
        assert run.tokenizer.decode(example.ids).startswith("03 February 2024")
    other = set_up(request(model, tmp_path / "b", **recipe), quiet())
    assert other.day == date.today().isoformat()


def test_doctor_says_it_of_a_model() -> None:
    [found] = looked_at("smollm2")
    assert "turns end with <|im_end|>; the default system message is" in found.text
    assert found.value["end"] == "<|im_end|>"


WORDS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if SET %}I begin to think.\n{% endif %}{% endif %}"
)


@pytest.mark.parametrize(
    ("expression", "name"),
    [("not plain", "plain=true"), ("thinking is not defined or thinking", "thinking=false"),
     ("true", None)],
)  # fmt: skip
def test_the_variable_that_lets_plain_turns_train_is_said(expression: str, name) -> None:
    wanted = "turns without reasoning are left out, because at generation they begin differently"
    found = describe_template(with_template(WORDS.replace("SET", expression)))
    wanted += f"; --template-kwargs {name} helps" if name else ""
    assert found.plain == wanted
    assert wanted in "; ".join(found.lines)
    assert describe_template(with_template(WORDS.replace("SET", "false"))).plain == ""


def test_a_template_that_refuses_plain_conversations_is_said_to() -> None:
    tokenizer = with_template("{{ raise_exception('needs functions') }}")
    assert "needs functions" in describe_template(tokenizer).plain
