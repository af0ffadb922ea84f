"""`--objective reward` and `lab score` against TRL, PEFT, transformers and closed forms."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PeftModelForSequenceClassification, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel
from trl import RewardConfig, RewardTrainer

import lorafold as lf
from classify_cases import quiet, request
from command_cases import error_of, printed, rows_file, words
from conftest import lorafold
from lorafold.api.merge import merge
from lorafold.core.contexts import evaluating
from lorafold.data.examples import Example
from lorafold.data.preference_examples import BranchedRow, encode_preferences
from lorafold.errors import LorafoldError
from lorafold.evaluation.intervals import wilson
from lorafold.evaluation.reward_model_scores import reward_figures, score_rows, scores_of
from lorafold.files.model_card import REWARD
from lorafold.memory.estimate import estimate
from lorafold.memory.measure import measure
from lorafold.memory.trace import MemorySetting
from lorafold.models.classifier import head_paths, load_classifier
from lorafold.models.fake import fake_model
from lorafold.models.quantizations import Storage
from lorafold.models.sources import read_configuration, resolve_model
from lorafold.models.tokenizer import load_tokenizer
from lorafold.objectives.algorithm_options import preference_algorithm
from lorafold.training.run import train
from lorafold.training_step.preference_algorithms import BradleyTerry
from lorafold.training_step.preference_loss import Preferences
from lorafold.training_step.shared_prefixes import PrefixSupport, sharing_prefixes
from serving_cases import running

pytestmark = pytest.mark.usefixtures("unestimated")

SUBJECTS = ["rain", "the fox", "a table", "the alarm", "the plumber", "mountains", "weather", "fox"]
ROWS = [
    {
        "prompt": f"Say something about {subject}.",
        "chosen": f"Yes, {subject} {tail}",
        "rejected": f"No, {subject} {other}",
    }
    for n, subject in enumerate(SUBJECTS)
    for tail, other in [("today" * (n % 3), "tomorrow" * (n % 2))]
]
JUDGED = {"prompt": "a", "completion": "b", "label": True}


def fit(model: Path, out: Path, rows: Any = ROWS, **fields: Any) -> Any:
    return train(request(model, out, rows, **{"objective": "reward", "batch": 4} | fields), quiet())


def score(model: Path, *adapters: Path, rows: Any = ROWS, **how: Any) -> Any:
    given: dict[str, Any] = {"storage": "fp32", "device": "cpu", **how}
    return lf.score(str(model), rows, adapters=adapters, **given)


def reward_model(directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    pad = load_tokenizer(directory).pad_token_id
    return load_classifier(resolve_model(directory), (REWARD,), pad, dtype, seed=seed)


def moved_model(directory: Path) -> tuple[Any, Any]:
    """A reward model with an adapter that changes it, and its tokenizer."""
    model = reward_model(directory)
    adapted(model)
    return model, load_tokenizer(directory)


def adapted(model: Any, seed: int = 0) -> lf.Adapter:
    """A LoRA adapter and a head with all tensors drawn, so that they change the model."""
    torch.manual_seed(seed)
    heads = head_paths(model)
    adapter = lf.attach(model, lf.LoRA(rank=4, alpha=8, dropout=0.0), modules_to_save=heads)
    for _, p in adapter.named_parameters():
        torch.nn.init.normal_(p, std=0.2)
    return adapter


def scored_alone(model: Any, documents: list[tuple[int, ...]]) -> torch.Tensor:
    """What transformers computes of each document by itself, (n,)."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in documents])


def same_scores(rows: Any, expected: torch.Tensor) -> None:
    own = torch.tensor([list(row.scores.values()) for row in rows]).flatten()
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


def way_through(way: str, how: Any) -> Any:
    return {"shared": how, "packed": PrefixSupport(True, False), "padded": None}[way]


