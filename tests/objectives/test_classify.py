"""`--objective classify` on tiny models: every kind of method with a trained head, exact
resumption, accuracy, and errors in one line.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
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
from typer.testing import CliRunner

import lorafold as lf
from classify_cases import ROWS, TEXTS, quiet, request
from lorafold.api.merge import merge
from lorafold.cli import app
from lorafold.data.classification import classes_of, encode_labelled
from lorafold.data.rows import check_rows
from lorafold.errors import LorafoldError
from lorafold.evaluation import evaluate, held_out_loss, wilson
from lorafold.models.classifier import head_paths, load_classifier
from lorafold.models.sources import resolve_model
from lorafold.models.tokenizer import load_tokenizer
from lorafold.objectives import OBJECTIVES
from lorafold.recipe.recipe import Recipe
from lorafold.training.preview import show
from lorafold.training.run import train
from lorafold.training_step.classification_loss import Classification

pytestmark = pytest.mark.usefixtures("unestimated")

SFT_ROWS = [{"prompt": "a", "completion": "b"}]


def classifier(
    directory: Path, classes: tuple[str, ...] = tuple(sorted(TEXTS)), seed: int = 0
) -> Any:
    return load_classifier(
        resolve_model(directory),
        classes,
        load_tokenizer(directory).pad_token_id,
        torch.float32,
        seed=seed,
    )


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
    method: str, tiny_model_dir, tmp_path: Path
) -> None:
    directory = tiny_model_dir("llama")
    result = train(
        request(directory, tmp_path / "a", method=method, lr=1e-2, steps=60, eval_rows=ROWS),
        quiet(),
    )
    # the right class gets over a half on (geometric) average, a third by guessing
    assert result.eval_loss < math.log(2)
    record = json.loads((tmp_path / "a" / "lorafold.json").read_text())
    assert record["classes"] == ["alarm", "booking", "weather"]
    assert "score.weight" not in record["base"]
    keys = [
        key for key in load_file(tmp_path / "a" / "adapter_model.safetensors") if "score" in key
    ]
    assert keys == ["base_model.model.score.weight"]
    # another fresh head: the saved one must take its place
    model, tokenizer = classifier(directory, seed=1), load_tokenizer(directory)
    lf.load(model, tmp_path / "a")
    assert held_out_loss(
        Classification(model, 0), encode_labelled(ROWS, tokenizer, 64, record["classes"]).examples
    ) == pytest.approx(result.eval_loss, rel=1e-5)
    found = evaluate(model, tokenizer, ROWS, 64)
    assert found.loss == pytest.approx(result.eval_loss, rel=1e-5)  # fp32, other batches
    # better than guessing one class, beyond chance
    assert found.exact_match > wilson(len(ROWS) // 3, len(ROWS))[1]
    hits = sum(answer.answer == row["label"] for answer, row in zip(found.rows, ROWS, strict=True))
    assert (found.exact_match, found.exact_match_interval) == (
        hits / len(ROWS),
        wilson(hits, len(ROWS)),
    )


def test_only_the_head_is_trained_by_a_probe_and_beside_the_method_by_others(
    tiny_model_dir, tmp_path: Path
) -> None:
    probe = train(
        request(tiny_model_dir("llama"), tmp_path / "probe", method="linear-probe", steps=1),
        quiet(),
    )
    assert probe.trainable_parameters == 3 * 32
    lora = train(
        request(tiny_model_dir("llama"), tmp_path / "lora", rank=2, targets=["q_proj"], steps=1),
        quiet(),
    )
    assert lora.trainable_parameters == 3 * 32 + 2 * 2 * (32 + 32)


def test_a_run_says_that_its_loss_is_no_better_than_guessing(
    tiny_model_dir, tmp_path: Path
) -> None:
    """No label follows from these texts, of which three quarters have one."""
    rows = [{"text": "Book a table", "label": label} for label in ["a", "a", "a", "b"] * 9]
    console = Console(file=StringIO(), width=400)
    asked = {"method": "linear-probe", "lr": 1e-3}
    first = request(tiny_model_dir("llama"), tmp_path / "a", rows, steps=60, **asked)
    result = train(first, console)
    entropy = math.log(4) - 0.75 * math.log(3)
    assert result.guessing["guessing"] == pytest.approx(entropy)
    assert result.guessing["loss"] == pytest.approx(sum(result.losses[-50:]) / 50)
    assert not result.guessing["better"]
    told = rf"no better than guessing \({entropy:.4f}\)"
    line = rf"step 52: so far the loss is [\d.]+, {told}.* Try more"
    assert re.search(line, console.file.getvalue())
    assert re.search(told, str(result))
    assert json.loads((tmp_path / "a" / "lorafold.json").read_text())["guessing"] == result.guessing
    again = replace(first, resume=True)
    assert re.search(told, str(train(again, quiet())))


@pytest.mark.parametrize(
    ("asked", "rate"), [({}, "4e-4"), ({"lr": 1e-4}, "4e-4"), ({"lr_b": 5e-3}, "5e-3")]
)
def test_up_factors_have_a_lower_rate_than_for_completions(
    asked: dict[str, float], rate: str, tiny_model_dir, tmp_path: Path
) -> None:
    console = Console(file=StringIO(), width=400)
    train(request(tiny_model_dir("llama"), tmp_path / "a", steps=1, **asked), console)
    assert f"; up factors (LoRA+) {rate}\n" in console.file.getvalue()


@pytest.mark.parametrize("steps", [8, 60])
def test_a_run_that_learns_or_is_short_does_not_say_so(
    steps: int, tiny_model_dir, tmp_path: Path
) -> None:
    console = Console(file=StringIO(), width=400)
    result = train(request(tiny_model_dir("llama"), tmp_path / "a", lr=1e-2, steps=steps), console)
    assert result.guessing.get("better") == (True if steps == 60 else None)
    assert "guessing" not in console.file.getvalue() + str(result)


@pytest.mark.estimated
@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["qwen2", "gemma", "gpt2"])
def test_every_family_has_a_classifier(kind: str, tiny_model_dir, tmp_path: Path) -> None:
    result = train(
        request(tiny_model_dir(kind), tmp_path / "a", lr=1e-2, steps=60, eval_rows=ROWS), quiet()
    )
    assert result.eval_loss < math.log(2)
    lf.load(classifier(tiny_model_dir(kind)), tmp_path / "a")


@pytest.mark.slow
def test_an_encoder_has_one_too(tiny_model_dir, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_dir("llama"))
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": len(tokenizer),
    }
    BertModel(BertConfig(**sizes, pad_token_id=0)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    result = train(
        request(tmp_path / "bert", tmp_path / "a", lr=1e-2, steps=60, eval_rows=ROWS), quiet()
    )
    assert result.eval_loss < math.log(2)
    assert {"classifier.weight", "classifier.bias"} == {
        key.removeprefix("base_model.model.")
        for key in load_file(tmp_path / "a" / "adapter_model.safetensors")
        if "classifier" in key
    }


def test_loss_and_accuracy_are_those_of_each_text_alone(tiny_model_dir) -> None:
    model, tokenizer = classifier(tiny_model_dir("llama")), load_tokenizer(tiny_model_dir("llama"))
    with torch.no_grad():
        outputs = [
            model(
                torch.tensor([tokenizer(row["text"]).input_ids]),
                labels=torch.tensor([model.config.label2id[row["label"]]]),
            )
            for row in ROWS
        ]
    chosen = [model.config.id2label[int(output.logits.argmax())] for output in outputs]
    found = evaluate(model, tokenizer, ROWS, 64)
    assert found.loss == pytest.approx(
        sum(float(output.loss) for output in outputs) / len(ROWS), rel=1e-5
    )
    assert [answer.answer for answer in found.rows] == chosen


def test_the_fresh_head_follows_from_the_seed(tiny_model_dir) -> None:
    state = torch.get_rng_state()
    first, again, other = (
        classifier(tiny_model_dir("llama"), seed=s).score.weight for s in (3, 3, 4)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert head_paths(classifier(tiny_model_dir("gpt2"))) == ("score",)


@pytest.mark.slow
def test_resuming_gives_the_bytes_of_a_run_that_never_stopped(
    tiny_model_dir, tmp_path: Path
) -> None:
    train(request(tiny_model_dir("llama"), tmp_path / "straight", steps=12, save_every=4), quiet())
    command = [sys.executable, "-c", KILLED, str(tiny_model_dir("llama")), str(tmp_path / "killed")]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    train(
        request(tiny_model_dir("llama"), tmp_path / "killed", steps=12, save_every=4, resume=True),
        quiet(),
    )
    ours, theirs = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes()
        for name in ("killed", "straight")
    )
    assert ours == theirs


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, "tests/lib")
from classify_cases import quiet, request
from lorafold.training import loop
step = loop.train_step
def killing(job, rows, i):
    if i == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(job, rows, i)
loop.train_step = killing
from lorafold.training.run import train
train(request(Path(sys.argv[1]), Path(sys.argv[2]), steps=12, save_every=4), quiet())
"""


