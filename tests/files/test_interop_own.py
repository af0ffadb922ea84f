"""Files of prompt and prefix tuning both ways with PEFT, and of what PEFT lacks: written, read, and
strict about what is wrong.
"""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

import lorafold as lf
from lorafold.core.spec import Spec
from lorafold.files.atomic import MANIFEST
from peft_cases import CLOSE, gap, ids, logits, move

VIRTUAL: dict[str, tuple[Spec, peft.PeftConfig]] = {
    "prompt": (
        lf.Prompt(tokens=4),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ),
    "prefix": (
        lf.Prefix(tokens=4),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ),
    "prefix-projected": (
        lf.Prefix(tokens=4),
        peft.PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=4,
            prefix_projection=True,
            encoder_hidden_size=16,
        ),
    ),
}
# (model, spec, peft_type, keys at one of its places)
OWN: dict[str, tuple[str, Spec, str, set[str]]] = {
    "houlsby": (
        "llama",
        lf.Bottleneck(size=4),
        "BOTTLENECK",
        {
            f"base_model.model.model.layers.0.self_attn.bottleneck_{part}"
            for part in ("down.weight", "down.bias", "up.weight", "up.bias")
        },
    ),
    "pfeiffer": (
        "gpt2",
        lf.Bottleneck(size=4, after="mlp", activation="relu"),
        "BOTTLENECK",
        {"base_model.model.transformer.h.1.mlp.bottleneck_up.bias"},
    ),
    "bitfit": (
        "gpt2",
        lf.BitFit(),
        "BITFIT",
        {"base_model.model.transformer.ln_f.base_layer.bias"},
    ),
    "bitfit-added": (
        "llama",
        lf.BitFit(),
        "BITFIT",
        {"base_model.model.model.layers.1.mlp.up_proj.base_layer.bias"},
    ),
    "lt-sft": (
        "llama",
        lf.LTSFT(density=0.02),
        "LT_SFT",
        {
            "base_model.model.model.layers.0.mlp.up_proj.sparse_at",
            "base_model.model.model.layers.0.mlp.up_proj.sparse_values",
        },
    ),
    "fish": (
        "gpt2",
        lf.FishMask(density=0.02),
        "FISH_MASK",
        {"base_model.model.transformer.h.0.attn.c_attn.sparse_values"},
    ),
}


@pytest.fixture(autouse=True)
def _seeded_and_quiet() -> None:
    torch.manual_seed(0)
    for message in (".*is_gradient_checkpointing.*", ".*past_key_values.*"):
        warnings.filterwarnings("ignore", message=message)


def theirs_says(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return (
            model.eval()(input_ids=ids(), attention_mask=torch.ones_like(ids()))
            .logits[:, -ids().shape[1] :]
            .float()
        )


def damaged(path: Path, out: Path, **change: Any) -> Path:
    """A copy of an adapter directory, without its manifest, with other tensors."""
    out.mkdir()
    for file in (file for file in path.iterdir() if file.name != MANIFEST):
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(path / "adapter_model.safetensors") | {
        k: v for k, v in change.items() if v is not None
    }
    save_file(
        {k: v for k, v in tensors.items() if k not in change or change[k] is not None},
        out / "adapter_model.safetensors",
    )
    return out


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_peft_reads_what_we_write(method: str, kind: str, tiny_model, tmp_path: Path) -> None:
    model = tiny_model(kind)
    adapter = lf.attach(model, VIRTUAL[method][0])
    move(adapter.parameters())
    expected = logits(model)
    adapter.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_model(kind), tmp_path / "ours")
    assert gap(theirs_says(theirs), expected) < CLOSE


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("method", list(VIRTUAL))
def test_we_read_what_peft_writes(method: str, kind: str, tiny_model, tmp_path: Path) -> None:
    spec, config = VIRTUAL[method]
    theirs = peft.get_peft_model(tiny_model(kind), copy.deepcopy(config))
    move(p for p in theirs.parameters() if p.requires_grad)
    expected = theirs_says(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny_model(kind)
    adapter = lf.load(model, tmp_path / "theirs")
    assert type(adapter.spec) is type(spec)
    assert gap(logits(model), expected) < CLOSE
    adapter.save(tmp_path / "again")
    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "again"))
    assert a.keys() == b.keys() == {"prompt_embeddings"}
    assert torch.equal(a["prompt_embeddings"], b["prompt_embeddings"])


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_their_config_says_what_pefts_says(method: str, tiny_model, tmp_path: Path) -> None:
    lf.attach(tiny_model("llama"), VIRTUAL[method][0]).save(tmp_path / "ours")
    peft.get_peft_model(tiny_model("llama"), copy.deepcopy(VIRTUAL[method][1])).save_pretrained(
        tmp_path / "theirs"
    )
    ours, theirs = (
        json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "theirs")
    )
    assert ours.keys() <= theirs.keys()
    about = {
        "base_model_name_or_path",
        "prompt_tuning_init",
        "num_attention_heads" if method == "prompt" else "",
    }
    assert {k: v for k, v in ours.items() if k not in about} == {
        k: theirs[k] for k in ours.keys() - about
    }


