"""Training sees the prompts of generation, for the chat templates of all families in `trl`."""

from __future__ import annotations

from typing import Any

import pytest

from conversation_cases import HOW, ROME, ROWS, said, starting_points, trained_texts
from families import as_taken, names, tokenizer_of
from lorafold.data import chat_template
from lorafold.data.chat_template import template_of
from lorafold.data.examples import NO_LOSS, Example, encode, encode_row
from lorafold.data.formats import format_of
from lorafold.data.render import Rendering, TrainedRenderings, render_trained
from lorafold.errors import LorafoldError

MARKING = {name for name in names() if name.endswith("_training")} | {
    "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl",
}  # fmt: skip
# What families do: examples of the row with two plain turns (2: earlier turns are rewritten, or
# have another end), with tools, with thinking, with both; "-": refused. Then how many of the turns
# with reasoning have it hidden by the template.
FAMILIES = {
    "cohere": "1 - 1 -, hidden 2",
    "cohere2": "1 - 1 -, hidden 2",
    "deepseek_r1_distill": "2 - 2 -, hidden 0",
    "deepseekv3": "2 - 2 -, hidden 0",
    "gemma3": "1 - 1 -, hidden 2",
    "gemma4": "1 1 1 2, hidden 2",
    "gemma4_v5": "1 1 2 2, hidden 0",
    "glm4moe": "1 1 2 2, hidden 0",
    "gptoss": "2 2 2 2, hidden 0",
    "lfm2": "1 - 1 -, hidden 2",
    "lfm2_2_5": "1 1 2 2, hidden 0",
    "llama3": "1 - 1 -, hidden 2",
    "llama3_1": "1 1 1 1, hidden 2",
    "muse_glimmer": "1 1 1 1, hidden 0",
    "nemotron_3_nano": "2 3 2 2, hidden 0",
    "phi3": "2 - 2 -, hidden 2",
    "qwen2_5": "1 1 1 1, hidden 2",
    "qwen3": "2 3 2 2, hidden 0",
    "qwen3_5_nothink": "2 2 2 3, hidden 2",
    "qwen3_5_think": "2 2 2 2, hidden 0",
    "qwen3_instruct_2507": "1 1 1 1, hidden 2",
    "smolvlm": "1 - 1 -, hidden 2",
}


def encoded(name: str, kind: str) -> tuple[str, list[Example], TrainedRenderings]:
    """The examples of a row, or why the family's template refuses it."""
    try:
        return "", *encode_row(ROWS[kind], tokenizer_of(name))
    except LorafoldError as error:
        return str(error), [], TrainedRenderings(())


def starts(labels: tuple[int, ...]) -> list[int]:
    """Where a run of trained tokens begins."""
    before = (NO_LOSS, *labels)
    return [t for t, label in enumerate(labels) if label != NO_LOSS and before[t] == NO_LOSS]


@pytest.mark.few(12)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", names())
def test_what_is_trained_is_what_generation_sees(name: str, kind: str) -> None:
    row, tokenizer = ROWS[kind], tokenizer_of(name)
    refused, examples, trained = encoded(name, kind)
    if refused:
        assert "\n" not in refused
        assert kind in ("tools", "both", "system"), refused
        return
    prompts = starting_points(name, row)
    turns: list[int] = []
    for example in examples:
        for start in starts(example.labels):
            before = list(example.ids[:start])
            exact = [i for i, ids in prompts.items() if before == ids]
            if not exact and name in MARKING:
                # a mark may begin later; then it begins within the turn
                within = [i for i, ids in prompts.items() if before[: len(ids)] == ids]
                assert within, tokenizer.decode(before)
                turn = tokenizer.decode(before[len(prompts[within[-1]]) :])
                assert not any(m["role"] + "\n" in turn for m in row["messages"])
                exact = within[-1:] if within[-1] not in turns else []
                assert exact or within[-1] in turns
            elif not exact:
                raise AssertionError(f"generation never starts from {tokenizer.decode(before)!r}")
            turns += exact
    assert sorted(turns) == list(prompts)  # each turn once, and none is lost
    assert trained.left_out == 0


@pytest.mark.few(18)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", [name for name in names() if name not in MARKING])
def test_a_trained_turn_is_what_the_template_adds_for_it(name: str, kind: str) -> None:
    row, tokenizer = ROWS[kind], tokenizer_of(name)
    refused, examples, _ = encoded(name, kind)
    if refused:
        return
    messages, texts = as_taken(name, row["messages"]), set(trained_texts(examples, tokenizer))
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue

        def draw(n: int, **how: Any) -> str:
            found = tokenizer.apply_chat_template(
                messages[:n], tools=row.get("tools"), tokenize=False, **how
            )
            return str(found)

        prompt, after = draw(i, add_generation_prompt=True), draw(i + 1)
        if after.startswith(prompt):
            assert after[len(prompt) :].rstrip() + end_after(name, messages[i + 1 :]) in texts
        else:  # the content is there all the same, once, and after the template's own text
            assert any((message.get("content") or "Rome") in str(text) for text in texts)