def test_micro_batches_add_up(tiny_model_dir, tmp_path: Path) -> None:
    whole = train(request(tiny_model_dir("llama"), tmp_path / "a", dropout=0.0), quiet())
    parts = train(
        request(tiny_model_dir("llama"), tmp_path / "b", dropout=0.0, accumulate=3), quiet()
    )
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)


@pytest.mark.slow
def test_a_warm_start_keeps_the_classes(tiny_model_dir, tmp_path: Path) -> None:
    first = train(request(tiny_model_dir("llama"), tmp_path / "a", lr=1e-2, steps=30), quiet())
    fewer = [row for row in ROWS if row["label"] != "booking"]
    second = train(
        request(
            tiny_model_dir("llama"), tmp_path / "b", fewer, init_adapter=tmp_path / "a", lr=1e-4
        ),
        quiet(),
    )
    assert second.losses[0] < first.losses[0]
    assert json.loads((tmp_path / "b" / "lorafold.json").read_text())["classes"] == [
        "alarm",
        "booking",
        "weather",
    ]
    other = [{**row, "label": f"no {row['label']}"} for row in ROWS]
    with pytest.raises(
        LorafoldError,
        match=r"labels no alarm, no booking, no weather, expected the classes of .*a: alarm, ",
    ):
        train(
            request(tiny_model_dir("llama"), tmp_path / "c", other, init_adapter=tmp_path / "a"),
            quiet(),
        )