@pytest.mark.parametrize("case", list(OWN))
def test_our_own_come_back_as_they_went(case: str, tiny_model, tmp_path: Path) -> None:
    kind, spec, peft_type, keys = OWN[case]
    model = tiny_model(kind)
    adapter = lf.attach(model, spec)
    move(adapter.parameters())
    expected = logits(model)
    adapter.save(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["peft_type"] == peft_type
    assert keys <= set(load_file(tmp_path / "ours" / "adapter_model.safetensors"))
    fresh = tiny_model(kind)
    loaded = lf.load(fresh, tmp_path / "ours")
    assert loaded.spec == spec
    assert set(loaded.sites) == set(adapter.sites)
    # a bias is stored as the sum with its base and comes back by a subtraction
    assert (
        torch.equal(logits(fresh), expected)
        if case != "bitfit"
        else gap(logits(fresh), expected) < CLOSE
    )
    with pytest.raises(lf.LorafoldError, match="exists"):
        adapter.save(tmp_path / "ours")


def test_sparse_files_bring_their_own_sizes(tiny_model, tmp_path: Path) -> None:
    model, spec = tiny_model("llama"), lf.FishMask(density=0.02, samples=2)
    adapter = lf.attach(model, spec)
    spec.prepare(
        adapter.own_deltas,
        lambda n, rows=None: (model(input_ids=ids(), labels=ids()).loss for _ in range(n)),
    )
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


def test_damaged_sparse_files_are_refused(tiny_model, tmp_path: Path) -> None:
    lf.attach(tiny_model("llama"), lf.FishMask(density=0.02)).save(tmp_path / "ours")
    at, values = (
        f"base_model.model.model.layers.0.mlp.up_proj.sparse_{name}" for name in ("at", "values")
    )
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    for number, (change, message) in enumerate(
        [
            (
                {at: tensors[at].flip(0)},
                r"sparse_at: expected ascending int64 positions in a weight of 64 x 32",
            ),
            ({at: tensors[at] + 64 * 32}, r"sparse_at: expected ascending"),
            ({at: tensors[at].float()}, r"sparse_at: expected ascending"),
            (
                {values: tensors[values][1:]},
                r"sparse_values: shape .* expected a number for each position",
            ),
            ({values: tensors[values] / 0}, r"sparse_values: \d+ of \d+ values are not finite"),
            ({values: None}, r"missing key .*up_proj.sparse_values"),
        ]
    ):
        model = tiny_model("llama")
        with pytest.raises(lf.LorafoldError, match=message):
            lf.load(model, damaged(tmp_path / "ours", tmp_path / str(number), **change))
        assert not any(hasattr(m, "deltas") for m in model.modules())


def test_a_prompt_file_of_another_width_or_with_targets_is_refused(
    tiny_model, tmp_path: Path
) -> None:
    lf.attach(tiny_model("llama"), lf.Prompt(tokens=4)).save(tmp_path / "ours")
    narrow = damaged(tmp_path / "ours", tmp_path / "narrow", prompt_embeddings=torch.zeros(4, 16))
    with pytest.raises(
        lf.LorafoldError, match=r"prompt_embeddings: shape \[4, 16\], expected \[4, 32\]"
    ):
        lf.load(tiny_model("llama"), narrow)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    (tmp_path / "ours" / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": ["q_proj"]})
    )
    (tmp_path / "ours" / MANIFEST).unlink()
    with pytest.raises(lf.LorafoldError, match=r"target_modules=.*not supported"):
        lf.load(tiny_model("llama"), tmp_path / "ours")


def test_a_linear_probe_comes_back(tmp_path: Path) -> None:
    def classifier() -> LlamaForSequenceClassification:
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "vocab_size": 260,
        }
        special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
        return LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=3, **special)).eval()

    model = classifier()
    adapter = lf.attach(model, lf.LinearProbe())
    move(adapter.parameters())
    adapter.save(tmp_path / "ours")
    assert set(load_file(tmp_path / "ours" / "adapter_model.safetensors")) == {
        "base_model.model.score.weight"
    }
    fresh = classifier()
    with torch.no_grad():
        fresh.score.weight.add_(1)  # a head drawn anew: the file's takes its place
    lf.load(fresh, tmp_path / "ours")
    assert torch.equal(logits(fresh), logits(model))


def test_full_fine_tuning_saves_a_model(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    adapter = lf.attach(model, lf.Full())
    move(adapter.parameters())
    adapter.save(tmp_path / "ours", record={"recipe": {"method": "full"}})
    assert not (tmp_path / "ours" / "adapter_config.json").exists()
    assert "fine-tuned" in (tmp_path / "ours" / "README.md").read_text()
    assert json.loads((tmp_path / "ours" / "lorafold.json").read_text())["recipe"] == {
        "method": "full"
    }
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")), logits(model)
    )
    with pytest.raises(lf.LorafoldError, match="exists"):
        adapter.save(tmp_path / "ours")