def end_after(name: str, following: list[dict[str, Any]]) -> str:
    """What ends a turn and is written with the next message."""
    if name != "glm4moe":
        return ""
    return "<|observation|>" if following and following[0]["role"] == "tool" else "<|user|>"


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_does_with_tools_thinking_and_history(name: str) -> None:
    found, hidden = [], 0
    for kind in ("plain", "tools", "thinking", "both"):
        try:
            shape = format_of(ROWS[kind])
            assert shape is not None
            trained = render_trained(shape.conversation(ROWS[kind]), tokenizer_of(name))
        except LorafoldError:
            found.append("-")
            continue
        found.append(str(len(trained.renderings)))
        hidden = trained.hidden if kind == "thinking" else hidden
    line = f"{' '.join(found)}, hidden {hidden}"
    print(f"{name:20} plain tools thinking both: {line}; {template_of(tokenizer_of(name)).block}")
    assert line == FAMILIES[name]


STABLE = [name for name in names() if name in MARKING]


@pytest.mark.few(14)
@pytest.mark.parametrize("kind", ["plain", "tools", "thinking"])
@pytest.mark.parametrize("name", STABLE)
def test_marks_of_templates_are_as_transformers_has_them(name: str, kind: str) -> None:
    """Where one example holds the whole row, and no mark covers what the template supplies."""
    row, tokenizer = ROWS[kind], tokenizer_of(name)
    refused, examples, _ = encoded(name, kind)
    if refused or len(examples) > 1:
        return
    found: Any = tokenizer.apply_chat_template(
        as_taken(name, row["messages"]), tools=row.get("tools"), return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    assert list(examples[0].ids) == found["input_ids"]
    labels, prompts = examples[0].labels, starting_points(name, row)
    assert prompts
    supplied = {t for ids in prompts.values() for t in range(len(ids)) if labels[t] == NO_LOSS}
    ours = [int(label != NO_LOSS) for label in labels]
    theirs = [int(m and t not in supplied) for t, m in enumerate(found["assistant_masks"])]
    assert ours == theirs


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("qwen3", "I do not know.<|im_end|>"),
        ("qwen3_5_think", "I do not know.<|im_end|>"),
        ("glm4moe", "I do not know.<|user|>"),
        ("gptoss", "<|channel|>final<|message|>I do not know.<|return|>"),
        ("gemma4_v5", "I do not know.<turn|>"),
        ("deepseek_r1_distill", "I do not know.<｜end▁of▁sentence｜>"),
        ("nemotron_3_nano", "I do not know.<|im_end|>"),
        ("muse_glimmer", " to=user<|message|>I do not know.<|eot|>"),
    ],
)
def test_reasoning_is_masked_with_what_encloses_it(name: str, last: str) -> None:
    tokenizer, row = tokenizer_of(name), ROWS["thinking"]
    masked = encode_row(row, tokenizer, Rendering(mask_reasoning=True))[0]
    texts = trained_texts(masked, tokenizer)
    assert last in texts
    assert not any(thought in text for text in texts for thought in ("A hard one", "Easy"))
    [only] = trained_texts(encode_row(row, tokenizer, Rendering("last"))[0], tokenizer)
    assert "A hard one." in only
    assert only.endswith(last.rpartition("I do not")[2])
    assert "21 degrees" not in only


def test_reasoning_in_contents_is_found_as_well() -> None:
    row = {"messages": [HOW, said("<think>\nEasy.\n</think>\n\n" + ROME)]}
    for name in ("deepseek_r1_distill", "deepseekv3", "qwen3"):
        tokenizer = tokenizer_of(name)
        [example], _ = encode_row(row, tokenizer)
        assert "Easy.\n</think>\n\nIt is 21" in tokenizer.decode(example.ids)
        masked, _ = encode_row(row, tokenizer, Rendering(mask_reasoning=True))
        [text] = trained_texts(masked, tokenizer)
        assert text.startswith("It is 21 degrees.")


def test_a_simple_row_is_rendered_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, count = tokenizer_of("qwen2_5"), 0
    row = {"prompt": "Hi", "completion": "Yo"}
    encode_row(row, tokenizer)  # once a template its form is found out
    real = chat_template.render_jinja_template

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(chat_template, "render_jinja_template", counting)
    encode_row(row, tokenizer)
    assert count == 2


def test_a_report_counts_examples_and_hidden_reasoning() -> None:
    report = encode([ROWS["thinking"]], tokenizer_of("qwen3"), 512).report
    assert (report.rows, report.examples, report.reasoning_hidden) == (1, 2, 0)
    report = encode([ROWS["thinking"]], tokenizer_of("qwen2_5"), 512).report
    assert (report.examples, report.reasoning_hidden) == (1, 2)
    assert "2 assistant turns are trained on without their reasoning" in str(report)
