"""Files both ways with PEFT as the oracle: what one writes the other reads, and the logits agree.

Two fp32 implementations differ by rounding: 1e-5 of the largest logit is asked both ways.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import lorafold as lf
from adapter_files import WEIGHTS, assert_same_tensors, json_of, tensors_of
from error_cases import refusal
from lorafold.core.spec import Spec
from peft_cases import (
    CLOSE,
    gap,
    ids,
    load_theirs,
    logits,
    made_by_peft,
    moved,
    noise,
    save_theirs,
)  # fmt: skip

Model = Callable[[str], Any]
Q = ["q_proj", "v_proj"]
MORE = [*Q, "up_proj"]
RANKS = {"layers.1.self_attn.q_proj": 2, "v_proj": 3}
KVD = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
CONV_IA3 = {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}
Case = tuple[str, dict[str, Any], peft.PeftConfig]


@pytest.fixture(autouse=True)
def _seeded_and_quiet() -> None:
    torch.manual_seed(0)
    # PEFT asks transformers under a name that is to go; that does not concern the files
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


def lora(kind: str = "llama", ours: dict[str, Any] | None = None, **theirs: Any) -> Case:
    """LoRA of rank 4 on the targets, with what differs in our words and in PEFT's."""
    targets = theirs.setdefault("target_modules", Q)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | theirs)
    return kind, {"spec": lf.LoRA(rank=4), "targets": targets} | (ours or {}), config


def dora(kind: str, targets: list[str], alpha: int = 8, **theirs: Any) -> Case:
    spec = lf.DoRA(lf.LoRA(rank=4, alpha=alpha))
    named = {"target_modules": targets, "lora_alpha": alpha, "use_dora": True}
    return lora(kind, {"spec": spec}, **named, **theirs)


def on(spec: Spec, config: peft.PeftConfig, kind: str = "llama", targets: Any = MORE) -> Case:
    return kind, {"spec": spec, "targets": targets}, config


