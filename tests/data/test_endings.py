"""A turn is trained with the token that ends it, and generation stops at that token."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import lorafold as lf
from conversation_cases import trained_texts
from families import embedded
from lorafold.data.chat_template import template_of
from lorafold.data.examples import NO_LOSS, encode_row
from lorafold.data.render import Rendering
from lorafold.generation import end_tokens
from template_cases import CASES, EOS, tokenizer_of

ROW = {
    "messages": [
        {"role": "user", "content": "How is Rome?"},
        {"role": "assistant", "content": "It is warm."},
        {"role": "user", "content": "And Oslo?"},
        {"role": "assistant", "content": "I do not know."},
    ]
}


def trained(row: dict[str, Any], tokenizer: Any, **how: Any) -> list[str]:
    return trained_texts(encode_row(row, tokenizer, Rendering(**how))[0], tokenizer)


@pytest.mark.parametrize("name", CASES)
def test_every_turn_is_trained_with_its_end(name: str) -> None:
    case, tokenizer = CASES[name], tokenizer_of(CASES[name])
    said = ["It is warm." + case.end, "I do not know." + case.end]
    assert sorted(trained(ROW, tokenizer)) == sorted(said)
    [last] = tokenizer(case.end, add_special_tokens=False).input_ids[-1:]
    assert last in template_of(tokenizer).ending.tokens


@pytest.mark.parametrize("name", ["glm", "apertus", "falcon-instruct"])
def test_none_leaves_out_an_end_that_the_template_does_not_write(name: str) -> None:
    tokenizer = tokenizer_of(CASES[name])
    texts = trained(ROW, tokenizer, end_of_turn="none")
    assert sorted(texts) == ["I do not know.", "It is warm."]
    assert trained(ROW, tokenizer_of(CASES["chatml"]), end_of_turn="none") == [
        "It is warm.<|im_end|>", "I do not know.<|im_end|>",
    ]  # fmt: skip


def test_the_ids_before_a_turn_are_those_of_generation() -> None:
    for case in CASES.values():
        tokenizer = tokenizer_of(case)
        prompts = [
            tokenizer.apply_chat_template(
                ROW["messages"][:n], add_generation_prompt=True, tokenize=True, return_dict=False
            )
            for n in (1, 3)
        ]
        starts = []
        for example in encode_row(ROW, tokenizer)[0]:
            labels = example.labels
            starts += [
                list(example.ids[:t])
                for t in range(1, len(labels))
                if labels[t] != NO_LOSS and labels[t - 1] == NO_LOSS
            ]
        assert sorted(map(len, starts)) == sorted(map(len, prompts))
        assert all(start in prompts for start in starts)


def test_generation_stops_where_a_turn_ended(tiny_model) -> None:
    model = tiny_model("llama")
    for name, case in CASES.items():
        tokenizer = tokenizer_of(case)
        [last] = tokenizer(case.end, add_special_tokens=False).input_ids[-1:]
        assert last in end_tokens(model, tokenizer), name


THINKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|a|>' }}"
    "{% if m.reasoning_content %}{{ OPEN + m.reasoning_content + CLOSE }}{% else %}{{ PLAIN }}"
    "{% endif %}{{ m.content + '<|e|>' }}{% else %}{{ '<|u|>' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|a|>' + PROMPT }}{% endif %}"
)


@pytest.mark.parametrize(
    ("parts", "plain", "thinking"),
    [
        # the closing alone where nothing was thought
        (("<think>", "</think>", "</think>", "<think>"), "</think>", "Easy.</think>"),
        # a block that is called otherwise
        (("<|S|>", "<|E|>", "", "<|S|>"), "<|E|>", "Easy.<|E|>"),
        # a block on lines of its own, which the prompt opens
        (("<r>\n", "\n</r>\n\n", "", "<r>\n"), "\n</r>\n\n", "Easy.\n</r>\n\n"),
        # an empty block in the prompt, of two tokens that are no pair of tags
        (("<|S|>thought\n", "<|E|>", "", "<|S|>thought\n<|E|>"), "", ""),
    ],
)
def test_a_block_of_reasoning_is_found_whatever_it_is_called(parts, plain, thinking) -> None:
    text = THINKS
    for name, part in zip(("OPEN", "CLOSE", "PLAIN", "PROMPT"), parts, strict=True):
        text = text.replace(name, json.dumps(part))
    tokenizer = copy.deepcopy(embedded())
    specials = ["<|a|>", "<|u|>", "<|e|>", "<|S|>", "<|E|>"]
    tokenizer.add_tokens(specials, special_tokens=True)
    tokenizer.chat_template = text
    asked = {"role": "user", "content": "How?"}
    row = {"messages": [asked, {"role": "assistant", "content": "So."}]}
    assert trained(row, tokenizer) == [f"{plain}So.<|e|>"]
    row["messages"][1]["reasoning_content"] = "Easy."
    assert trained(row, tokenizer) == [f"{thinking}So.<|e|>"]


def test_a_mark_that_begins_inside_a_token_trains_that_token() -> None:
    tokenizer = copy.deepcopy(embedded())
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'ASSISTANT:' }} "
        "{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ 'USER: ' + m.content + ' ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    row = {"messages": ROW["messages"][:2]}
    assert trained(row, tokenizer) == [f" It is warm.{EOS}"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glm", "apertus", "baichuan2", "chatqa", "two-ends"])
def test_a_model_that_was_trained_so_ends_by_itself(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    file = tmp_path / "template.jinja"
    file.write_text(case.template, encoding="utf-8")
    tokens = sorted(set(tokenizer_of(case).get_vocab()) - set(embedded().get_vocab()))
    towns = ["Rome", "Oslo", "Lima", "Cairo", "Delhi", "Paris", "Tokyo", "Quito", "Accra", "Bern"]
    rows = [
        {"prompt": f"How is {town} {when}?", "completion": f"{town} is {how} {when}."}
        for town in towns
        for when, how in zip(("today", "now", "at noon", "at night", "in May", "at dawn"),
                             ("warm", "calm", "hot", "cold", "green", "still"), strict=True)
    ]  # fmt: skip
    recipe = lf.Recipe(
        steps=40, batch=4, lr=1e-3, chat_template=str(file), new_tokens=tuple(tokens), seed=1,
        storage="fp32",
    )  # fmt: skip
    lf.train(recipe, data=rows, out=tmp_path / "it")
    asked = [row["prompt"] for row in rows[::11]]
    found = lf.generate("smollm2", asked, adapters=tmp_path / "it", max_new_tokens=24)
    assert all(len(text.split()) < 9 for text in found), found
    assert all(text.rstrip().endswith(".") for text in found), found


def test_a_turn_that_the_template_does_not_mark_has_no_trained_end() -> None:
    tokenizer = copy.deepcopy(embedded())
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'assistant' %}{{ 'USER: ' + m.content + ' BOT: ' }}"
        "{% elif loop.first or loop.index0 == 1 %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert trained(ROW, tokenizer) == [f"It is warm.{EOS}"]


def test_the_end_before_another_turn_of_the_assistant_is_one_at_which_generation_stops() -> None:
    tokenizer = tokenizer_of(CASES["glm"])
    said = [*ROW["messages"][:2], {"role": "assistant", "content": "Quite warm."}]
    texts = trained({"messages": said}, tokenizer)
    assert sorted(texts) == ["It is warm.<|user|>", "Quite warm.<|user|>"]