@pytest.fixture
def directory(tiny_model_dir) -> Path:
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def trained(tiny_model_dir, tmp_path_factory) -> tuple[Path, Path]:
    """A tiny model, and a reward adapter of it that tells its pairs apart."""
    model, out = tiny_model_dir("llama"), tmp_path_factory.mktemp("reward") / "adapter"
    fit(model, out, steps=40, lr=1e-2)
    return model, out


@pytest.mark.parametrize("way", ["shared", "packed", "padded"])
@pytest.mark.parametrize(("margin", "centre"), [(0.0, 0.0), (0.7, 0.01)])
def test_loss_and_gradients_are_those_of_trl(
    way: str, margin: float, centre: float, directory: Path, tmp_path: Path
) -> None:
    model, tokenizer = reward_model(directory), load_tokenizer(directory)
    adapter = adapted(model)
    adapter.requires_grad_().save(tmp_path / "a")
    examples = encode_preferences(ROWS, tokenizer, 512, "pairs").examples
    documents = [example.documents() for example in examples]
    rows = [
        {"chosen_ids": list(w.ids), "rejected_ids": list(lost.ids), "margin": margin}
        for w, lost in documents
    ]
    config = RewardConfig(
        output_dir=str(tmp_path / "trl"), report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, center_rewards_coefficient=centre or None,
    )  # fmt: skip
    theirs = AutoModelForSequenceClassification.from_pretrained(
        directory, num_labels=1, dtype=torch.float32
    )
    trainer = RewardTrainer(
        PeftModel.from_pretrained(theirs, tmp_path / "a", is_trainable=True), args=config,
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    batch = trainer.data_collator(rows)
    expected = trainer.compute_loss(trainer.model.eval(), batch)
    expected.backward()
    with sharing_prefixes(model) as how:
        assert how.shares
        law = preference_algorithm("reward", None, {"margin": margin, "centre": centre})
        loss = Preferences(model, law, way_through(way, how), tokenizer.pad_token_id)
        own = loss(**loss.collate(list(examples), loss.device)) / len(examples)
        own.backward()
    assert float(own.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    found = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert len(found) == len([*adapter.parameters()])
    off = whole = 0.0
    for name, p in adapter.named_parameters():
        path, _, factor = name.removesuffix(".weight").rpartition(".")
        end = "modules_to_save" if path == "score" else f"lora_{factor}."
        [match] = [g for n, g in found.items() if f"{path}." in n and end in n]
        off, whole = off + float((p.grad - match).square().sum()), whole + float(match.norm()) ** 2
    assert math.sqrt(off) <= 1e-5 * math.sqrt(whole) != 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.1}, r"^beta: the objective reward has no such option; it has: margin, centre"),
        ({"objective_options": {"gamma": 1}}, r"objective_options: gamma: the objective reward"),
        ({"objective_options": {"margin": -1}}, r"reward: margin: found -1, expected greater than"),
        ({"objective_options": {"centre": "x"}}, r"reward: centre: found 'x', expected a valid"),
    ],
)
def test_options_are_checked_before_anything_is_written(
    fields: dict[str, Any], message: str, directory: Path, tmp_path: Path
) -> None:
    with pytest.raises(LorafoldError, match=message):
        fit(directory, tmp_path / "a", **fields)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "gpt2"])