PATTERNS = lf.LoRA(rank=4, rslora=True, rank_pattern=RANKS, alpha_pattern={"q_proj": 5.5})
NORMS = ["ln_f", "ln_1"]
SEEDED = {"projection_prng_key": 3, "save_projection": False}
BOTH = {"decompose_both": True, "decompose_factor": 8}
# (model, ours, PEFT's): the same adapter asked of both
CASES: dict[str, Case] = {
    "lora": lora(ours={"spec": lf.LoRA(rank=4, alpha=6)}, lora_alpha=6, lora_dropout=0.05),
    "rslora": lora(
        ours={"spec": lf.LoRA(rank=4, alpha=6, rslora=True)}, lora_alpha=6, use_rslora=True
    ),
    "gaussian": lora(ours={"spec": lf.LoRA(rank=4, init="gaussian")}, init_lora_weights="gaussian"),
    "patterns": lora(
        ours={"spec": PATTERNS}, use_rslora=True, rank_pattern=RANKS,
        alpha_pattern={"q_proj": 5.5},
    ),
    "bias-lora-only": lora("qwen2", {"bias": "lora_only"}, bias="lora_only"),
    "bias-all": lora("qwen2", {"bias": "all"}, target_modules=["q_proj"], bias="all"),
    "conv1d-bias-all": lora(
        "gpt2", {"bias": "all"}, target_modules=["c_attn", "c_fc"], bias="all",
        fan_in_fan_out=True,
    ),
    "conv1d-norms": lora(
        "gpt2", {"bias": "all", "modules_to_save": NORMS}, target_modules=["c_proj"], bias="all",
        modules_to_save=NORMS, fan_in_fan_out=True,
    ),
    "embedding": lora(target_modules=["embed_tokens", "q_proj"]),
    "head": lora(target_modules=["lm_head", "q_proj"]),
    "head-saved": lora(ours={"modules_to_save": ["lm_head"]}, modules_to_save=["lm_head"]),
    # in PEFT "norm" would also name every input_layernorm and post_attention_layernorm
    "norm-saved": lora(ours={"modules_to_save": ["norm"]}, modules_to_save=["model.norm"]),
    "block-saved": lora(
        ours={"modules_to_save": ["layers.1.mlp"]}, target_modules="all-linear",
        modules_to_save=["layers.1.mlp"],
    ),
    "regex": lora(target_modules=r".*\.1\..*_proj"),
    "one-layer": lora(
        ours={"targets": ["layers.1.self_attn.q_proj"]}, target_modules=Q[:1],
        layers_to_transform=[1], layers_pattern="layers",
    ),
    "excluded": lora(
        ours={"targets": r".*layers\.0\..*_proj"}, target_modules="all-linear",
        exclude_modules=r".*layers\.1\..*",
    ),
    "gemma": lora("gemma", target_modules="all-linear"),
    "dora": dora("llama", MORE, 6),
    "dora-biases": dora("qwen2", MORE),
    "dora-conv1d": dora("gpt2", ["c_attn"], fan_in_fan_out=True),
    "dora-embedding": dora("llama", ["embed_tokens", "q_proj"]),
    "adalora": on(
        lf.AdaLoRA(rank=3, init_rank=4, alpha=6),
        peft.AdaLoraConfig(target_r=3, init_r=4, lora_alpha=6, total_step=10, target_modules=MORE),
    ),
    "vera": on(
        lf.VeRA(rank=8, projection_prng_key=3),
        peft.VeraConfig(r=8, projection_prng_key=3, target_modules=MORE),
    ),
    "vera-seeded": on(
        lf.VeRA(rank=8, **SEEDED), peft.VeraConfig(r=8, target_modules=MORE, **SEEDED)
    ),
    "vera-conv1d": on(
        lf.VeRA(rank=8),
        peft.VeraConfig(r=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
        "gpt2", ["c_attn", "c_fc"],
    ),
    "loha": on(lf.LoHa(rank=3, alpha=5), peft.LoHaConfig(r=3, alpha=5, target_modules=MORE)),
    "lokr": on(lf.LoKr(rank=2, alpha=3), peft.LoKrConfig(r=2, alpha=3, target_modules=MORE)),
    "lokr-whole": on(lf.LoKr(rank=8, alpha=3), peft.LoKrConfig(r=8, alpha=3, target_modules=MORE)),
    "lokr-both": on(
        lf.LoKr(rank=1, **BOTH), peft.LoKrConfig(r=1, alpha=1, target_modules=MORE, **BOTH)
    ),
    "ia3": on(lf.IA3(), peft.IA3Config(**KVD), targets=None),
    "ia3-conv1d": on(lf.IA3(), peft.IA3Config(**CONV_IA3, fan_in_fan_out=True), "gpt2", None),
    "ia3-outputs": on(
        lf.IA3(feedforward=[]),
        peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]), targets=["v_proj"],
    ),
}  # fmt: skip
# save and load VeRA's projections: that is what was asked; AdaLoRA's ranks are no patterns, and
# LoRA's check meets them all the same
EXPECTED = ("Specified to not", "rank_pattern keys did not match")


def ours(case: str, model: Any) -> lf.Adapter:
    return moved(model, **CASES[case][1])


def theirs(case: str, model: Any) -> Any:
    config = CASES[case][2]
    return made_by_peft(model, type(config)(**{**config.to_dict(), "task_type": "CAUSAL_LM"}))


@pytest.mark.few(16)
@pytest.mark.parametrize("case", CASES)
def test_peft_reads_ours(case: str, tiny_model: Model, tmp_path: Path) -> None:
    model = tiny_model(CASES[case][0])
    bare = logits(model)
    adapter = ours(case, model)
    expected = logits(model)
    assert gap(expected, bare) > 100 * CLOSE, "the adapter does nothing, so this test shows nothing"
    adapter.save(tmp_path / "a")
    read = load_theirs(tiny_model(CASES[case][0]), tmp_path / "a", *EXPECTED)
    assert gap(logits(read), expected) < CLOSE


