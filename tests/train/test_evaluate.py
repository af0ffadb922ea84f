"""Evaluation: the model's own loss, its interval, and exact match."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafold as lf
from conversation_cases import prompts
from lorafold.data.examples import encode
from lorafold.errors import LorafoldError
from lorafold.evaluation import Evaluation, EvaluationSettings, evaluate, held_out_loss
from lorafold.evaluation.intervals import Z, loss_interval, wilson
from lorafold.generation import complete
from lorafold.models.tokenizer import load_tokenizer
from lorafold.training_step.losses import CompletionLoss
from lorafold.training_step.packed_attention import packed
from noise import moved
from typed_commands import done, result, run, write_rows

ASKED = ["a table for four", "rain", "an alarm for half past six tomorrow morning",
         "the lazy dog jumps", "set it", "book"]  # fmt: skip
ROWS = [{"prompt": text, "completion": f"{i} {text[: 3 * i]} done"} for i, text in enumerate(ASKED)]


@pytest.fixture
def tiny(tiny_model, tiny_model_dir) -> tuple[Any, Any]:
    return tiny_model("llama"), load_tokenizer(tiny_model_dir("llama"))


def reference_loss(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Each row alone, transformers' own cross entropy."""
    total, tokens = 0.0, 0
    for example in encode(rows, tokenizer, 512).examples:
        n = sum(label != -100 for label in example.labels[1:])
        ids, labels = torch.tensor([example.ids]), torch.tensor([example.labels])
        with torch.no_grad():
            total += n * float(model(ids, labels=labels).loss)
        tokens += n
    return total / tokens


def test_loss_is_the_models_own(tiny: tuple[Any, Any]) -> None:
    result = evaluate(*tiny, ROWS, 512, EvaluationSettings(completions=False))
    # fp32 sums in another order
    assert result.loss == pytest.approx(reference_loss(*tiny, ROWS), rel=1e-5)
    assert result.perplexity == math.exp(result.loss)
    assert result.loss_interval is not None
    assert result.loss_interval[0] < result.loss < result.loss_interval[1]
    assert (result.n, result.exact_match, result.rows) == (len(ROWS), None, ())


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_in_the_mode_it_was_in(training: bool, tiny: tuple[Any, Any]) -> None:
    tiny[0].train(training)
    evaluate(*tiny, ROWS, 512, EvaluationSettings(max_new_tokens=2))
    assert all(module.training is training for module in tiny[0].modules())


def test_held_out_loss_is_the_same_packed_or_padded_and_leaves_the_mode(tiny) -> None:
    model, tokenizer = tiny
    examples = encode(ROWS * 30, tokenizer, 512).examples  # several batches
    assert sum(len(e.ids) for e in examples) > 2 * 2048
    expected = reference_loss(model, tokenizer, ROWS)
    model.train()
    found = [held_out_loss(CompletionLoss(model, packed=False, pad_id=0), examples)]
    with packed(model) as apart:
        assert apart
        found.append(held_out_loss(CompletionLoss(model, packed=True, pad_id=0), examples))
    assert found == pytest.approx([expected, expected], rel=1e-5)
    assert model.training