def test_classes_are_sorted_numbers_by_size() -> None:
    assert classes_of([{"text": "t", "label": n} for n in (10, 9, 0, 9)]) == ("0", "9", "10")
    assert classes_of([{"text": "t", "label": n} for n in ("b", "a", 1, "1")]) == ("1", "a", "b")


@pytest.mark.parametrize("template", ["[CLS] $A [SEP]", "$A [SEP]", "[CLS] $A"])
def test_a_text_that_is_cut_keeps_the_tokens_that_close_it(template: str) -> None:
    """As the tokenizer itself truncates it: a T5 classifier counts them, a BERT has seen no text
    without.
    """
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


def test_long_texts_are_cut_and_counted(tiny_model_dir) -> None:
    tokenizer = load_tokenizer(tiny_model_dir("llama"))
    data = encode_labelled(ROWS, tokenizer, 8, sorted(TEXTS))
    lengths = [len(tokenizer(row["text"]).input_ids) for row in ROWS]
    assert [len(e.ids) for e in data.examples] == [min(8, n) for n in lengths]
    assert data.report.truncated == sum(n > 8 for n in lengths)
    assert f"the longest row has {max(lengths)} tokens" in str(data.report)
    assert f"{data.report.truncated} rows were cut at 8 tokens" in str(data.report)


def test_what_is_wrong_with_rows_is_one_line(tiny_model_dir, tmp_path: Path) -> None:
    with pytest.raises(
        LorafoldError,
        match=(
            r"row 2: field label: found 1.5, expected text or a whole number; row 3: .*found true"
        ),
    ):
        check_rows(
            enumerate([{"text": "a", "label": label} for label in ("x", 1.5, True)], 1), "rows"
        )
    model, out = tiny_model_dir("llama"), tmp_path / "a"
    with pytest.raises(
        LorafoldError,
        match=(
            r"rows of \{prompt, completion\}, which are for --objective sft or kto; --objective"
            r" classify expects"
        ),
    ):
        train(request(model, out, SFT_ROWS), quiet())
    with pytest.raises(
        LorafoldError,
        match=(
            r"rows of \{text, label\}, which are for --objective classify; --objective sft expects"
            r" rows of"
        ),
    ):
        train(request(model, out, objective="sft"), quiet())
    with pytest.raises(
        LorafoldError, match=r"label: found 'alarm' in every row, expected at least two classes"
    ):
        train(request(model, out, [row for row in ROWS if row["label"] == "alarm"]), quiet())
    with pytest.raises(
        LorafoldError,
        match=r"row 1: field label: found 'joke', expected one of alarm, booking, weather",
    ):
        train(request(model, out, eval_rows=[{"text": "Why?", "label": "joke"}]), quiet())
    with pytest.raises(LorafoldError, match=r"row 37: field text: found no token"):
        train(request(model, out, [*ROWS, {"text": "", "label": "alarm"}]), quiet())
    assert list(tmp_path.iterdir()) == []


