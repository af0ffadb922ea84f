"""Evaluation: the loss is transformers' own, the intervals are what they claim, exact match counts
what it should.
"""

import json
import math
from typing import Any

import pytest
import torch

import lorafold as lf
from conversation_cases import prompts
from lorafold.cli import app
from lorafold.data.examples import encode
from lorafold.errors import LorafoldError
from lorafold.evaluation import (
    Evaluation,
    EvaluationSettings,
    Z,
    evaluate,
    held_out_loss,
    loss_interval,
    wilson,
)
from lorafold.generation import complete
from lorafold.models.tokenizer import load_tokenizer
from lorafold.training_step.losses import CompletionLoss
from lorafold.training_step.packed_attention import packed

ASKED = [
    "a table for four",
    "rain",
    "an alarm for half past six tomorrow morning",
    "the lazy dog jumps",
    "set it",
    "book",
]
ROWS = [{"prompt": text, "completion": f"{i} {text[: 3 * i]} done"} for i, text in enumerate(ASKED)]


@pytest.fixture
def tiny(tiny_model, tiny_model_dir) -> tuple[Any, Any]:
    return tiny_model("llama"), load_tokenizer(tiny_model_dir("llama"))


def reference_loss(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Each row alone, transformers' own cross entropy."""
    total, tokens = 0.0, 0
    for example in encode(rows, tokenizer, 512).examples:
        n = sum(label != -100 for label in example.labels[1:])
        with torch.no_grad():
            total += n * float(
                model(torch.tensor([example.ids]), labels=torch.tensor([example.labels])).loss
            )
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
    assert held_out_loss(CompletionLoss(model, packed=False, pad_id=0), examples) == pytest.approx(
        expected, rel=1e-5
    )
    with packed(model) as apart:
        assert apart
        assert held_out_loss(
            CompletionLoss(model, packed=True, pad_id=0), examples
        ) == pytest.approx(expected, rel=1e-5)
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
    assert len(complete(model, tokenizer, [prompt], 8)[0]) > len(start), (
        "the model must go on for this to test anything"
    )
    assert (
        evaluate(model, tokenizer, [{"prompt": ASKED[0], "completion": start}], 512).exact_match
        == 0
    )


def test_plain_text_has_a_loss_and_no_exact_match(tiny: tuple[Any, Any]) -> None:
    result = evaluate(*tiny, [{"text": "the quick brown fox"}], 512)
    assert (result.exact_match, result.exact_match_interval, result.loss_interval) == (
        None,
        None,
        None,
    )
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
    """Rows of very different lengths whose tokens hang together; an interval that took tokens for
    independent would cover far less.
    """
    draw = torch.Generator().manual_seed(0)
    runs, rows, covered = 1000, 200, 0
    for _ in range(runs):
        n = torch.randint(1, 60, (rows,), generator=draw)
        mean = 2 + 0.5 * torch.randn(rows, generator=draw)  # a row's own mean, shared by its tokens
        low, high = loss_interval(list(zip((mean * n).tolist(), n.tolist(), strict=True))) or (
            0.0,
            0.0,
        )
        covered += low < 2 < high
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
def test_an_evaluation_computes_as_the_adapter_was_trained(
    storage: str, tiny_model_dir, tmp_path, monkeypatch
) -> None:
    """Whatever this device would choose, if it multiplies both natively."""
    for module in ("models.quantizations", "resolve.base"):
        monkeypatch.setattr(f"lorafold.{module}.native_bf16", lambda device: (True, "it can"))
    base = tiny_model_dir("llama")
    adapter = lf.attach(lf.load_model(base, storage=storage), lf.LoRA(rank=2))
    torch.manual_seed(0)
    for p in adapter.parameters():
        p.data += 0.1 * torch.randn_like(p)
    adapter.save(tmp_path / "a")
    found = {
        asked: lf.evaluate(
            base, ROWS, adapters=tmp_path / "a", storage=asked, completions=False
        ).loss
        for asked in ("auto", "fp32", "bf16")
    }
    assert found["auto"] == found[storage]
    assert found["fp32"] != found["bf16"]


def typed(command: str, **options: Any) -> None:
    """Run a command with these options; True is for a switch."""
    words = [command]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{name.replace('_', '-')}", *([] if one is True else [str(one)])]
    app(words, prog_name="lorafold", standalone_mode=False)


def test_eval_command(tiny_model_dir, tmp_path, capsys, tiny) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    typed(
        "eval",
        data=str(data),
        model=str(tiny_model_dir("llama")),
        storage="fp32",
        device="cpu",
        max_new_tokens=4,
        json=True,
    )
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert out["loss"] == pytest.approx(reference_loss(*tiny, ROWS), rel=1e-5)
    assert (out["n"], out["exact_match"]) == (len(ROWS), 0)
    typed(
        "eval",
        data=str(data),
        model=str(tiny_model_dir("llama")),
        storage="fp32",
        device="cpu",
        no_completions=True,
    )
    assert capsys.readouterr().out.startswith("6 rows: loss ")


def test_generate_command(tiny_model_dir, capsys, tiny) -> None:
    model, tokenizer = tiny
    (prompt, _), *_ = prompts([{"prompt": "book", "completion": "x"}], tokenizer)
    said = complete(model, tokenizer, [prompt], 7)[0]
    options: dict[str, Any] = {
        "model": str(tiny_model_dir("llama")),
        "storage": "fp32",
        "device": "cpu",
        "max_new_tokens": 7,
    }
    typed("generate", prompt="book", **options)
    printed = capsys.readouterr()
    assert printed.out == said + "\n"
    assert "tokens/s" in printed.err
    typed("generate", prompt="book", **options, json=True)
    out = json.loads(capsys.readouterr().out)
    assert out["text"] == said
    assert out["tokens_per_second"] > 0


def test_adapters_stack_and_one_of_another_base_is_refused(
    tiny_model, tiny_model_dir, tmp_path, capsys
) -> None:
    model, tokenizer = tiny_model("llama"), load_tokenizer(tiny_model_dir("llama"))
    paths = [tmp_path / "first", tmp_path / "second"]
    for seed, path in enumerate(paths):
        adapter = lf.attach(model, lf.LoRA(rank=2), name=path.name)
        draw = torch.Generator().manual_seed(seed)
        for p in adapter.parameters():
            p.data.normal_(generator=draw)
        adapter.save(path)
    with torch.no_grad():
        expected = reference_loss(model, tokenizer, ROWS)  # both are live
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options: dict[str, Any] = {
        "data": str(data),
        "storage": "fp32",
        "device": "cpu",
        "no_completions": True,
        "json": True,
    }
    typed("eval", model=str(tiny_model_dir("llama")), adapter=paths, **options)
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(expected, rel=1e-5)

    other = tiny_model("llama")
    other.model.embed_tokens.weight.data.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(LorafoldError, match="base"):
        typed("eval", model=str(tmp_path / "other"), adapter=paths[:1], **options)
    typed(
        "eval", model=str(tmp_path / "other"), adapter=paths[:1], allow_other_base=True, **options
    )