def test_scores_are_those_of_transformers_on_each_text_alone(kind: str, tiny_model_dir) -> None:
    model, tokenizer = moved_model(tiny_model_dir(kind))
    found = score_rows(model, tokenizer, ROWS, 512)
    talks = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
        for row in ROWS
        for name in ("chosen", "rejected")
    ]
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
    ids = [tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    expected = scored_alone(model, ids)
    same_scores(found.rows, expected)
    # the same texts as completions and as conversations
    for shape in (
        [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS],
        [{"messages": talk} for talk in talks[::2]],
    ):  # fmt: skip
        whole = score_rows(model, tokenizer, shape, 512)
        same_scores(whole.rows, expected[::2])
        assert whole.score == pytest.approx(float(expected[::2].mean()), rel=1e-4, abs=1e-5)
        assert (whole.figures, whole.n) == (None, len(ROWS))


def test_answers_to_one_prompt_are_scored_behind_it_computed_once(directory: Path) -> None:
    model, tokenizer = moved_model(directory)
    prompt = " ".join(SUBJECTS)
    rows = [{"prompt": prompt, "completion": f"{subject}."} for subject in SUBJECTS]
    alone = [score_rows(model, tokenizer, [row], 512).rows[0].scores["score"] for row in rows]
    calls = list[int]()
    seen = model.model.layers[0].register_forward_hook(lambda *of: calls.append(of[2].shape[1]))
    found = [row.scores["score"] for row in score_rows(model, tokenizer, rows, 512).rows]
    seen.remove()
    assert found == pytest.approx(alone, rel=1e-5, abs=1e-5)
    apart = sum(len(tokenizer(f"{prompt} {row['completion']}").input_ids) for row in rows)
    assert 0 < calls[-1] < apart / 2


@pytest.mark.parametrize("way", ["shared", "packed", "padded"])
def test_a_text_that_ends_in_the_padding_token_has_the_score_that_transformers_reads(
    way: str, directory: Path
) -> None:
    tokenizer = load_tokenizer(directory)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    end = tokenizer.eos_token_id
    model = load_classifier(resolve_model(directory), (REWARD,), end, torch.float32)
    examples = list(encode_preferences(ROWS, tokenizer, 512, "pairs").examples)
    documents = [d.ids for e in examples for d in e.documents()]
    assert {ids[-1] for ids in documents} == {end}
    expected = scored_alone(model, documents)
    torch.testing.assert_close(expected, scored_alone(model, [ids[:-1] for ids in documents]))
    with sharing_prefixes(model) as how, evaluating(model):
        found = Preferences(model, BradleyTerry(), way_through(way, how), end).scored(examples)
    torch.testing.assert_close(found.logps.flatten(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_an_encoder_is_a_reward_model_too_on_padded_batches(tiny_model_dir, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_dir("llama"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    end = tokenizer.pad_token_id
    config = BertConfig(
        **sizes, intermediate_size=64, vocab_size=len(tokenizer), pad_token_id=end
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    fit(tmp_path / "bert", tmp_path / "a", lr=1e-2, steps=40)
    found = score(tmp_path / "bert", tmp_path / "a")
    assert found.figures is not None
    assert found.figures.right.accuracy == 1
    model = reward_model(tmp_path / "bert", seed=1)
    with sharing_prefixes(model) as how:
        assert not how.packs
    lf.load(model, tmp_path / "a")
    examples = encode_preferences(ROWS, tokenizer, 512, "pairs").examples
    same_scores(found.rows, scored_alone(model, [d.ids for e in examples for d in e.documents()]))


@pytest.mark.estimated
@pytest.mark.few(1)
@pytest.mark.parametrize(
    "method",
    [
        *("lora", "prompt", "linear-probe", "full"),
        *(pytest.param(method, marks=pytest.mark.slow) for method in ("dora", "ia3")),
    ],
)
def test_every_method_tells_the_pairs_apart_and_comes_back(
    method: str, directory: Path, tmp_path: Path
) -> None:
    how = {"method": method, "lr": 1e-2, "steps": 60, "batch": 8}
    result = fit(directory, tmp_path / "a", eval_rows=ROWS, **how)
    assert result.eval_loss < 0.9 * math.log(2)
    assert result.figures["accuracy"] == 1
    assert result.figures["accuracy_interval"] == wilson(len(ROWS), len(ROWS))
    record = json.loads((tmp_path / "a" / "lorafold.json").read_text())
    assert (record["reward"], "classes" in record) == (True, False)
    where = (tmp_path / "a",) if method == "full" else (directory, tmp_path / "a")
    found = score(*where)
    assert found.figures is not None
    # the law without margin is the log loss
    assert found.figures.log_loss == pytest.approx(result.eval_loss, rel=1e-4)
    assert found.figures.margin == pytest.approx(result.figures["margin"], rel=1e-4)


def test_scores_are_equal_to_the_bit_after_saving_and_loading(directory, tmp_path) -> None:
    model, tokenizer = reward_model(directory), load_tokenizer(directory)
    adapted(model).save(tmp_path / "a", record={"reward": True})
    other = reward_model(directory, seed=9)  # another head, which the saved one replaces
    assert not torch.equal(other.score.weight, model.score.weight)
    lf.load(other, tmp_path / "a")
    before, after = (score_rows(m, tokenizer, ROWS, 512).rows for m in (model, other))
    assert before == after
    assert score(directory, tmp_path / "a").rows == before
    # a text by itself is not what its company is, to the bit, but close
    alone = score_rows(model, tokenizer, ROWS[:1], 512).rows[0].scores
    assert alone == pytest.approx(before[0].scores, rel=1e-4)
    blank = dict.fromkeys(ROWS[0], "")  # which is left out, and the others keep their numbers
    numbered = score_rows(model, tokenizer, [ROWS[0], blank, ROWS[1]], 512).rows
    assert [row.row for row in numbered] == [1, 3]


def test_peft_computes_the_same_from_our_files(trained: tuple[Path, Path]) -> None:
    directory, out = trained
    ours = reward_model(directory, seed=1)
    lf.load(ours, out)
    theirs = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1).eval()
    wrapped = PeftModel.from_pretrained(theirs, out).eval()
    assert isinstance(wrapped, PeftModelForSequenceClassification)
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = wrapped(ids).logits
        assert found.shape == (2, 1)
        torch.testing.assert_close(ours(ids).logits, found, rtol=1e-5, atol=1e-5)
    card = (out / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card
    assert "num_labels=1" in card


def test_an_adapter_that_peft_saved_is_scored(directory: Path, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(
        directory, num_labels=1, dtype=torch.float32
    )
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    wrapped = get_peft_model(base, config).eval()
    torch.manual_seed(1)
    for p in wrapped.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    wrapped.save_pretrained(tmp_path / "theirs")
    found = score(directory, tmp_path / "theirs")
    examples = encode_preferences(ROWS, load_tokenizer(directory), 512, "pairs").examples
    same_scores(found.rows, scored_alone(wrapped, [d.ids for e in examples for d in e.documents()]))


def test_a_folded_model_is_a_plain_reward_model(trained, tmp_path) -> None:
    directory, out = trained
    model = reward_model(directory)
    adapter = lf.load(model, out)
    before = score_rows(model, load_tokenizer(directory), ROWS, 512)
    adapter.merge()
    model.save_pretrained(tmp_path / "whole")
    load_tokenizer(directory).save_pretrained(tmp_path / "whole")
    found = score(tmp_path / "whole")
    for a, b in zip(found.rows, before.rows, strict=True):
        assert a.scores == pytest.approx(b.scores, rel=1e-4)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (config["problem_type"], config["id2label"]) == ("regression", {"0": "reward"})


def test_an_adapter_of_an_fp32_base_is_scored_in_fp32(trained: tuple[Path, Path]) -> None:
    directory, out = trained
    console = Console(file=io.StringIO(), width=200)
    found = score(directory, out, storage="auto", console=console)
    assert "fp32: as in training" in console.file.getvalue()  # type: ignore[attr-defined]
    assert found.rows == score(directory, out).rows


@pytest.mark.parametrize("packs", [True, False])
def test_texts_do_not_tie_over_a_base_in_bf16(packs: bool, directory: Path) -> None:
    """A score in bf16 has 8 significant bits: of 400 texts most had that of another."""
    model, pad = reward_model(directory, dtype=torch.bfloat16), 0
    adapted(model)
    draw = np.random.default_rng(0).integers(5, 200, (400, 9)).tolist()
    examples = [BranchedRow((), (Example(tuple(ids), tuple(ids)),)) for ids in draw]
    with sharing_prefixes(model) as how:
        loss = Preferences(model, BradleyTerry(), how if packs else None, pad)
        scores, _ = scores_of(loss, examples)
    assert len(np.unique(scores)) >= 399


def test_a_head_in_fp32_files_is_read_in_fp32(directory: Path, tmp_path: Path) -> None:
    model = reward_model(directory, dtype=torch.bfloat16)
    adapted(model).merge()
    model.save_pretrained(tmp_path / "whole")
    load_tokenizer(directory).save_pretrained(tmp_path / "whole")
    again = reward_model(tmp_path / "whole", dtype=torch.bfloat16)
    assert model.score.weight.dtype == torch.float32
    assert torch.equal(again.score.weight, model.score.weight)
    assert not torch.equal(again.score.weight, again.score.weight.bfloat16().float())


@pytest.mark.few(1)
@pytest.mark.parametrize("storage", ["nf4", pytest.param("int8", marks=pytest.mark.slow), "bf16"])
def test_a_quantized_base_scores_as_it_was_trained(storage: str, directory, tmp_path) -> None:
    how = {"storage": storage, "lr": 1e-2, "steps": 30, "eval_rows": ROWS}
    result = fit(directory, tmp_path / "a", **how)
    found = score(directory, tmp_path / "a", storage=storage)
    assert found.figures is not None
    assert found.figures.right.accuracy == result.figures["accuracy"]
    assert found.figures.margin == pytest.approx(result.figures["margin"], rel=0.05)


@pytest.mark.slow
def test_the_estimate_of_a_step_is_what_it_takes(directory: Path) -> None:
    config = read_configuration(str(directory))
    setting = MemorySetting(
        Storage(torch.float32), lf.LoRA(), beside=lambda m: {"modules_to_save": head_paths(m)},
        rows=(90, 70, 120, 60), classes=1,
    )  # fmt: skip

    def fake() -> Any:
        return fake_model(config, setting.base, config.num_hidden_layers, 1)

    measured = measure(fake, setting, torch.device("cpu"))
    assert estimate(config, setting).total == pytest.approx(measured, rel=0.05)


def test_calibration_of_a_scorer_that_is_right_as_often_as_it_is_sure() -> None:
    # of 100 pairs with d = +-log 4 it is sure to 0.8, and right in 80; of 100 with log 9 in 90
    d = np.repeat([math.log(4), -math.log(4), math.log(9), -math.log(9)], [80, 20, 90, 10])
    scores = np.stack([d, np.zeros_like(d)], 1)
    found = reward_figures(scores, np.ones((200, 2), int))
    assert found.calibration_error == pytest.approx(0, abs=1e-9)
    assert (found.right.n, found.right.accuracy) == (200, 170 / 200)
    assert found.right.accuracy_interval == wilson(170, 200)
    assert [(one.confidence, one.observed.n) for one in found.calibration] == [
        (pytest.approx(0.8), 100), (pytest.approx(0.9), 100)
    ]  # fmt: skip
    assert [one.observed.accuracy for one in found.calibration] == [0.8, 0.9]
    # Brier: p (1 - p) of each half; log loss: their entropies
    assert found.brier == pytest.approx((0.8 * 0.2 + 0.9 * 0.1) / 2)
    entropy = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (0.8, 0.9)]
    assert found.log_loss == pytest.approx(sum(entropy) / 2)
    assert found.margin == pytest.approx((0.6 * math.log(4) + 0.8 * math.log(9)) / 2)
    # the same scorer, three times as sure of itself
    sure = reward_figures(3 * scores, np.ones((200, 2), int))
    off = [abs(p - 1 / (1 + math.exp(-3 * math.log(p / (1 - p))))) for p in (0.8, 0.9)]
    assert sure.calibration_error == pytest.approx(sum(off) / 2)
    # which completion is called the chosen one turns right into wrong, and no more
    turn_rounded = reward_figures(scores[:, ::-1], np.ones((200, 2), int))
    assert turn_rounded.right.accuracy == pytest.approx(1 - 170 / 200)
    assert [one.confidence for one in turn_rounded.calibration] == [
        pytest.approx(one.confidence) for one in found.calibration
    ]


def test_a_scorer_of_length_is_found_out() -> None:
    tokens = np.random.default_rng(0).integers(1, 50, (60, 2))
    tokens[:5, 1] = tokens[:5, 0]  # some pairs of equal length
    by_length = reward_figures(0.1 * tokens, tokens)
    assert by_length.length_correlation == pytest.approx(1)
    longer, shorter = (tokens[:, 0] > tokens[:, 1]).sum(), (tokens[:, 0] < tokens[:, 1]).sum()
    assert (by_length.chosen_longer.n, by_length.chosen_longer.accuracy) == (longer, 1)
    assert (by_length.chosen_shorter.n, by_length.chosen_shorter.accuracy) == (shorter, 0)
    assert by_length.chosen_shorter.accuracy_interval == wilson(0, int(shorter))
    assert reward_figures(-0.1 * tokens, tokens).length_correlation == pytest.approx(-1)
    # it sees ranks alone
    assert reward_figures(np.exp(tokens / 9), tokens).length_correlation == pytest.approx(1)
    constant = reward_figures(np.zeros((60, 2)), tokens)
    assert constant.length_correlation is None
    assert constant.right.accuracy == 0  # a tie is not right
    assert "none" in str(constant)


def test_the_correlation_is_that_of_torch_on_ranks_without_ties() -> None:
    x, y = (np.random.default_rng(n).permutation(40).astype(float) for n in (1, 2))
    expected = float(torch.corrcoef(torch.tensor(np.stack([x, y])))[0, 1])
    found = reward_figures(x.reshape(20, 2), y.reshape(20, 2).astype(int))
    assert found.length_correlation == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.estimated
def test_commands_from_training_to_scores(directory: Path, tmp_path: Path) -> None:
    out, scores = tmp_path / "a", tmp_path / "scores.jsonl"
    data = rows_file(tmp_path / "rows.jsonl", ROWS)
    how: dict[str, Any] = {"model": directory, "storage": "fp32", "device": "cpu"}
    objective = {"objective": "reward", "objective_options": "centre=0.01"}
    steps = {"set": ["steps=30", "lr=0.01", "batch=8"]}
    trained = printed("train", **how, **objective, **steps, data=data, out=out, eval_data=data)
    figures = trained["figures"]
    assert figures["accuracy"] == 1

    given = words(adapter=out, **how)
    measured = printed("score", *given, data=data, out=scores)
    assert measured["margin"] == pytest.approx(figures["margin"], rel=1e-4)
    assert measured["n"] == sum(one["n"] for one in measured["calibration"]) == len(ROWS)
    assert measured["chosen_longer"]["n"] + measured["chosen_shorter"]["n"] <= len(ROWS)
    lines = [json.loads(text) for text in scores.read_text().splitlines()]
    assert [one["row"] for one in lines] == list(range(1, len(ROWS) + 1))
    assert all(one["chosen"] > one["rejected"] for one in lines)

    of_rows = ["score", *given, "--data", str(data)]
    text = lorafold(*of_rows, "--json").stdout
    assert [json.loads(line) for line in text.splitlines()] == [*lines, measured]
    told = lorafold(*of_rows).stdout
    first = ["1", f"{lines[0]['chosen']:.4f}", f"{lines[0]['rejected']:.4f}"]
    assert told.splitlines()[0].split("\t") == first
    assert f"{len(ROWS)} pairs: accuracy 100.0%" in told
    assert "pass --overwrite" in error_of(*of_rows, "--out", str(scores))
    assert lorafold(*of_rows, "--out", str(scores), "--overwrite").returncode == 0
    texts = rows_file(tmp_path / "texts.jsonl", [{"text": "It rains."}, {"text": "A fox."}])
    assert lorafold("score", *given, "--data", str(texts)).stdout.count("\n") == 3

    single = rows_file(tmp_path / "sft.jsonl", [{"prompt": "a", "completion": "b"}])
    for command in (
        words("eval", data=data), words("eval", data=single), words("generate", prompt="x"),
        ["chat"],
    ):  # fmt: skip
        refused = error_of(*command, *given)
        assert "found a reward model, expected a language model" in refused
        assert "lorafold lab score" in refused
    plain = error_of(*words("score", data=data, model=directory))
    assert "found no reward model, expected a reward model" in plain


LABELLED = [{"text": f"text {n}", "label": n % 2} for n in range(4)]


def test_what_can_t_be_used_is_one_line(trained: tuple[Path, Path], tmp_path: Path) -> None:
    directory, out = trained
    lm, classes, none = (tmp_path / name for name in ("lm", "classes", "none"))
    with running(directory, out) as server:
        (told,) = server.parts.registry.rejected.values()
    assert "an adapter of a classifier or a reward model, expected one of a language" in told
    fit(directory, classes, LABELLED, objective="classify", steps=1, batch=2)
    fit(directory, lm, objective="sft", steps=1)
    two = load_classifier(resolve_model(directory), ("a", "b"), 0, torch.float32)
    same = {**ROWS[1], "rejected": ROWS[1]["chosen"]}
    long = [{"prompt": "x " * 90, "completion": "y"}, {"prompt": "x", "completion": "y"}]
    of_classes = "found a classifier of 0, 1, expected a reward model"
    of_language = "found a reward model, expected an adapter of a lang"
    cases: list[tuple[str, Callable[[], Any]]] = [
        (of_language, lambda: merge(str(directory), [out], none)),
        (of_language, lambda: lf.compose([out, out], none, model=str(directory))),
        (of_classes, lambda: score(directory, classes)),
        (of_classes, lambda: fit(directory, none, init_adapter=classes)),
        ("adapter: found a reward model, expected a classif",
         lambda: lf.evaluate(str(directory), LABELLED, adapters=out)),
        (r"--init-adapter .*lm: the adapter has no score, which the obj",
         lambda: fit(directory, none, init_adapter=lm)),
        ("score", lambda: lf.load(two, out)),
        ("SequenceClassification with num_labels 2: not a",
         lambda: score_rows(two, load_tokenizer(directory), ROWS, 64)),
        (r"rows of \{prompt, completion\}, which are for", lambda: fit(directory, none, [JUDGED])),
        (r"row 2: .*chosen and rejected: found the same text",
         lambda: score(directory, out, rows=[ROWS[0], same])),
        ("data: rows 1: found no assistant turn within",
         lambda: score(directory, out, rows=long, max_length=32)),
    ]  # fmt: skip
    for told, work in cases:
        with pytest.raises(LorafoldError, match=told):
            work()
    for objective, rows in {"sft": ROWS, "dpo": ROWS, "classify": LABELLED}.items():
        with pytest.raises(LorafoldError, match="adapter"):
            fit(directory, none, rows, objective=objective, init_adapter=out, batch=2)
    assert not none.exists()


@pytest.mark.slow
def test_a_head_over_the_adapter_of_a_supervised_run(directory: Path, tmp_path: Path) -> None:
    lm, rm = tmp_path / "lm", tmp_path / "rm"
    fit(directory, lm, objective="sft", steps=4, lr=1e-2)
    result = fit(directory, rm, over=(lm,), steps=20, lr=1e-2, eval_rows=ROWS)
    found = score(directory, lm, rm)
    assert found.figures is not None
    assert found.figures.margin == pytest.approx(result.figures["margin"], rel=1e-4)


def test_a_warm_start_goes_on_from_its_head(trained: tuple[Path, Path], tmp_path: Path) -> None:
    directory, out = trained
    result = fit(directory, tmp_path / "b", init_adapter=out, lr=1e-5)
    fresh = fit(directory, tmp_path / "c", lr=1e-5)
    assert result.losses[0] < 0.5 * fresh.losses[0]
    heads = [
        load_file(path / "adapter_model.safetensors")["base_model.model.score.weight"]
        for path in (out, tmp_path / "b")
    ]
    torch.testing.assert_close(*heads, rtol=0, atol=1e-3)
