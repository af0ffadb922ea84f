"""Files both ways with PEFT as the oracle: what one writes the other reads, and the logits agree.

Logits of two fp32 implementations of one formula differ by rounding in another order: 1e-5 of the
largest is asked of both ways.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorafold as lf
from peft_cases import CLOSE, gap, ids, load_theirs, logits, move, noise, save_theirs


@pytest.fixture(autouse=True)
def _seeded_and_quiet() -> None:
    torch.manual_seed(0)
    # PEFT asks transformers under a name that is to go, and warns of tied embeddings; neither
    # concerns the files
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


# (model, ours, PEFT's): the same adapter asked of both
Q = ["q_proj", "v_proj"]
RANKS = {"layers.1.self_attn.q_proj": 2, "v_proj": 3}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": (
        "llama",
        {"spec": lf.LoRA(rank=4, alpha=6), "targets": Q},
        {"r": 4, "lora_alpha": 6, "target_modules": Q, "lora_dropout": 0.05},
    ),
    "rslora": (
        "llama",
        {"spec": lf.LoRA(rank=4, alpha=6, rslora=True), "targets": Q},
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": Q},
    ),
    "gaussian": (
        "llama",
        {"spec": lf.LoRA(rank=4, init="gaussian"), "targets": Q},
        {"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian", "target_modules": Q},
    ),
    "patterns": (
        "llama",
        {
            "spec": lf.LoRA(rank=4, rslora=True, rank_pattern=RANKS, alpha_pattern={"q_proj": 5.5}),
            "targets": Q,
        },
        {
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "rank_pattern": RANKS,
            "alpha_pattern": {"q_proj": 5.5},
            "target_modules": Q,
        },
    ),
    "bias-lora-only": (
        "qwen2",
        {"spec": lf.LoRA(rank=4), "targets": Q, "bias": "lora_only"},
        {"r": 4, "lora_alpha": 8, "target_modules": Q, "bias": "lora_only"},
    ),
    "bias-all": (
        "qwen2",
        {"spec": lf.LoRA(rank=4), "targets": ["q_proj"], "bias": "all"},
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "all"},
    ),
    "conv1d-bias-all": (
        "gpt2",
        {"spec": lf.LoRA(rank=4), "targets": ["c_attn", "c_fc"], "bias": "all"},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["c_attn", "c_fc"],
            "bias": "all",
            "fan_in_fan_out": True,
        },
    ),
    "conv1d-norms": (
        "gpt2",
        {
            "spec": lf.LoRA(rank=4),
            "targets": ["c_proj"],
            "bias": "all",
            "modules_to_save": ["ln_f", "ln_1"],
        },
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["c_proj"],
            "bias": "all",
            "modules_to_save": ["ln_f", "ln_1"],
            "fan_in_fan_out": True,
        },
    ),
    "embedding": (
        "llama",
        {"spec": lf.LoRA(rank=4), "targets": ["embed_tokens", "q_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"]},
    ),
    "head": (
        "llama",
        {"spec": lf.LoRA(rank=4), "targets": ["lm_head", "q_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "q_proj"]},
    ),
    "head-saved": (
        "llama",
        {"spec": lf.LoRA(rank=4), "targets": Q, "modules_to_save": ["lm_head"]},
        {"r": 4, "lora_alpha": 8, "target_modules": Q, "modules_to_save": ["lm_head"]},
    ),
    # in PEFT "norm" would also name every input_layernorm and post_attention_layernorm
    "norm-saved": (
        "llama",
        {"spec": lf.LoRA(rank=4), "targets": Q, "modules_to_save": ["norm"]},
        {"r": 4, "lora_alpha": 8, "target_modules": Q, "modules_to_save": ["model.norm"]},
    ),
    "block-saved": (
        "llama",
        {"spec": lf.LoRA(rank=4), "targets": "all-linear", "modules_to_save": ["layers.1.mlp"]},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "modules_to_save": ["layers.1.mlp"],
        },
    ),
    "regex": (
        "llama",
        {"spec": lf.LoRA(rank=4), "targets": r".*\.1\..*_proj"},
        {"r": 4, "lora_alpha": 8, "target_modules": r".*\.1\..*_proj"},
    ),
    "one-layer": (
        "llama",
        {"spec": lf.LoRA(rank=4), "targets": ["layers.1.self_attn.q_proj"]},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": Q[:1],
            "layers_to_transform": [1],
            "layers_pattern": "layers",
        },
    ),
    "excluded": (
        "llama",
        {"spec": lf.LoRA(rank=4), "targets": r".*layers\.0\..*_proj"},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "exclude_modules": r".*layers\.1\..*",
        },
    ),
    "gemma": (
        "gemma",
        {"spec": lf.LoRA(rank=4), "targets": "all-linear"},
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    ),
}

Model = Callable[[str], Any]


def ours(case: str, model: Any) -> lf.Adapter:
    adapter = lf.attach(model, **CASES[case][1])
    move(adapter.parameters())
    return adapter


def theirs(case: str, model: Any, **extra: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(task_type="CAUSAL_LM", **CASES[case][2], **extra)
        )
    move(p for p in wrapped.parameters() if p.requires_grad)
    return wrapped


@pytest.mark.few(8)
@pytest.mark.parametrize("case", CASES)
def test_peft_reads_ours(case: str, tiny_model: Model, tmp_path: Path) -> None:
    model = tiny_model(CASES[case][0])
    bare = logits(model)
    adapter = ours(case, model)
    expected = logits(model)
    assert gap(expected, bare) > 100 * CLOSE, "the adapter does nothing, so this test shows nothing"
    adapter.save(tmp_path / "a")
    read = load_theirs(tiny_model(CASES[case][0]), tmp_path / "a")
    assert gap(logits(read), expected) < CLOSE


@pytest.mark.few(8)
@pytest.mark.parametrize("case", CASES)
def test_ours_reads_peft(case: str, tiny_model: Model, tmp_path: Path) -> None:
    wrapped = theirs(case, tiny_model(CASES[case][0]))
    expected = logits(wrapped)
    save_theirs(wrapped, tmp_path / "a")
    model = tiny_model(CASES[case][0])
    bare = logits(model)
    adapter = lf.load(model, tmp_path / "a")
    assert gap(expected, bare) > 100 * CLOSE
    assert gap(logits(model), expected) < CLOSE
    adapter.detach()
    assert torch.equal(logits(model), bare)


@pytest.mark.few(7)
@pytest.mark.parametrize("case", CASES)
def test_saved_again_is_the_same(case: str, tiny_model: Model, tmp_path: Path) -> None:
    model = tiny_model(CASES[case][0])
    ours(case, model).save(tmp_path / "a")
    again = tiny_model(CASES[case][0])
    lf.load(again, tmp_path / "a").save(tmp_path / "b")
    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in "ab")
    assert a.keys() == b.keys()
    # a bias is stored absolute: taken apart and put together it is rounded once
    eps = torch.finfo(torch.float32).eps
    assert all(torch.allclose(a[k], b[k], rtol=2 * eps, atol=2 * eps) for k in a)
    configs = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in "ab"]
    assert configs[0] == configs[1]


def test_keys_and_config_as_peft_writes_them(tiny_model: Model, tmp_path: Path) -> None:
    for case, (kind, _, _) in CASES.items():
        ours(case, tiny_model(kind)).save(tmp_path / case / "ours")
        save_theirs(theirs(case, tiny_model(kind)), tmp_path / case / "theirs")
        a, b = (
            load_file(tmp_path / case / d / "adapter_model.safetensors") for d in ("ours", "theirs")
        )
        beyond = {
            k
            for k in b
            if k.endswith("base_layer.weight")
            or ".original_module." in k
            or ".modules_to_save." in k
        }
        assert {k: v.shape for k, v in a.items()} == {
            k: v.shape for k, v in b.items() if k not in beyond
        }, case
        assert all(v.dtype == torch.float32 for v in a.values())
        mine, his = (
            json.loads((tmp_path / case / d / "adapter_config.json").read_text())
            for d in ("ours", "theirs")
        )
        # where the two lists differ they select the same modules, which the other tests show
        ways = {
            "target_modules",
            "modules_to_save",
            "layers_to_transform",
            "layers_pattern",
            "exclude_modules",
            "lora_dropout",
        }
        assert {k: v for k, v in mine.items() if k not in ways} == {
            k: v for k, v in his.items() if k in mine and k not in ways
        }, case


def test_suffixes_where_they_suffice(tiny_model: Model, tmp_path: Path) -> None:
    def targets(name: str, model: Any, wanted: Any) -> Any:
        lf.attach(model, lf.LoRA(rank=2), wanted).save(tmp_path / name)
        return json.loads((tmp_path / name / "adapter_config.json").read_text())["target_modules"]

    every = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert targets("all", tiny_model("llama"), "all-linear") == every
    assert (
        targets("regex", tiny_model("llama"), r".*1\.self_attn\.[qk]_proj")
        == r".*1\.self_attn\.[qk]_proj"
    )
    one = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]
    assert targets("two", tiny_model("llama"), ["0.self_attn.q_proj", "1.self_attn.k_proj"]) == one
    # a path that is the end of another one has no name in a list
    twice = nn.ModuleDict(
        {"q": nn.Linear(4, 4), "y": nn.Linear(4, 4), "x": nn.ModuleDict({"q": nn.Linear(4, 4)})}
    )
    adapter = lf.attach(twice, lf.LoRA(rank=2), "q|y")
    adapter.save(tmp_path / "end")
    assert (
        json.loads((tmp_path / "end" / "adapter_config.json").read_text())["target_modules"]
        == "q|y"
    )
    adapter.detach()
    assert list(lf.load(twice, tmp_path / "end").deltas) == ["q", "y"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_is_the_same_base(
    dtype: torch.dtype, tiny_model: Model, tmp_path: Path
) -> None:
    """Trained over fp32, loaded over half precision and the other way round: no complaint, fp32
    factors, the same values.
    """
    model = tiny_model("qwen2")
    adapter = lf.attach(model, lf.LoRA(rank=4), Q, bias="lora_only", modules_to_save=["lm_head"])
    move(adapter.parameters())
    adapter.save(tmp_path / "a")
    half = tiny_model("qwen2").to(dtype)
    loaded = lf.load(half, tmp_path / "a")
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    loaded.save(tmp_path / "b")
    lf.load(tiny_model("qwen2"), tmp_path / "b")
    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in "ab")
    assert all(torch.allclose(a[k], b[k], rtol=1e-6, atol=1e-6) for k in a)
    # PEFT over the same half-precision base is the measure: it rounds in other places, and keeps
    # its branch in fp32
    expected = logits(load_theirs(tiny_model("qwen2").to(dtype), tmp_path / "a"))
    exact = logits(model)
    assert noise(logits(half), exact) <= 2 * noise(expected, exact)


def test_peft_trained_on_bf16(tiny_model: Model, tmp_path: Path) -> None:
    wrapped = theirs("head-saved", tiny_model("llama").bfloat16())
    save_theirs(wrapped, tmp_path / "a")
    model = tiny_model("llama").bfloat16()
    lf.load(model, tmp_path / "a")
    model_fp32 = tiny_model("llama").bfloat16().float()
    lf.load(model_fp32, tmp_path / "a")
    exact = logits(model_fp32)
    assert noise(logits(model), exact) <= 2 * noise(logits(wrapped), exact)


def test_classifier_head(tmp_path: Path) -> None:
    """PEFT names every head there could be among the modules to save, and asks for them when it
    loads.
    """
    from transformers import LlamaConfig, LlamaForSequenceClassification

    def classifier() -> Any:
        torch.manual_seed(3)
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=300,
            num_labels=3,
            pad_token_id=0,
        )
        return LlamaForSequenceClassification(config)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(
            classifier(), peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=Q)
        )
    move(p for p in wrapped.parameters() if p.requires_grad)
    save_theirs(wrapped, tmp_path / "theirs")
    model = classifier()
    adapter = lf.load(model, tmp_path / "theirs")
    assert gap(logits(model), logits(wrapped)) < CLOSE
    adapter.save(tmp_path / "ours")
    assert gap(logits(load_theirs(classifier(), tmp_path / "ours")), logits(wrapped)) < CLOSE

    # a fresh head is drawn anew each time: it is the adapter's, and no part of what identifies the
    # base
    other_head = classifier()
    torch.nn.init.normal_(other_head.score.weight)
    lf.load(other_head, tmp_path / "ours")
    assert gap(logits(other_head), logits(wrapped)) < CLOSE

    # without the head PEFT would look for it in vain under that task
    plain = classifier()
    headless = lf.attach(plain, lf.LoRA(rank=4), Q)
    move(headless.parameters())
    headless.save(tmp_path / "headless")
    assert (
        json.loads((tmp_path / "headless" / "adapter_config.json").read_text())["task_type"] is None
    )
    assert gap(logits(load_theirs(classifier(), tmp_path / "headless")), logits(plain)) < CLOSE


def test_least_config(tiny_model: Model, tmp_path: Path) -> None:
    """peft_type and target_modules are all that a config must have: r and alpha are 8 then, as PEFT
    says.
    """
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]})
    )
    generator = torch.Generator().manual_seed(0)
    prefix = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (8, 32), "B": (32, 8)}
    save_file(
        {
            prefix.format(i, f): torch.randn(shapes[f], generator=generator)
            for i in range(2)
            for f in "AB"
        },
        tmp_path / "adapter_model.safetensors",
    )
    model = tiny_model("llama")
    adapter = lf.load(model, tmp_path)
    assert (adapter.spec.rank, adapter.spec.alpha, adapter.spec.dropout) == (8, 8, 0)
    assert gap(logits(model), logits(load_theirs(tiny_model("llama"), tmp_path))) < CLOSE


def test_resumes_training_from_a_directory(tiny_model: Model, tmp_path: Path) -> None:
    ours("lora", tiny_model("llama")).save(tmp_path / "a")
    model = tiny_model("llama")
    adapter = lf.load(model, tmp_path / "a", trainable=True)
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".deltas." not in n)


def test_second_adapter_over_a_first(tiny_model: Model, tmp_path: Path) -> None:
    """A model that carries adapters is the same base, and what they hold is no module to match."""
    ours("norm-saved", tiny_model("llama")).save(tmp_path / "a")
    ours("regex", tiny_model("llama")).save(tmp_path / "b")
    model = tiny_model("llama")
    lf.load(model, tmp_path / "a", "first")
    second = lf.load(model, tmp_path / "b", "second")
    second.save(tmp_path / "c")
    with lf.only(model, "second"):
        expected = logits(model)
    alone = tiny_model("llama")
    lf.load(alone, tmp_path / "c")
    assert torch.equal(logits(alone), expected)


def test_card_is_ready_for_the_hub(tiny_model: Model, tmp_path: Path) -> None:
    import yaml

    model = tiny_model("llama")
    model.config._name_or_path = "someone/some-base"
    ours("lora", model).save(tmp_path / "a")
    _, front, text = (tmp_path / "a" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "someone/some-base",
        "library_name": "peft",
        "tags": ["lora", "lorafold", "base_model:adapter:someone/some-base"],
    }
    assert "lf.load" in text
    assert "PeftModel" in text
    assert "| rank | 4 |" in text
    assert (
        json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "someone/some-base"
    )
