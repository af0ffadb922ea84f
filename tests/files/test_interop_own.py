"""Prompt and prefix tuning both ways with PEFT, and adapters that PEFT does not have."""

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

import lorafold as lf
from adapter_files import assert_same_tensors, change, configure, json_of, tensors_of
from error_cases import refusal
from lorafold.core.spec import Spec
from peft_cases import CLOSE, gap, ids, logits, made_by_peft, move, moved

FOUR: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
VIRTUAL: dict[str, tuple[Spec, peft.PeftConfig]] = {
    "prompt": (lf.Prompt(tokens=4), peft.PromptTuningConfig(**FOUR)),
    "prefix": (lf.Prefix(tokens=4), peft.PrefixTuningConfig(**FOUR)),
    "prefix-projected": (
        lf.Prefix(tokens=4),
        peft.PrefixTuningConfig(**FOUR, prefix_projection=True, encoder_hidden_size=16),
    ),
}
SPARSE = ("sparse_at", "sparse_values")
PARTS = [f"bottleneck_{part}" for part in ("down.weight", "down.bias", "up.weight", "up.bias")]
# (model, spec, peft_type, one of its places, keys there)
OWN: dict[str, tuple[str, Spec, str, str, Any]] = {
    "houlsby": ("llama", lf.Bottleneck(size=4), "BOTTLENECK", "model.layers.0.self_attn", PARTS),
    "pfeiffer": (
        "gpt2", lf.Bottleneck(size=4, after="mlp", activation="relu"), "BOTTLENECK",
        "transformer.h.1.mlp", ["bottleneck_up.bias"],
    ),
    "bitfit": ("gpt2", lf.BitFit(), "BITFIT", "transformer.ln_f", ["base_layer.bias"]),
    "bitfit-added": (
        "llama", lf.BitFit(), "BITFIT", "model.layers.1.mlp.up_proj", ["base_layer.bias"]
    ),
    "lt-sft": ("llama", lf.LTSFT(density=0.02), "LT_SFT", "model.layers.0.mlp.up_proj", SPARSE),
    "fish": (
        "gpt2", lf.FishMask(density=0.02), "FISH_MASK", "transformer.h.0.attn.c_attn", SPARSE[1:]
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded_and_quiet() -> None:
    torch.manual_seed(0)
    for message in (".*is_gradient_checkpointing.*", ".*past_key_values.*"):
        warnings.filterwarnings("ignore", message=message)


def theirs_says(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits
    return found[:, -ids().shape[1] :].float()


KINDS = ["llama", "gpt2", "gemma"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_peft_reads_what_we_write(method: str, kind: str, tiny_model, tmp_path: Path) -> None:
    model = tiny_model(kind)
    moved(model, VIRTUAL[method][0]).save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_model(kind), tmp_path / "ours")
    assert gap(theirs_says(theirs), logits(model)) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", list(VIRTUAL))
def test_we_read_what_peft_writes(method: str, kind: str, tiny_model, tmp_path: Path) -> None:
    spec, config = VIRTUAL[method]
    theirs = made_by_peft(tiny_model(kind), copy.deepcopy(config))
    expected = theirs_says(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny_model(kind)
    adapter = lf.load(model, tmp_path / "theirs")
    assert type(adapter.spec) is type(spec)
    assert gap(logits(model), expected) < CLOSE
    adapter.save(tmp_path / "again")
    assert_same_tensors(tmp_path / "theirs", tmp_path / "again")
    assert tensors_of(tmp_path / "again").keys() == {"prompt_embeddings"}


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_their_config_says_what_pefts_says(method: str, tiny_model, tmp_path: Path) -> None:
    spec, config = VIRTUAL[method]
    lf.attach(tiny_model("llama"), spec).save(tmp_path / "ours")
    made = peft.get_peft_model(tiny_model("llama"), copy.deepcopy(config))
    made.save_pretrained(tmp_path / "theirs")
    ours, theirs = (json_of(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.keys() <= theirs.keys()
    about = {"base_model_name_or_path", "prompt_tuning_init"}
    about |= {"num_attention_heads"} if method == "prompt" else set()
    same = ours.keys() - about
    assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}


@pytest.mark.parametrize("case", list(OWN))
def test_our_own_come_back_as_they_went(case: str, tiny_model, tmp_path: Path) -> None:
    kind, spec, peft_type, at, keys = OWN[case]
    model = tiny_model(kind)
    adapter = moved(model, spec)
    expected = logits(model)
    adapter.save(tmp_path / "ours")
    assert json_of(tmp_path / "ours")["peft_type"] == peft_type
    assert {f"base_model.model.{at}.{key}" for key in keys} <= tensors_of(tmp_path / "ours").keys()
    fresh = tiny_model(kind)
    loaded = lf.load(fresh, tmp_path / "ours")
    assert loaded.spec == spec
    assert set(loaded.sites) == set(adapter.sites)
    # a bias is stored as the sum with its base and comes back by a subtraction
    assert gap(logits(fresh), expected) <= (CLOSE if case == "bitfit" else 0)
    assert "exists" in refusal(adapter.save, tmp_path / "ours")


def test_sparse_files_bring_their_own_sizes(tiny_model, tmp_path: Path) -> None:
    model, spec = tiny_model("llama"), lf.FishMask(density=0.02, samples=2)
    adapter = lf.attach(model, spec)
    losses = lambda n, rows=None: (model(input_ids=ids(), labels=ids()).loss for _ in range(n))  # noqa: E731
    spec.prepare(adapter.own_deltas, losses)
    move(adapter.parameters())
    counts = {path: len(d.at) for path, d in adapter.deltas.items()}
    assert len(set(counts.values())) > 3
    adapter.save(tmp_path / "ours")
    fresh = tiny_model("llama")
    loaded = lf.load(fresh, tmp_path / "ours", trainable=True)
    assert {path: len(d.at) for path, d in loaded.deltas.items()} == counts
    assert torch.equal(logits(fresh), logits(model))
    other = lf.attach(tiny_model("llama"), spec)
    other.load_state_dict(adapter.state_dict())
    assert {path: len(d.at) for path, d in other.deltas.items()} == counts


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("at", lambda at: at.flip(0),
         "sparse_at: expected ascending int64 positions in a weight of 64 x 32"),
        ("at", lambda at: at + 64 * 32, "sparse_at: expected ascending"),
        ("at", lambda at: at.float(), "sparse_at: expected ascending"),
        ("values", lambda values: values[1:], "expected one value for each position"),
        ("values", lambda values: values / 0, "values are not finite"),
        ("values", None, "missing key base_model.model.model.layers.0.mlp.up_proj.sparse_values"),
    ],
)  # fmt: skip
def test_damaged_sparse_files_are_refused(name, damage, message, tiny_model, tmp_path) -> None:
    path = lf.attach(tiny_model("llama"), lf.FishMask(density=0.02)).save(tmp_path / "ours")
    key = f"base_model.model.model.layers.0.mlp.up_proj.sparse_{name}"
    change(path, lambda t: t.update({key: damage(t[key])}) if damage else t.pop(key))
    model = tiny_model("llama")
    told = refusal(lf.load, model, path)
    assert f"up_proj.sparse_{name}" in told
    assert message in told
    assert not any(hasattr(m, "deltas") for m in model.modules())


def test_a_prompt_file_of_another_width_or_with_targets_is_refused(tiny_model, tmp_path) -> None:
    path = lf.attach(tiny_model("llama"), lf.Prompt(tokens=4)).save(tmp_path / "ours")
    narrow = shutil.copytree(path, tmp_path / "narrow")
    change(narrow, lambda t: t.update(prompt_embeddings=torch.zeros(4, 16)))
    told = refusal(lf.load, tiny_model("llama"), narrow)
    assert "prompt_embeddings: shape [4, 16], expected [4, 32]" in told
    configure(path, target_modules=["q_proj"])
    with pytest.raises(lf.LorafoldError, match=r"target_modules=.*not supported"):
        lf.load(tiny_model("llama"), path)


def classifier() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=260, num_labels=3, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )).eval()  # fmt: skip


def test_a_linear_probe_comes_back(tmp_path: Path) -> None:
    model, fresh = classifier(), classifier()
    moved(model, lf.LinearProbe()).save(tmp_path / "ours")
    assert set(tensors_of(tmp_path / "ours")) == {"base_model.model.score.weight"}
    with torch.no_grad():
        fresh.score.weight.add_(1)  # a head drawn anew: the file's takes its place
    lf.load(fresh, tmp_path / "ours")
    assert torch.equal(logits(fresh), logits(model))


def test_full_fine_tuning_saves_a_model(tiny_model, tmp_path: Path) -> None:
    model, out = tiny_model("qwen2"), tmp_path / "ours"
    adapter = moved(model, lf.Full())
    adapter.save(out, record={"recipe": {"method": "full"}})
    assert not (out / "adapter_config.json").exists()
    assert "fine-tuned" in (out / "README.md").read_text()
    assert json_of(out, "lorafold.json")["recipe"] == {"method": "full"}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model))
    assert "exists" in refusal(adapter.save, out)