def test_the_preview_shows_text_and_class(tiny_model_dir, tmp_path: Path) -> None:
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    show(request(tiny_model_dir("llama"), tmp_path / "a"), console)
    assert "Book a table for 0 ⟦booking⟧" in console.export_text()


def test_peft_computes_the_same_from_the_files(tiny_model_dir, tmp_path: Path) -> None:
    train(request(tiny_model_dir("llama"), tmp_path / "a", lr=1e-2, dropout=0.0), quiet())
    ours, theirs = (
        classifier(tiny_model_dir("llama"), seed=1),
        classifier(tiny_model_dir("llama"), seed=2),
    )
    lf.load(ours, tmp_path / "a")
    wrapped = PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    assert isinstance(wrapped, PeftModelForSequenceClassification)
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, wrapped(ids).logits)


def test_an_adapter_merged_in_memory_is_a_plain_classifier(tiny_model_dir, tmp_path: Path) -> None:
    directory = tiny_model_dir("llama")
    train(request(directory, tmp_path / "a", lr=1e-2), quiet())
    model, tokenizer = classifier(directory), load_tokenizer(directory)
    adapter = lf.load(model, tmp_path / "a")
    before = evaluate(model, tokenizer, ROWS, 64)
    adapter.merge()
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert evaluate(plain, tokenizer, ROWS, 64).loss == pytest.approx(before.loss, rel=1e-5)
    with pytest.raises(
        LorafoldError,
        match="a classifier of alarm, booking, weather, expected an adapter of a language",
    ):
        merge(str(directory), [tmp_path / "a"], tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
@pytest.mark.estimated
def test_commands_from_training_to_evaluation(tiny_model_dir, tmp_path: Path) -> None:
    directory, data = str(tiny_model_dir("llama")), tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sft = tmp_path / "sft.jsonl"
    sft.write_text(json.dumps(SFT_ROWS[0]) + "\n")

    def lorafold(*arguments: object) -> Any:
        return CliRunner().invoke(
            app, [*map(str, arguments), "--model", directory, "--device", "cpu", "--json"]
        )

    made = lorafold(
        "train",
        "--data",
        data,
        "--out",
        tmp_path / "a",
        "--objective",
        "classify",
        "--set",
        "steps=30",
        "--set",
        "lr=0.01",
    )
    assert made.exit_code == 0, made.output
    found = lorafold("eval", "--data", data, "--adapter", tmp_path / "a")
    assert found.exit_code == 0, found.output
    figures = json.loads(found.stdout.splitlines()[-1])
    assert figures["n"] == len(ROWS)
    assert figures["exact_match"] > wilson(len(ROWS) // 3, len(ROWS))[1]
    for arguments, message in {
        ("eval", "--data", data): "found no classifier, expected a classifier",
        (
            "eval",
            "--data",
            sft,
            "--adapter",
            tmp_path / "a",
        ): "found a classifier of alarm, booking, weather, expected a language model",
        ("generate", "--prompt", "x", "--adapter", tmp_path / "a"): "expected a language model",
    }.items():
        failed = lorafold(*arguments)
        with pytest.raises(LorafoldError, match=message):
            raise failed.exception


def test_a_drawn_head_below_is_no_part_of_the_base(tiny_model_dir, tmp_path: Path) -> None:
    """It is drawn in the dtype of the base, so that what was trained over a classifier on fp32 was
    of another base than the same files on bf16. Records of before have it.
    """
    base = tiny_model_dir("llama")
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


def test_a_drawn_head_is_trained_whole(tiny_model_dir, tmp_path: Path) -> None:
    """What LoRA adds to a head that is saved nowhere is nothing: such runs could not be used."""
    recipe = Recipe(objective="classify", targets=["score"], steps=1, batch=9, storage="fp32")
    with pytest.raises(LorafoldError, match=r"score alone, a new head.* --method linear-probe"):
        lf.train(recipe, model=tiny_model_dir("llama"), data=ROWS, out=tmp_path / "one")
    assert not (tmp_path / "one").exists()
