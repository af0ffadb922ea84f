"""`--objective classify` on tiny models: every kind of method, resumption, accuracy, refusals."""

import json
import math
import os
import re
import signal
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftModelForSequenceClassification
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)

import lorafold as lf
from classify_cases import ROWS, TEXTS, quiet, request
from conftest import lorafold
from lorafold.api.merge import merge
from lorafold.data.classification import classes_of, encode_labelled
from lorafold.data.rows import check_rows
from lorafold.errors import LorafoldError
from lorafold.evaluation import evaluate, held_out_loss
from lorafold.evaluation.intervals import wilson
from lorafold.models.classifier import head_paths, load_classifier
from lorafold.models.sources import resolve_model
from lorafold.models.tokenizer import load_tokenizer
from lorafold.objectives import OBJECTIVES
from lorafold.recipe.recipe import Recipe
from lorafold.training import loop
from lorafold.training.preview import show
from lorafold.training.run import train
from lorafold.training_step.classification_loss import Classification
from process_cases import same_bytes
from training_cases import killed

pytestmark = pytest.mark.usefixtures("unestimated")


def classifier(directory: Path, seed: int = 0) -> Any:
    source, pad = resolve_model(directory), load_tokenizer(directory).pad_token_id
    return load_classifier(source, tuple(sorted(TEXTS)), pad, torch.float32, seed=seed)


@pytest.fixture
def directory(tiny_model_dir) -> Path:
    return tiny_model_dir("llama")


@pytest.fixture
def fit(tiny_model_dir, tmp_path: Path) -> Any:
    """Trains a tiny model into the directory of a name."""

    def fitted(out: str = "a", rows: Any = ROWS, model: Any = "llama", **fields: Any) -> Any:
        console = fields.pop("console", quiet())
        directory = tiny_model_dir(model) if isinstance(model, str) else model
        return train(request(directory, tmp_path / out, rows, **fields), console)

    return fitted


@pytest.fixture
def console() -> Console:
    return Console(file=StringIO(), width=400)


def test_the_recipe_names_the_objectives_of_the_table() -> None:
    for name in OBJECTIVES:
        assert Recipe(objective=name).objective == name
    with pytest.raises(LorafoldError, match=r"'sft', 'classify', .* or 'cispo'"):
        Recipe(objective="other")


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "method", ["linear-probe", "lora", "dora", "ia3", "bitfit", "houlsby", "prompt", "prefix"]
)
def test_every_method_trains_a_head_with_it_and_comes_back(
    method: str, fit, directory: Path, tmp_path: Path
) -> None:
    result = fit(method=method, lr=1e-2, steps=60, eval_rows=ROWS)
    # the right class gets over a half on (geometric) average, a third by guessing
    assert result.eval_loss < math.log(2)
    record = json.loads((tmp_path / "a" / "lorafold.json").read_text())
    assert record["classes"] == ["alarm", "booking", "weather"]
    assert "score.weight" not in record["base"]
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert [key for key in saved if "score" in key] == ["base_model.model.score.weight"]
    # another fresh head: the saved one must take its place
    model, tokenizer = classifier(directory, seed=1), load_tokenizer(directory)
    lf.load(model, tmp_path / "a")
    examples = encode_labelled(ROWS, tokenizer, 64, record["classes"]).examples
    loss = held_out_loss(Classification(model, 0), examples)
    assert loss == pytest.approx(result.eval_loss, rel=1e-5)
    found = evaluate(model, tokenizer, ROWS, 64)
    assert found.loss == pytest.approx(result.eval_loss, rel=1e-5)  # fp32, other batches
    # better than guessing one class, beyond chance
    assert found.exact_match > wilson(len(ROWS) // 3, len(ROWS))[1]
    hits = sum(answer.answer == row["label"] for answer, row in zip(found.rows, ROWS, strict=True))
    assert found.exact_match == hits / len(ROWS)
    assert found.exact_match_interval == wilson(hits, len(ROWS))


def test_only_the_head_is_trained_by_a_probe_and_beside_the_method_by_others(fit) -> None:
    assert fit(method="linear-probe", steps=1).trainable_parameters == 3 * 32
    lora = fit("lora", rank=2, targets=["q_proj"], steps=1)
    assert lora.trainable_parameters == 3 * 32 + 2 * 2 * (32 + 32)


def test_a_run_says_that_its_loss_is_no_better_than_guessing(
    fit, console: Console, tmp_path: Path
) -> None:
    """No label follows from these texts, of which three quarters have one."""
    rows = [{"text": "Book a table", "label": label} for label in ["a", "a", "a", "b"] * 9]
    asked = {"method": "linear-probe", "lr": 1e-3, "steps": 60}
    result = fit("a", rows, console=console, **asked)
    entropy = math.log(4) - 0.75 * math.log(3)
    assert result.guessing["guessing"] == pytest.approx(entropy)
    assert result.guessing["loss"] == pytest.approx(sum(result.losses[-50:]) / 50)
    assert not result.guessing["better"]
    told = rf"no better than guessing or the untrained model \({entropy:.4f}\)"
    line = rf"step 52: so far the loss is [\d.]+, {told}.* Try more"
    assert re.search(line, console.file.getvalue())
    assert re.search(told, str(result))
    assert json.loads((tmp_path / "a" / "lorafold.json").read_text())["guessing"] == result.guessing
    assert re.search(told, str(fit("a", rows, resume=True, **asked)))


@pytest.mark.parametrize(
    ("asked", "rate"), [({}, "4e-4"), ({"lr": 1e-4}, "4e-4"), ({"lr_b": 5e-3}, "5e-3")]
)
def test_up_factors_have_a_lower_rate_than_for_completions(
    asked: dict[str, float], rate: str, fit, console: Console
) -> None:
    fit(steps=1, console=console, **asked)
    assert f"; up factors (LoRA+) {rate}\n" in console.file.getvalue()


@pytest.mark.parametrize("steps", [8, 60])
def test_a_run_that_learns_or_is_short_does_not_say_so(steps: int, fit, console: Console) -> None:
    result = fit(lr=1e-2, steps=steps, console=console)
    assert result.guessing.get("better") == (True if steps == 60 else None)
    assert "guessing" not in console.file.getvalue() + str(result)


@pytest.mark.estimated
@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["qwen2", "gemma", "gpt2"])
def test_every_family_has_a_classifier(kind: str, fit, tiny_model_dir, tmp_path: Path) -> None:
    result = fit(model=kind, lr=1e-2, steps=60, eval_rows=ROWS)
    assert result.eval_loss < math.log(2)
    lf.load(classifier(tiny_model_dir(kind)), tmp_path / "a")