@pytest.mark.few(16)
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


# the same modules in other words, which the other tests show, and alpha where the default differs
WAYS = {
    "target_modules", "feedforward_modules", "modules_to_save", "layers_to_transform",
    "layers_pattern", "exclude_modules", "lora_dropout", "total_step",
}  # fmt: skip


@pytest.mark.few(25)
@pytest.mark.parametrize("case", CASES)
def test_keys_and_config_as_peft_writes_them(case: str, tiny_model: Model, tmp_path: Path) -> None:
    kind = CASES[case][0]
    ours(case, tiny_model(kind)).save(tmp_path / "ours")
    save_theirs(theirs(case, tiny_model(kind)), tmp_path / "theirs")
    a, b = (tensors_of(tmp_path / name) for name in ("ours", "theirs"))
    parts = ("base_layer.weight", ".original_module.", ".modules_to_save.")
    assert {k: v.shape for k, v in a.items()} == {
        k: v.shape for k, v in b.items() if not any(part in k for part in parts)
    }
    assert all(v.dtype == torch.float32 for v in a.values())
    mine, his = (json_of(tmp_path / name) for name in ("ours", "theirs"))
    shared = mine.keys() & his.keys() - WAYS
    assert {k: mine[k] for k in mine.keys() - WAYS} == {k: his[k] for k in shared}


OVER = {
    "dora-loha": lf.LoHa(rank=3), "dora-lokr": lf.LoKr(rank=2), "dora-vera": lf.VeRA(rank=8),
    "dora-adalora": lf.AdaLoRA(rank=3),
}  # fmt: skip
ROUND: dict[str, tuple[str, dict[str, Any]]] = {name: case[:2] for name, case in CASES.items()} | {
    name: ("llama", {"spec": lf.DoRA(spec), "targets": MORE}) for name, spec in OVER.items()
}


