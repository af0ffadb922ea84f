"""`chat_template: none` joins prompt and completion unchanged, in training and generation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

import lorafold as lf
from conftest import make_tokenizer
from conversation_cases import jsonl, prompts, user
from conversation_cases import said as turn
from error_cases import refusal
from fresh_models import fresh_model
from lorafold.data.examples import NO_LOSS, encode
from lorafold.data.render import ensure_chat_template
from lorafold.errors import LorafoldError
from lorafold.evaluation import EvaluationSettings, evaluate
from lorafold.generation import complete, end_tokens
from lorafold.models.loading import load_model
from lorafold.models.sources import resolve_model
from lorafold.models.tokenizer import load_tokenizer, set_template, tokenizer_of
from lorafold.recipe.parsing import load_recipe
from lorafold.training import loop
from lorafold.training.preview import show
from lorafold.training.run import train
from token_cases import lorafold, quiet, request, said

pytestmark = pytest.mark.usefixtures("unestimated")

PAIRS = [
    {"prompt": "Book a table for", "completion": " four people"},
    {"prompt": "  Remind me\n\n", "completion": "\n\tto call  "},
    {"prompt": "naïve 🙂", "completion": "{{ 7 * 7 }} {% raw %}"},
    {"prompt": "Set an alarm for", "completion": "six"},
    {"prompt": "ta", "completion": "ble"},
]
TURNS: list[dict[str, str]] = [
    {"role": "system", "content": "Short. "}, user("Book a table"), turn(" for four"),
    user(" and an alarm"), turn(" at six"),
]  # fmt: skip


@pytest.fixture(params=["bos", "no bos"])
def tokenizer(request) -> Any:
    """Of a model that has a template, with and without a token that begins every text."""
    made = make_tokenizer()
    if request.param == "bos":
        made.bos_token = "<|im_start|>"
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", made.bos_token_id)]
        )
    set_template(made, "none")
    return made


def bos(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found


@pytest.mark.parametrize("row", PAIRS, ids=lambda row: row["prompt"].strip())
def test_a_row_is_its_prompt_and_its_completion(row: dict[str, str], tokenizer) -> None:
    prompt = bos(tokenizer) + ids(tokenizer, row["prompt"])
    completion = [*ids(tokenizer, row["completion"]), tokenizer.eos_token_id]
    [example] = encode([row], tokenizer, 512).examples
    assert list(example.ids) == prompt + completion
    assert list(example.labels) == [NO_LOSS] * len(prompt) + completion
    # what generation is given is what stood before the completion
    [(text, answer)] = prompts([row], tokenizer)
    assert ids(tokenizer, text) == prompt
    assert answer == row["completion"]


def test_a_border_that_would_be_merged_is_one_of_the_rows(tokenizer) -> None:
    """Or the test above would show less than it says."""
    together, apart = (ids(tokenizer, "table"), ids(tokenizer, "ta") + ids(tokenizer, "ble"))
    assert together != apart


def test_turns_follow_each_other_with_an_end_after_each_answer(tokenizer) -> None:
    end = [tokenizer.eos_token_id]
    said = [ids(tokenizer, turn["content"]) for turn in TURNS]
    [example] = encode([{"messages": TURNS}], tokenizer, 512).examples
    expected = [*bos(tokenizer), *said[0], *said[1], *said[2], *end, *said[3], *said[4], *end]
    assert list(example.ids) == expected
    assert all(label in (NO_LOSS, i) for i, label in zip(example.ids, example.labels, strict=True))
    assert [label for label in example.labels if label >= 0] == [*said[2], *end, *said[4], *end]
    [(text, _)] = prompts([{"messages": TURNS}], tokenizer)
    assert ids(tokenizer, text) == expected[: -len(said[4]) - 1]
    # of a prompt of messages only what follows is trained
    row = {"prompt": TURNS[:4], "completion": TURNS[4:]}
    [example] = encode([row], tokenizer, 512).examples
    assert list(example.ids) == expected
    assert [label for label in example.labels if label >= 0] == [*said[4], *end]


def test_it_takes_the_place_of_a_template_and_of_the_plain_one(tiny_model_dir) -> None:
    tokenizer = load_tokenizer(tiny_model_dir("llama"))
    assert "<|im_start|>" in tokenizer.chat_template
    set_template(tokenizer, "none")
    assert ensure_chat_template(tokenizer) is None  # nothing to add, nothing to say
    [(text, _)] = prompts([PAIRS[0]], tokenizer)
    assert text == PAIRS[0]["prompt"]
    model = fresh_model(tiny_model_dir("llama"))
    assert end_tokens(model, tokenizer) == {tokenizer.eos_token_id}


def test_a_file_of_that_name_is_given_with_its_folder(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("none").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    for name in ("./none", str(tmp_path / "none")):
        recipe = load_recipe(chat_template=name)
        tokenizer = load_tokenizer(tiny_model_dir("llama"))
        set_template(tokenizer, str(recipe.chat_template))
        assert tokenizer.chat_template.endswith("[{{ m.content }}]{% endfor %}")
        shown = said(show, request(tiny_model_dir("llama"), tmp_path / "a", chat_template=name))
        assert "[Book a table for 0]" in shown
    for found in (load_recipe(chat_template="none"), load_recipe(sets=["chat_template=none"])):
        assert found.chat_template == "none"
    Path("recipe.yaml").write_text("chat_template: none\n")
    assert load_recipe(Path("recipe.yaml")).chat_template == "none"


def test_errors_say_what_there_is(tiny_model_dir, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_dir("llama"))
    told = refusal(set_template, tokenizer, tmp_path / "nowhere.jinja")
    assert "or none to join texts unchanged" in told
    tokenizer.eos_token = None
    assert "no end-of-sequence token" in refusal(set_template, tokenizer, "none")
    told = " ".join(lorafold("train", "--help-all").stdout.replace("│", " ").split())
    assert "none concatenates prompt and completion" in told
    assert "(./none is a file)" in told


@pytest.mark.slow
def test_training_evaluation_and_generation_see_the_same(tiny_model_dir, tmp_path: Path) -> None:
    base, out = tiny_model_dir("llama"), tmp_path / "a"
    data = jsonl(tmp_path / "rows.jsonl", *PAIRS)
    asked = ("train", "--model", base, "--data", data, "--out", out, "--chat-template", "none")
    shown = lorafold(*asked, "--preview").stderr
    assert "Book a table for⟦ four people<|im_end|>⟧" in shown
    assert "###" not in shown
    sets = ("--set", "steps=60", "--set", "lr=1e-2", "--set", "batch=5", "--set", "dropout=0")
    lorafold(*asked, "--storage", "fp32", *sets)

    tokenizer = tokenizer_of(resolve_model(base), [out])
    adapted = fresh_model(base)
    lf.load(adapted, out)
    # the loss that the command measures is that of the bare ids
    lost = count = 0.0
    for row in PAIRS:
        prompt = ids(tokenizer, row["prompt"])
        completion = [*ids(tokenizer, row["completion"]), tokenizer.eos_token_id]
        with torch.no_grad():
            logits = adapted(input_ids=torch.tensor([prompt + completion])).logits[0].float()
        spoken = logits[len(prompt) - 1 : -1].log_softmax(-1)
        lost -= float(spoken[torch.arange(len(completion)), torch.tensor(completion)].sum())
        count += len(completion)
    measured = lorafold("eval", "--model", base, "--adapter", out, "--data", data, "--json")
    found = json.loads(measured.stdout.splitlines()[-1])
    assert found["loss"] == pytest.approx(lost / count, rel=1e-4)
    assert found["exact_match"] >= 0.6  # it has learnt them, and where they end
    row = PAIRS[0]
    asked = ("generate", "--model", base, "--adapter", out, "--prompt", row["prompt"], "--json")
    answer = json.loads(lorafold(*asked).stdout.splitlines()[-1])["text"]
    assert answer == row["completion"] == complete(adapted, tokenizer, [row["prompt"]], 16)[0]
    # merged, it goes with the plain model
    lorafold("merge", "--model", base, "--adapter", out, "--out", tmp_path / "merged")
    plain = load_tokenizer(tmp_path / "merged")
    assert plain.chat_template == tokenizer.chat_template
    merged = load_model(tmp_path / "merged", torch.float32)
    again = evaluate(merged, plain, PAIRS, 512, EvaluationSettings(completions=False))
    assert again.loss == pytest.approx(found["loss"], rel=1e-3)


@pytest.mark.slow
def test_a_run_is_resumed_with_it_and_with_nothing_else(tiny_model_dir, tmp_path, monkeypatch):
    def asked(name: str, template: str | None = "none", **more: Any) -> Any:
        base, fields = tiny_model_dir("llama"), {"steps": 6, "save_every": 2, "new_tokens": None}
        return request(base, tmp_path / name, PAIRS, chat_template=template, **fields, **more)

    step = loop.train_step

    def stopped(job: Any, rows: Any, at: int) -> float:
        if at == 4:
            raise RuntimeError("stopped")
        return step(job, rows, at)

    train(asked("straight"), quiet())
    monkeypatch.setattr(loop, "train_step", stopped)
    with pytest.raises(RuntimeError, match="stopped"):
        train(asked("stopped"), quiet())
    monkeypatch.undo()
    with pytest.raises(LorafoldError, match="settings have changed: chat_template: was"):
        train(asked("stopped", None, resume=True), quiet())
    train(asked("stopped", resume=True), quiet())
    a, b = (tmp_path / name / "adapter_model.safetensors" for name in ("stopped", "straight"))
    assert a.read_bytes() == b.read_bytes()