@pytest.mark.slow
def test_an_encoder_has_one_too(fit, directory: Path, tmp_path: Path) -> None:
    tokenizer, bert = load_tokenizer(directory), tmp_path / "bert"
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        vocab_size=len(tokenizer), pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(bert)
    tokenizer.save_pretrained(bert)
    result = fit(model=bert, lr=1e-2, steps=60, eval_rows=ROWS)
    assert result.eval_loss < math.log(2)
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    found = {key.removeprefix("base_model.model.") for key in saved if "classifier" in key}
    assert found == {"classifier.weight", "classifier.bias"}


def test_loss_and_accuracy_are_those_of_each_text_alone(directory: Path) -> None:
    model, tokenizer = classifier(directory), load_tokenizer(directory)
    outputs = []
    with torch.no_grad():
        for row in ROWS:
            ids = torch.tensor([tokenizer(row["text"]).input_ids])
            label = torch.tensor([model.config.label2id[row["label"]]])
            outputs.append(model(ids, labels=label))
    chosen = [model.config.id2label[int(output.logits.argmax())] for output in outputs]
    found = evaluate(model, tokenizer, ROWS, 64)
    mean = sum(float(output.loss) for output in outputs) / len(ROWS)
    assert found.loss == pytest.approx(mean, rel=1e-5)
    assert [answer.answer for answer in found.rows] == chosen


def test_the_fresh_head_follows_from_the_seed(directory: Path, tiny_model_dir) -> None:
    state = torch.get_rng_state()
    first, again, other = (classifier(directory, seed=s).score.weight for s in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert head_paths(classifier(tiny_model_dir("gpt2"))) == ("score",)


@pytest.mark.slow
def test_resuming_gives_the_bytes_of_a_run_that_never_stopped(fit, directory, tmp_path) -> None:
    fit("straight", steps=12, save_every=4)
    killed(train_until_killed, directory, tmp_path / "killed")
    fit("killed", steps=12, save_every=4, resume=True)
    assert same_bytes(tmp_path / "killed", tmp_path / "straight")


def train_until_killed(model: Path, out: Path) -> None:
    step = loop.train_step

    def killing(job: Any, rows: Any, i: int) -> float:
        if i == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(job, rows, i)

    loop.train_step = killing
    train(request(model, out, steps=12, save_every=4), quiet())


def test_micro_batches_add_up(fit) -> None:
    whole, parts = fit(dropout=0.0), fit("b", dropout=0.0, accumulate=3)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)