@pytest.mark.few(15)
@pytest.mark.parametrize("case", ROUND)
def test_saved_again_is_the_same(case: str, tiny_model: Model, tmp_path: Path) -> None:
    kind, asked = ROUND[case]
    model, again = tiny_model(kind), tiny_model(kind)
    moved(model, **asked).save(tmp_path / "a")
    loaded = lf.load(again, tmp_path / "a")
    loaded.save(tmp_path / "b")
    # a bias is stored absolute: taken apart and put together it is rounded once
    rounding = 2 * torch.finfo(torch.float32).eps if "bias" in asked else 0.0
    assert_same_tensors(tmp_path / "a", tmp_path / "b", rounding)
    assert gap(logits(again), logits(model)) <= (CLOSE if rounding else 0)
    assert type(loaded.spec) is type(asked["spec"])
    assert json_of(tmp_path / "a") == json_of(tmp_path / "b")


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("llama", {"target_modules": "all-linear", "lora_alpha": 32}),
        ("llama", {"target_modules": r".*\.1\..*proj", "lora_dropout": 0.1}),
        ("llama", {"target_modules": MORE, "layers_to_transform": [1], "layers_pattern": "layers"}),
        ("llama", {"target_modules": MORE, "exclude_modules": ["layers.0.mlp.up_proj"]}),
        ("llama", {"target_modules": Q, "use_rslora": True, "rank_pattern": RANKS,
                   "alpha_pattern": {"q_proj": 7}}),
        ("llama", {"target_modules": Q, "use_dora": True}),
        ("llama", {"target_modules": Q, "modules_to_save": ["lm_head"], "bias": "all"}),
        ("llama", {"target_modules": ["embed_tokens"], "init_lora_weights": "gaussian"}),
        ("llama", {"target_modules": Q, "trainable_token_indices": [1, 2]}),
        ("llama", {"target_modules": Q, "init_lora_weights": "pissa_niter_4"}),
        ("llama", {"target_modules": Q, "init_lora_weights": "olora", "use_dora": True}),
        ("llama", {"target_modules": None}),
        ("llama", {"target_modules": None, "target_parameters": ["o_proj.weight"]}),
        ("llama", {"target_modules": [], "target_parameters": ["o_proj.weight"]}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}),
    ],
)  # fmt: skip
def test_a_lora_config_attaches_what_peft_does(kind: str, given: Any, tiny_model: Model) -> None:
    config = peft.LoraConfig(**{"r": 4} | given)
    adapter = lf.attach(tiny_model(kind), config)
    theirs = peft.get_peft_model(tiny_model(kind), copy.deepcopy(config))
    layers = {
        name.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for name, m in theirs.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    deltas = {p: getattr(d, "inner", d) for p, d in adapter.own_deltas.items()}
    assert {path: (delta.A.shape[0], delta.scale) for path, delta in deltas.items()} == layers
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in adapter.parameters()) == trained
    over = getattr(adapter.spec, "over", adapter.spec)
    init = str(config.init_lora_weights).partition("_")[0]
    assert {"pissa": lf.PiSSA, "olora": lf.OLoRA}.get(init, lf.LoRA) is type(over)
    assert over.dropout == config.lora_dropout


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"init_lora_weights": False}, "init_lora_weights=False: not supported"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal': not supported"),
        ({"init_lora_weights": "pissa", "use_rslora": True}, "'pissa': not supported with use_rs"),
        ({"lora_bias": True}, "LoraConfig: lora_bias=true is not supported"),
        ({"layer_replication": [(0, 2)]}, "LoraConfig: layer_replication=[[0,2]] is not supported"),
        ({"target_modules": ["nothing"]}, "target_modules nothing match no module"),
    ],
)
def test_what_a_lora_config_cant_have_here_is_named(config: Any, part: str, tiny_model) -> None:
    made = peft.LoraConfig(**{"target_modules": Q} | config)
    assert part in refusal(lf.attach, tiny_model("llama"), made)


def test_other_configs_and_models_of_peft_are_refused(tiny_model: Model) -> None:
    model, config = tiny_model("llama"), peft.LoraConfig(target_modules=Q)
    assert "expected a spec" in refusal(lf.attach, model, peft.IA3Config(target_modules=Q))
    line = "targets, bias, modules_to_save, tokens: found one beside a LoraConfig"
    assert line in refusal(lf.attach, model, config, targets="all-linear")
    wrapped = peft.get_peft_model(model, config)
    for theirs in (wrapped, model):  # PEFT replaces modules of the model itself
        assert "expected a loaded model, without PEFT" in refusal(lf.attach, theirs, lf.LoRA())
    lf.attach(wrapped.unload(), lf.LoRA())