def test_exact_match_counts_answers_that_equal_the_reference(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    said = complete(model, tokenizer, [prompt for prompt, _ in prompts(ROWS, tokenizer)], 6)
    assert all(text.strip() for text in said)
    references = [f" {text}\n" if i % 3 else "something else" for i, text in enumerate(said)]
    rows = [
        {"prompt": asked, "completion": reference}
        for asked, reference in zip(ASKED, references, strict=True)
    ]
    result = evaluate(model, tokenizer, rows, 512, EvaluationSettings(max_new_tokens=6))
    assert result.exact_match == 4 / 6
    assert result.exact_match_interval == wilson(4, 6)
    assert [answer.exact for answer in result.rows] == [False, True, True, False, True, True]
    assert [(answer.prompt, answer.answer) for answer in result.rows] == list(
        zip(ASKED, said, strict=True)
    )


def test_an_answer_that_goes_on_is_no_match(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    prompt, _ = prompts(ROWS, tokenizer)[0]
    start = complete(model, tokenizer, [prompt], 4)[0]
    assert len(complete(model, tokenizer, [prompt], 8)[0]) > len(start)
    row = {"prompt": ASKED[0], "completion": start}
    assert evaluate(model, tokenizer, [row], 512).exact_match == 0


def test_plain_text_has_a_loss_and_no_exact_match(tiny: tuple[Any, Any]) -> None:
    result = evaluate(*tiny, [{"text": "the quick brown fox"}], 512)
    found = (result.exact_match, result.exact_match_interval, result.loss_interval)
    assert found == (None, None, None)
    assert "exact match" not in str(result)


def test_a_conversation_is_asked_for_its_last_turn(tiny: tuple[Any, Any]) -> None:
    turns = [("user", "one"), ("assistant", "first"), ("user", "two"), ("assistant", "second")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (answer,) = evaluate(*tiny, [row], 512).rows
    assert (answer.prompt, answer.reference) == ("two", "second")


def test_broken_weights_are_refused(tiny: tuple[Any, Any]) -> None:
    tiny[0].model.norm.weight.data[0] = math.nan
    with pytest.raises(LorafoldError, match="finite"):
        evaluate(*tiny, ROWS, 512, EvaluationSettings(completions=False))


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (95, 100), (190, 200)])
def test_wilson_bounds_are_where_the_score_test_rejects(hits: int, n: int) -> None:
    for bound in wilson(hits, n):
        # a bound at 0 or 1 may be off by one rounding, whose square root is 1e-8
        assert abs(hits / n - bound) == pytest.approx(
            Z * math.sqrt(bound * (1 - bound) / n), abs=1e-7
        )


def test_loss_interval_covers_the_truth_as_often_as_it_says() -> None:
    """An interval that took the tokens of a row for independent would cover far less."""
    draw = torch.Generator().manual_seed(0)
    runs, rows, covered = 1000, 200, 0
    for _ in range(runs):
        n = torch.randint(1, 60, (rows,), generator=draw)
        mean = 2 + 0.5 * torch.randn(rows, generator=draw)  # a row's own mean, shared by its tokens
        found = loss_interval(list(zip((mean * n).tolist(), n.tolist(), strict=True)))
        assert found is not None
        covered += found[0] < 2 < found[1]
    # 95% less a point for the normal approximation at 200 rows, and three standard errors of the
    # count
    assert abs(covered / runs - 0.95) < 0.01 + 3 * math.sqrt(0.95 * 0.05 / runs)


def test_json_holds_the_figures_alone() -> None:
    result = Evaluation(0.5, (0.25, 0.75), 0.5, (0.1, 0.9), 2, ())
    assert json.loads(json.dumps(result.as_json())) == {
        "loss": 0.5, "perplexity": math.exp(0.5), "exact_match": 0.5, "n": 2,
        "loss_interval": [0.25, 0.75], "exact_match_interval": [0.1, 0.9],
    }  # fmt: skip


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_an_evaluation_computes_as_trained(storage, tiny_model_dir, tmp_path, monkeypatch) -> None:
    """Whatever this device would choose, if it multiplies both natively."""
    for module in ("models.quantizations", "resolve.base"):
        monkeypatch.setattr(f"lorafold.{module}.native_bf16", lambda device: (True, "it can"))
    base = tiny_model_dir("llama")
    moved(lf.attach(lf.load_model(base, storage=storage), lf.LoRA(rank=2))).save(tmp_path / "a")
    on: dict[str, Any] = {"adapters": tmp_path / "a", "completions": False}
    asked = ("auto", "fp32", "bf16")
    found = {how: lf.evaluate(base, ROWS, storage=how, **on).loss for how in asked}
    assert found["auto"] == found[storage]
    assert found["fp32"] != found["bf16"]


def test_eval_command(tiny_model_dir, tmp_path: Path, tiny) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    on = f"eval --data {data} --model {tiny_model_dir('llama')} --storage fp32 --device cpu"
    found = result(f"{on} --max-new-tokens 4")
    assert found["loss"] == pytest.approx(reference_loss(*tiny, ROWS), rel=1e-5)
    assert (found["n"], found["exact_match"]) == (len(ROWS), 0)
    assert done(f"{on} --no-completions").stdout.startswith("6 rows: loss ")


def test_generate_command(tiny_model_dir, tiny) -> None:
    model, tokenizer = tiny
    (prompt, _), *_ = prompts([{"prompt": "book", "completion": "x"}], tokenizer)
    said = complete(model, tokenizer, [prompt], 7)[0]
    on = f"generate --prompt book --model {tiny_model_dir('llama')} --storage fp32 --device cpu"
    printed = done(f"{on} --max-new-tokens 7")
    assert printed.stdout == said + "\n"
    assert "tokens/s" in printed.stderr
    found = result(f"{on} --max-new-tokens 7")
    assert found["text"] == said
    assert found["tokens_per_second"] > 0


def test_adapters_stack_and_one_of_another_base_is_refused(tiny, tiny_model_dir, tmp_path) -> None:
    model, tokenizer = tiny
    one, two = tmp_path / "first", tmp_path / "second"
    for seed, path in enumerate((one, two)):
        moved(lf.attach(model, lf.LoRA(rank=2), name=path.name), 0.5, seed).save(path)
    with torch.no_grad():
        expected = reference_loss(model, tokenizer, ROWS)  # both are live
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    on = f"eval --data {data} --storage fp32 --device cpu --no-completions"
    base = tiny_model_dir("llama")
    found = result(f"{on} --model {base} --adapter {one} --adapter {two}")
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    other = lf.load_model(base, storage="fp32")
    other.model.embed_tokens.weight.data.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    on = f"{on} --model {tmp_path / 'other'} --adapter {one}"
    refused = run(on)
    assert (refused.returncode, "base" in refused.stderr) == (2, True)
    done(f"{on} --allow-other-base")