@pytest.mark.slow
def test_a_warm_start_keeps_the_classes(fit, tmp_path: Path) -> None:
    first = fit(lr=1e-2, steps=30)
    fewer = [row for row in ROWS if row["label"] != "booking"]
    second = fit("b", fewer, init_adapter=tmp_path / "a", lr=1e-4)
    assert second.losses[0] < first.losses[0]
    record = json.loads((tmp_path / "b" / "lorafold.json").read_text())
    assert record["classes"] == ["alarm", "booking", "weather"]
    other = [{**row, "label": f"no {row['label']}"} for row in ROWS]
    told = r"labels no alarm, no booking, no weather, expected the classes of .*a: alarm, "
    with pytest.raises(LorafoldError, match=told):
        fit("c", other, init_adapter=tmp_path / "a")


def test_classes_are_sorted_numbers_by_size() -> None:
    assert classes_of([{"text": "t", "label": n} for n in (10, 9, 0, 9)]) == ("0", "9", "10")
    assert classes_of([{"text": "t", "label": n} for n in ("b", "a", 1, "1")]) == ("1", "a", "b")


@pytest.mark.parametrize("template", ["[CLS] $A [SEP]", "$A [SEP]", "[CLS] $A"])
def test_a_text_that_is_cut_keeps_the_tokens_that_close_it(template: str) -> None:
    """As the tokenizer itself truncates it."""
    words = {word: n for n, word in enumerate(("[UNK]", "[CLS]", "[SEP]", *"abcdef"))}
    inner = Tokenizer(WordLevel(words, "[UNK]"))
    inner.pre_tokenizer = Whitespace()
    special = [(word, words[word]) for word in ("[CLS]", "[SEP]")]
    inner.post_processor = TemplateProcessing(single=template, special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    rows = [{"text": "a b c d e f", "label": "x"}, {"text": "a", "label": "y"}]
    for n in (3, 5, 8):
        found = encode_labelled(rows, tokenizer, n, ("x", "y"))
        texts = [row["text"] for row in rows]
        expected = tokenizer(texts, truncation=True, max_length=n).input_ids
        assert [list(e.ids) for e in found.examples] == expected


def test_long_texts_are_cut_and_counted(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    data = encode_labelled(ROWS, tokenizer, 8, sorted(TEXTS))
    lengths = [len(tokenizer(row["text"]).input_ids) for row in ROWS]
    assert [len(e.ids) for e in data.examples] == [min(8, n) for n in lengths]
    assert data.report.truncated == sum(n > 8 for n in lengths)
    assert f"the longest row has {max(lengths)} tokens" in str(data.report)
    assert f"{data.report.truncated} rows were cut at 8 tokens" in str(data.report)


def test_bad_labels_are_named() -> None:
    told = r"row 2: field label: found 1.5, expected text or an integer; row 3: .*found true"
    rows = [{"text": "a", "label": label} for label in ("x", 1.5, True)]
    with pytest.raises(LorafoldError, match=told):
        check_rows(enumerate(rows, 1), "rows")


ALARMS = [row for row in ROWS if row["label"] == "alarm"]
JOKE = {"text": "Why?", "label": "joke"}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rows": [{"prompt": "a", "completion": "b"}]},
         r"rows of \{prompt, completion\}, which are for --objective sft or kto; --objective"
         r" classify expects"),
        ({"objective": "sft"},
         r"rows of \{text, label\}, which are for --objective classify; --objective sft expects"
         r" rows of"),
        ({"rows": ALARMS}, r"label: found 'alarm' in every row, expected at least two classes"),
        ({"rows": [{"text": f"t{n}", "label": f"{n * 0.37:.2f}"} for n in range(9)]},
         r"label: found another number in each row \(0\.00, 0\.37, .* and 4 more\), expected"),
        ({"eval_rows": [JOKE]},
         r"row 1: field label: found 'joke', expected one of alarm, booking, weather"),
        ({"rows": [*ROWS, {"text": "", "label": "alarm"}]}, r"row 37: field text: found no token"),
    ],
    ids=["pairs", "sft", "one class", "numbers", "another class", "no text"],
)  # fmt: skip
def test_bad_rows_are_named(fields: dict[str, Any], told: str, fit, tmp_path: Path) -> None:
    with pytest.raises(LorafoldError, match=told):
        fit(**fields)
    assert list(tmp_path.iterdir()) == []