def test_suffixes_where_they_suffice(tiny_model: Model, tmp_path: Path) -> None:
    def targets(name: str, model: Any, wanted: Any) -> Any:
        lf.attach(model, lf.LoRA(rank=2), wanted).save(tmp_path / name)
        return json_of(tmp_path / name)["target_modules"]

    every = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert targets("all", tiny_model("llama"), "all-linear") == every
    regex = r".*1\.self_attn\.[qk]_proj"
    assert targets("regex", tiny_model("llama"), regex) == regex
    one = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]
    assert targets("two", tiny_model("llama"), ["0.self_attn.q_proj", "1.self_attn.k_proj"]) == one
    # a path that is the end of another one has no name in a list
    linears = {name: nn.Linear(4, 4) for name in "qy"}
    twice = nn.ModuleDict(linears | {"x": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    adapter = lf.attach(twice, lf.LoRA(rank=2), "q|y")
    adapter.save(tmp_path / "end")
    assert json_of(tmp_path / "end")["target_modules"] == "q|y"
    adapter.detach()
    assert list(lf.load(twice, tmp_path / "end").deltas) == ["q", "y"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_is_the_same_base(dtype: torch.dtype, tiny_model, tmp_path) -> None:
    """Trained over fp32 and loaded over half precision, and the other way round."""
    model, half = tiny_model("qwen2"), tiny_model("qwen2").to(dtype)
    beside = {"bias": "lora_only", "modules_to_save": ["lm_head"]}
    moved(model, lf.LoRA(rank=4), Q, **beside).save(tmp_path / "a")
    loaded = lf.load(half, tmp_path / "a")
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    loaded.save(tmp_path / "b")
    lf.load(tiny_model("qwen2"), tmp_path / "b")
    assert_same_tensors(tmp_path / "a", tmp_path / "b", 1e-6)
    # PEFT over the same half-precision base is the measure: it rounds in other places, and keeps
    # its branch in fp32
    expected = logits(load_theirs(tiny_model("qwen2").to(dtype), tmp_path / "a"))
    exact = logits(model)
    assert noise(logits(half), exact) <= 2 * noise(expected, exact)


def test_peft_trained_on_bf16(tiny_model: Model, tmp_path: Path) -> None:
    wrapped = theirs("head-saved", tiny_model("llama").bfloat16())
    save_theirs(wrapped, tmp_path / "a")
    model, model_fp32 = tiny_model("llama").bfloat16(), tiny_model("llama").bfloat16().float()
    for one in (model, model_fp32):
        lf.load(one, tmp_path / "a")
    exact = logits(model_fp32)
    assert noise(logits(model), exact) <= 2 * noise(logits(wrapped), exact)


def classifier() -> Any:
    torch.manual_seed(3)
    return LlamaForSequenceClassification(LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=300, num_labels=3, pad_token_id=0,
    ))  # fmt: skip


def test_classifier_head(tmp_path: Path) -> None:
    """PEFT saves every module that may be a head, and asks for all of them when it loads."""
    config = peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=Q)
    wrapped, model = made_by_peft(classifier(), config), classifier()
    save_theirs(wrapped, tmp_path / "theirs")
    lf.load(model, tmp_path / "theirs").save(tmp_path / "ours")
    assert gap(logits(model), logits(wrapped)) < CLOSE
    assert gap(logits(load_theirs(classifier(), tmp_path / "ours")), logits(wrapped)) < CLOSE
    # a fresh head is drawn anew each time: it is no part of what identifies the base
    other_head = classifier()
    torch.nn.init.normal_(other_head.score.weight)
    lf.load(other_head, tmp_path / "ours")
    assert gap(logits(other_head), logits(wrapped)) < CLOSE
    # without the head PEFT would look for it in vain under that task
    plain = classifier()
    moved(plain, lf.LoRA(rank=4), Q).save(tmp_path / "headless")
    assert json_of(tmp_path / "headless")["task_type"] is None
    assert gap(logits(load_theirs(classifier(), tmp_path / "headless")), logits(plain)) < CLOSE


def test_least_config(tiny_model: Model, tmp_path: Path) -> None:
    """Only peft_type and target_modules are required; PEFT's r and alpha are 8."""
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "target_modules": ["q_proj"]}'
    )
    at, shapes = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight", {}
    for i in range(2):
        shapes |= {at.format(i, "A"): (8, 32), at.format(i, "B"): (32, 8)}
    save_file({key: torch.randn(shape) for key, shape in shapes.items()}, tmp_path / WEIGHTS)
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
    model, alone = tiny_model("llama"), tiny_model("llama")
    for case, name in (("norm-saved", "first"), ("regex", "second")):
        ours(case, tiny_model("llama")).save(tmp_path / name)
        adapter = lf.load(model, tmp_path / name, name)
    adapter.save(tmp_path / "c")
    with lf.only(model, "second"):
        expected = logits(model)
    lf.load(alone, tmp_path / "c")
    assert torch.equal(logits(alone), expected)


