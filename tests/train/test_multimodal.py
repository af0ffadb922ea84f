"""Models that take images or sounds beside text, trained on text by the command."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import lorafold as lf
from architectures import ARCHITECTURES, MULTIMODAL, near
from conftest import Done
from lorafold.adapter.coverage import text_only_note
from lorafold.models.architecture import text_auto_class
from multimodal_cases import write
from noise import moved
from typed_commands import done, result, run, write_rows

pytestmark = pytest.mark.usefixtures("unestimated")

ROWS = [{"prompt": f"{n} cats", "completion": f"{n + 1} cats sat"} for n in range(6)]
# one that sees, one that is padded instead of packed, and one that hears; the others are slow
FEW = ("llava", "qwen2.5-vl", "qwen2-audio")
EACH = [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in MULTIMODAL]
IDS = torch.tensor([[20, 31, 42, 53, 64, 75], [99, 88, 77, 66, 55, 44]])
# the widths and heads with which NF4 quantizes every matrix of the language model
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Callable[[str], Path]:
    """The directory of a tiny multimodal model, which all tests share."""
    return cache(lambda name: write(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


def train(model: Path, rows: Path, out: Path, options: str = "--storage fp32") -> Done:
    on = f"train --model {model} --data {rows} --out {out}"
    return run(f"{on} --epochs 2 --lr 1e-2 --json --verbose {options}")


@pytest.fixture(scope="module")
def trained(model_dir, rows: Path, tmp_path_factory) -> Callable[[str], tuple[Path, Done]]:
    """An adapter of a model that the command trained, and what it printed. Read only."""

    @cache
    def made(name: str) -> tuple[Path, Done]:
        out = tmp_path_factory.mktemp("trained") / name
        told = train(model_dir(name), rows, out)
        assert told.returncode == 0, told.stderr
        return out, told

    return made


def opened(path: Path) -> Any:
    """The model as transformers opens it."""
    return tf.AutoModelForMultimodalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:  # (n,)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
        return found.flatten()


@pytest.mark.estimated
@pytest.mark.few(1)
@pytest.mark.parametrize("name", EACH)
def test_trained_evaluated_generated_and_merged(name, model_dir, rows, trained, tmp_path) -> None:
    base, merged = model_dir(name), tmp_path / "merged"
    adapter, told = trained(name)
    kind, what = ("audio", "audio") if name == "qwen2-audio" else ("vision", "an image")
    said = f"training on text only: no row has {what}, so the {kind} encoder gets no input\n"
    assert said in told.stderr
    assert "memory: no estimate" not in told.stderr
    assert "fast path: 2 of 2 blocks\n" in told.stderr
    losses = json.loads(told.stdout.splitlines()[-1])["losses"]
    assert losses[-1] < losses[0]
    on = f"--model {base} --adapter {adapter}"
    assert result(f"eval {on} --storage fp32 --data {rows}")["loss"] < losses[0]
    done(f"generate {on} --storage fp32 --prompt cats --max-new-tokens 3")
    done(f"inspect {adapter} --model {base}")
    done(f"merge {on} --out {merged}")
    before, after = (load_file(path / "model.safetensors") for path in (base, merged))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(changed) == 14
    towers = ("vision", "visual", "audio", "projector", "connector")
    assert not [key for key in changed if any(part in key for part in towers)]
    model = lf.load_model(base, "fp32")
    assert type(model) is type(opened(base))
    lf.load(model, adapter)
    assert near(logits(opened(merged)), logits(model))


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_peft_reads_what_the_command_wrote(name: str, model_dir, trained) -> None:
    adapter, _ = trained(name)
    ours = lf.load_model(model_dir(name), "fp32")
    plain = logits(ours)
    lf.load(ours, adapter)
    theirs = peft.PeftModel.from_pretrained(opened(model_dir(name)), adapter).eval()
    assert near(logits(theirs), logits(ours))
    assert not near(logits(ours), plain)
    card = (adapter / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForMultimodalLM.from_pretrained(" in card


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_the_command_merges_what_peft_wrote(name: str, model_dir, tmp_path) -> None:
    torch.manual_seed(1)
    names = ["q_proj", "v_proj", "down_proj"]
    how = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(r=4, target_modules=names, **how)
    theirs = peft.get_peft_model(opened(model_dir(name)), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    on = f"--model {model_dir(name)} --adapter {tmp_path / 'theirs'}"
    done(f"merge {on} --out {tmp_path / 'merged'}")
    assert near(logits(opened(tmp_path / "merged")), logits(theirs))


def test_an_adapter_of_another_model_is_refused(model_dir, tmp_path: Path) -> None:
    model, other = lf.load_model(model_dir("llava"), "fp32"), write("llava", tmp_path / "other")
    lf.attach(model, lf.LoRA(rank=2)).save(tmp_path / "a")
    moved(changed := opened(other)).save_pretrained(other)
    assert dict(changed.named_parameters()).keys() == dict(opened(other).named_parameters()).keys()
    with pytest.raises(lf.LorafoldError, match="base"):
        lf.load(lf.load_model(other, "fp32"), tmp_path / "a")


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["full", "prompt", "houlsby"])
def test_other_ways_to_train(method: str, model_dir, rows, tmp_path) -> None:
    """full trains the head, whose loss runs the model over given hidden states."""
    told = train(model_dir("llava"), rows, tmp_path / "out", f"--storage fp32 --method {method}")
    assert told.returncode == 0, told.stderr
    losses = json.loads(told.stdout.splitlines()[-1])["losses"]
    assert losses[-1] < losses[0]
    if method == "full":
        card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        assert "AutoModelForMultimodalLM.from_pretrained(" in card
        assert not near(logits(opened(tmp_path / "out")), logits(opened(model_dir("llava"))))


def test_a_classifier_beside_a_tower(model_dir, tmp_path: Path) -> None:
    texts = [{"text": f"{n} cats", "label": "ab"[n % 2]} for n in range(4)]
    data, on = write_rows(tmp_path / "rows.jsonl", texts), "--storage fp32 --objective classify"
    told = train(model_dir("gemma3"), data, tmp_path / "out", on)
    assert told.returncode == 0, told.stderr
    assert "modules to save: score\n" in told.stderr


@pytest.mark.parametrize("preset", ["vision-linear", "audio-linear"])
def test_a_tower_alone_is_refused(preset: str, model_dir, rows, tmp_path) -> None:
    name, what = {
        "vision-linear": ("llava", "no row has an image"),
        "audio-linear": ("qwen2-audio", "no row has audio"),
    }[preset]
    on = f"--storage fp32 --targets {preset}"
    told = train(model_dir(name), rows, tmp_path / "out", on)
    assert told.returncode == 2
    assert f", and {what}, so none of them would get a gradient" in told.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_part_of_the_targets_in_a_tower_is_told() -> None:
    model = MULTIMODAL["gemma3"].model()
    adapter = lf.attach(model, lf.LoRA(rank=2), ["q_proj"])
    assert text_only_note(model, adapter.sites) == (
        "training on text only: no row has an image, so the vision encoder gets no input, and 2 of"
        " the 4 adapted modules get no gradient"
    )
    model(input_ids=IDS % 90).logits.sum().backward()
    trained = [any(p.grad is not None for p in d.parameters()) for d in adapter.deltas.values()]
    assert sum(trained) == 2
    assert text_only_note(ARCHITECTURES["llama"].model(), ["model.layers.0.mlp.up_proj"]) is None


@pytest.mark.parametrize(
    ("config", "needs"),
    [
        (tf.BlipConfig(), "its forward requires pixel_values"),
        (tf.Pix2StructConfig(), "it is an encoder-decoder"),
        (tf.Qwen2_5OmniConfig(), "its forward has no argument input_ids"),
    ],
)
def test_models_that_need_more_than_text(config: Any, needs: str, tmp_path: Path) -> None:
    line = f"a {config.model_type} model can't run on text alone ({needs}), but lorafold passes"
    with pytest.raises(lf.LorafoldError) as found:
        text_auto_class(config, "model x")
    assert str(found.value).startswith(f"model x: {line}")
    config.save_pretrained(tmp_path / "model")
    told = run(f"estimate --model {tmp_path / 'model'} --mode lora")
    assert told.returncode == 2
    assert line in told.stderr


def test_transformers_own_mappings_decide() -> None:
    """Every multimodal class is opened or refused; none that has a causal class changes."""
    both = tf.AutoModelForCausalLM._model_mapping
    assert text_auto_class(ARCHITECTURES["gemma3"].config(), "x") is tf.AutoModelForCausalLM
    assert text_auto_class(ARCHITECTURES["llava"].config(), "x") is tf.AutoModelForMultimodalLM
    assert text_auto_class(tf.T5Config(), "x") is tf.AutoModelForCausalLM
    for name in MULTIMODAL:
        config = ARCHITECTURES[name].config()
        expected = "CausalLM" if type(config) in both else "MultimodalLM"
        assert text_auto_class(config, "x").__name__ == f"AutoModelFor{expected}"


@pytest.mark.parametrize("name", [pytest.param("gemma3-text", marks=pytest.mark.slow), "gemma3"])
def test_gemma_3_on_nf4_runs_fused_and_merges(name: str, rows: Path, tmp_path: Path) -> None:
    base = write(name, tmp_path / "model", **WIDE, num_hidden_layers=2)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    told = train(base, rows, adapter, "--storage nf4")
    assert told.returncode == 0, told.stderr
    assert "fast path: 2 of 2 blocks\n" in told.stderr
    losses = json.loads(told.stdout.splitlines()[-1])["losses"]
    assert losses[-1] < losses[0]
    found = result(f"merge --model {base} --adapter {adapter} --out {merged}")
    assert found["argmax_agreement"] > 0.99
    assert found["kl"] < 1e-4