def test_the_preview_shows_text_and_class(directory: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=100, file=StringIO())
    show(request(directory, tmp_path / "a"), console)
    assert "Book a table for 0 ⟦booking⟧" in console.export_text()


def test_peft_computes_the_same_from_the_files(fit, directory: Path, tmp_path: Path) -> None:
    fit(lr=1e-2, dropout=0.0)
    ours, theirs = (classifier(directory, seed=seed) for seed in (1, 2))
    lf.load(ours, tmp_path / "a")
    wrapped = PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    assert isinstance(wrapped, PeftModelForSequenceClassification)
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, wrapped(ids).logits)


def test_an_adapter_merged_in_memory_is_a_plain_classifier(fit, directory, tmp_path) -> None:
    fit(lr=1e-2)
    model, tokenizer = classifier(directory), load_tokenizer(directory)
    adapter = lf.load(model, tmp_path / "a")
    before = evaluate(model, tokenizer, ROWS, 64)
    adapter.merge()
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert evaluate(plain, tokenizer, ROWS, 64).loss == pytest.approx(before.loss, rel=1e-5)
    told = "a classifier of alarm, booking, weather, expected an adapter of a language"
    with pytest.raises(LorafoldError, match=told):
        merge(str(directory), [tmp_path / "a"], tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
@pytest.mark.estimated
def test_commands_from_training_to_evaluation(directory: Path, tmp_path: Path) -> None:
    data, sft, out = (tmp_path / name for name in ("rows.jsonl", "sft.jsonl", "a"))
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sft.write_text('{"prompt": "a", "completion": "b"}\n')

    def done(*arguments: object) -> Any:
        return lorafold(*map(str, arguments), "--model", str(directory), "--device", "cpu")

    asked = ("--objective", "classify", "--set", "steps=30", "--set", "lr=0.01")
    made = done("train", "--data", data, "--out", out, *asked)
    assert made.returncode == 0, made.stderr
    found = done("eval", "--data", data, "--adapter", out, "--json")
    assert found.returncode == 0, found.stderr
    figures = json.loads(found.stdout.splitlines()[-1])
    assert figures["n"] == len(ROWS)
    assert figures["exact_match"] > wilson(len(ROWS) // 3, len(ROWS))[1]
    of_classes = "found a classifier of alarm, booking, weather, expected a language model"
    for arguments, message in {
        ("eval", "--data", data): "found no classifier, expected a classifier",
        ("eval", "--data", sft, "--adapter", out): of_classes,
        ("generate", "--prompt", "x", "--adapter", out): "expected a language model",
    }.items():
        assert message in done(*arguments).stderr


def test_a_drawn_head_below_is_no_part_of_the_base(directory: Path, tmp_path: Path) -> None:
    """It is drawn in the dtype of the base; records of before have it."""
    base = directory
    recipe = Recipe(objective="classify", steps=3, batch=9, storage="fp32")
    lf.train(recipe, model=base, data=ROWS, out=tmp_path / "one", device="cpu")
    above = tmp_path / "two"
    lf.train(recipe, model=base, data=ROWS, out=above, over=[tmp_path / "one"], device="cpu")
    record = json.loads((above / "lorafold.json").read_text())
    assert "score.weight" not in record["base"]
    both = [tmp_path / "one", above]
    found = [
        lf.evaluate(base, ROWS, adapters=both, storage=storage, device="cpu").loss
        for storage in ("fp32", "bf16")
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-2)
    sample = {"shape": [3, 64], "dtype": "float32", "values": "3f" * 64}
    record["base"]["score.weight"] = sample
    (above / "manifest.json").unlink()
    (above / "lorafold.json").write_text(json.dumps(record))
    again = lf.evaluate(base, ROWS, adapters=both, storage="fp32", device="cpu")
    assert again.loss == found[0]


def test_a_drawn_head_is_trained_whole(directory: Path, tmp_path: Path) -> None:
    """What LoRA adds to a head that is saved nowhere is nothing: such runs could not be used."""
    recipe = Recipe(objective="classify", targets=["score"], steps=1, batch=9, storage="fp32")
    with pytest.raises(LorafoldError, match=r"only the new head, score,.* --method linear-probe"):
        lf.train(recipe, model=directory, data=ROWS, out=tmp_path / "one")
    assert not (tmp_path / "one").exists()