def test_card_is_ready_for_the_hub(tiny_model: Model, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config._name_or_path = "someone/some-base"
    ours("lora", model).save(tmp_path / "a")
    _, front, text = (tmp_path / "a" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "someone/some-base",
        "library_name": "peft",
        "tags": ["lora", "lorafold", "base_model:adapter:someone/some-base"],
    }
    assert all(part in text for part in ("lf.load", "PeftModel", "| rank | 4 |"))
    assert json_of(tmp_path / "a")["base_model_name_or_path"] == "someone/some-base"


@pytest.mark.parametrize("spec", [lf.PiSSA(rank=3, alpha=5), lf.OLoRA(rank=3)], ids=type)
@pytest.mark.parametrize("over", [False, True], ids=["plain", "dora"])
def test_inits_become_lora_of_twice_the_rank(spec: Spec, over: bool, tiny_model, tmp_path) -> None:
    model, again = tiny_model("llama"), tiny_model("llama")
    moved(model, lf.DoRA(spec) if over else spec, MORE).save(tmp_path / "a")
    assert gap(logits(load_theirs(tiny_model("llama"), tmp_path / "a")), logits(model)) < CLOSE
    loaded = lf.load(again, tmp_path / "a")
    inner = loaded.spec.over if over else loaded.spec
    assert (type(inner), inner.rank) == (lf.LoRA, 6)
    assert gap(logits(again), logits(model)) < CLOSE


def trained(model: Any, parameters: Any, after_step: Callable[[int], Any], steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=0.05)
    for step in range(1, steps + 1):
        ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        after_step(step)
        optimizer.zero_grad()


def test_pruned_ranks_are_pruned_in_the_file(tiny_model: Model, tmp_path: Path) -> None:
    spec = lf.AdaLoRA(rank=1, init_rank=4, tinit=2, tfinal=2)
    model = tiny_model("llama")
    adapter = moved(model, spec, MORE)
    trained(
        model, adapter.parameters(), lambda step: spec.after_step(adapter.own_deltas, step, 10), 10
    )
    expected = logits(model)
    kept = {path: int(delta.kept.sum()) for path, delta in adapter.deltas.items()}
    assert 0 < sum(kept.values()) == len(kept)
    assert len(set(kept.values())) > 1
    adapter.save(tmp_path / "a")
    tensors = tensors_of(tmp_path / "a")
    for path, rank in kept.items():
        assert tensors[f"base_model.model.{path}.lora_E"].shape == (rank, 1)
        assert tensors[f"base_model.model.{path}.lora_B"].shape[1] == rank
    again = tiny_model("llama")
    loaded = lf.load(again, tmp_path / "a", trainable=True)
    assert gap(logits(again), expected) < CLOSE
    loaded.save(tmp_path / "b")
    for name in "ab":
        read = load_theirs(tiny_model("llama"), tmp_path / name, *EXPECTED)
        assert gap(logits(read), expected) < CLOSE
    again.train()  # it goes on from what was kept
    more: Any = loaded.spec
    trained(again, loaded.parameters(), lambda at: more.after_step(loaded.own_deltas, at, 5), 5)


def test_ours_reads_what_peft_pruned(tiny_model: Model, tmp_path: Path) -> None:
    wrapped = made_by_peft(tiny_model("llama"), peft.AdaLoraConfig(
        target_r=1, init_r=4, tinit=2, tfinal=2, total_step=10, target_modules=MORE,
        task_type="CAUSAL_LM",
    ))  # fmt: skip
    base = wrapped.base_model
    trained(base, wrapped.parameters(), base.update_and_allocate, 10)
    expected = logits(wrapped)
    save_theirs(wrapped, tmp_path / "a")
    model = tiny_model("llama")
    lf.load(model, tmp_path / "a")
    assert gap(logits(model), expected) < CLOSE
