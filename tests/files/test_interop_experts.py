"""Adapters over experts both ways with PEFT, and in lorafold's own form where PEFT has none.

Two fp32 implementations differ by rounding: 1e-5 of the largest number is asked of all.
"""

import json
import logging
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

import lorafold as lf
from adapter_files import WEIGHTS, change, configure, json_of, tensors_of
from conftest import lorafold, make_tokenizer
from error_cases import refusal
from lorafold.core.anatomy import Anatomy
from lorafold.core.expert_matrices import Matrices
from lorafold.core.spec import Spec
from mixtures import CONFIGS
from more_architectures import FAMILIES
from peft_cases import CLOSE, gap, logits, made_by_peft, moved, noise

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
KINDS = ["mixtral", "qwen3-moe", "qwen2-moe", "gpt-oss"]


@pytest.fixture(autouse=True)
def _seeded_and_quiet() -> None:
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    # PEFT looks for the keys of patterns among modules only, and yet applies them to parameters
    warnings.filterwarnings("ignore", message=".*pattern keys did not match any targeted module.*")


@pytest.fixture(scope="session")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny random model of a kind, which all tests share."""

    def make(kind: str) -> Path:
        path = tmp_path_factory.mktemp(kind)
        config = CONFIGS[kind]()
        config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 2, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(path)
        make_tokenizer().save_pretrained(path)
        return path

    return cache(make)


@pytest.fixture(scope="session")
def moe(moe_dir: Callable[[str], Path]) -> Callable[..., Any]:
    """A fresh copy, on every call, of the tiny random model of a kind."""

    @cache
    def read(kind: str, dtype: torch.dtype = torch.float32, **changed: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(moe_dir(kind), dtype=dtype, **changed).eval()

    return lambda *asked, **changed: deepcopy(read(*asked, **changed))


Moe = Callable[..., Any]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
THREE = lf.LoRA(rank=3, dropout=0.0)
RANKS = {"layers.1.mlp.experts.down_proj": 2, "q_proj": 4}
PATTERNS = {"rank_pattern": RANKS, "alpha_pattern": {"gate_up_proj": 5.5}}
BESIDE = {"bias": "lora_only", "modules_to_save": ["model.norm"]}
Asked = dict[str, Any]


def both(
    modules: list[str], parameters: list[str], spec: Spec = THREE, theirs: Asked | None = None,
    **ours: Any,
) -> tuple[Asked, Asked]:  # fmt: skip
    """(ours, PEFT's): the same adapter asked of both."""
    config = {"r": 3, "lora_alpha": 6, "target_modules": modules, "target_parameters": parameters}
    return {"spec": spec, "targets": [*modules, *parameters]} | ours, config | (theirs or {})


CASES: dict[str, tuple[Asked, Asked]] = {
    "experts": both([], EXPERTS, lf.LoRA(rank=3, alpha=5, dropout=0.0), {"lora_alpha": 5}),
    "mixed": both(
        ["q_proj", "v_proj"], EXPERTS,
        theirs={"target_parameters": ["gate_up_proj", "experts.down_proj"]},
    ),
    "one-parameter": both(
        [], EXPERTS[1:], lf.LoRA(rank=3, dropout=0.0, rslora=True), {"use_rslora": True}
    ),
    "one-layer": both(
        [], [f"layers.1.{GATE_UP}", DOWN],
        theirs={"target_parameters": [f"model.layers.1.{GATE_UP}", DOWN]},
    ),
    "beside": both(
        ["q_proj"], EXPERTS, theirs=BESIDE | {"trainable_token_indices": [4, 7]},
        tokens={"embed_tokens": [4, 7]}, **BESIDE,
    ),
    "patterns": both(["q_proj"], EXPERTS, lf.LoRA(rank=3, dropout=0.0, **PATTERNS), PATTERNS),
}  # fmt: skip


def theirs(case: str, model: Any) -> Any:
    return made_by_peft(model, peft.LoraConfig(**CASES[case][1]))


def in_peft(model: Any, path: Path, **how: Any) -> Any:
    return peft.PeftModel.from_pretrained(model, path, **how)


@pytest.mark.few(5)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_peft_writes_and_we_read(kind: str, case: str, moe: Moe, tmp_path: Path) -> None:
    wrapped = theirs(case, moe(kind))
    wrapped.save_pretrained(tmp_path / "a")
    model = moe(kind)
    bare = logits(model)
    lf.load(model, tmp_path / "a")
    assert gap(bare, logits(model)) > 0.01, "the adapter does something"
    assert gap(logits(model), logits(wrapped)) < CLOSE


@pytest.mark.few(5)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_we_write_and_peft_reads(kind: str, case: str, moe: Moe, tmp_path: Path) -> None:
    model = moe(kind)
    moved(model, **CASES[case][0]).save(tmp_path / "a")
    wrapped = in_peft(moe(kind), tmp_path / "a")
    assert gap(logits(wrapped), logits(model)) < CLOSE
    again = moe(kind)
    adapter = lf.load(again, tmp_path / "a")
    assert adapter.spec == CASES[case][0]["spec"]
    # a file has the biases, whose offsets are trained
    assert gap(logits(again), logits(model)) <= (CLOSE if case == "beside" else 0)
    adapter.save(tmp_path / "b")
    assert json_of(tmp_path / "b") == json_of(tmp_path / "a")
    one, other = (tensors_of(tmp_path / name) for name in "ab")
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key], rtol=0, atol=1e-6 * key.endswith("bias"))


def test_the_names_in_the_config(moe: Moe, tmp_path: Path) -> None:
    moved(moe("qwen2-moe"), **CASES["mixed"][0]).save(tmp_path / "a")
    found = json_of(tmp_path / "a")
    assert found["target_modules"] == ["q_proj", "v_proj"]
    # the shared expert's down_proj is a module, whose parameter is called weight
    assert found["target_parameters"] == ["down_proj", "gate_up_proj"]
    moved(moe("qwen2-moe"), **CASES["one-layer"][0]).save(tmp_path / "b")
    found = json_of(tmp_path / "b")
    assert found["target_modules"] == []
    assert found["target_parameters"] == ["1.mlp.experts.gate_up_proj", "down_proj"]
    moved(moe("qwen2-moe"), spec=lf.LoRA(), targets=["q_proj"]).save(tmp_path / "c")
    assert "target_parameters" not in json_of(tmp_path / "c")
    assert json_of(tmp_path / "c")["lora_dropout"] == 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_pefts(kind: str, moe: Moe, tmp_path: Path) -> None:
    model = moe(kind)
    adapter = moved(model, **CASES["mixed"][0])
    adapter.save(tmp_path / "a")
    wrapped = in_peft(moe(kind), tmp_path / "a", is_trainable=True)
    ids = torch.randint(3, 250, (2, 9))
    for m in (model, wrapped):
        m(input_ids=ids, labels=ids).loss.backward()
    grads = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
    seen = 0
    for path, delta in adapter.own_deltas.items():
        for name in ("A", "B"):
            own = getattr(delta, name).grad
            at = path.replace("experts.gate_up_proj", "experts.base_layer")
            at = at.replace("experts.down_proj", "experts")
            their = grads[f"base_model.model.{at}.lora_{name}.default.weight"]
            if own.dim() == 3:  # the layouts that PEFT's get_delta_weight reads
                count = len(own)
                their = (
                    their.reshape(count, -1, their.shape[-1])
                    if name == "A"
                    else their.reshape(len(their), -1, count).permute(2, 0, 1)
                )
            assert own.any(), (path, name)
            assert gap(own, their) < CLOSE, (path, name)
            seen += 1
    assert seen == len(grads)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_pefts(kind: str, moe: Moe, tmp_path: Path) -> None:
    wrapped = theirs("mixed", moe(kind))
    wrapped.save_pretrained(tmp_path / "a")
    model = moe(kind)
    lf.load(model, tmp_path / "a").merge()
    merged = wrapped.merge_and_unload().state_dict()
    own = model.state_dict()
    assert own.keys() == merged.keys()
    for name, weight in own.items():
        assert gap(weight, merged[name]) < CLOSE, name


@pytest.mark.parametrize("kind", ["qwen3-moe", "gpt-oss"])
def test_a_bf16_base(kind: str, moe: Moe, tmp_path: Path) -> None:
    """Every token meets all experts, since rounding may change which come first."""
    exact = moe(kind, num_experts_per_tok=4)
    moved(exact, **CASES["mixed"][0]).save(tmp_path / "a")
    rounded = {"dtype": torch.bfloat16, "num_experts_per_tok": 4}
    model = moe(kind, **rounded)
    lf.load(model, tmp_path / "a")
    wrapped = in_peft(moe(kind, **rounded), tmp_path / "a")
    own, their = (noise(logits(m), logits(exact)) for m in (model, wrapped))
    assert own < 1.5 * their
    wrapped.save_pretrained(tmp_path / "b")
    again = moe(kind, **rounded)
    lf.load(again, tmp_path / "b")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("spec", [lf.PiSSA(rank=3, dropout=0.0), lf.OLoRA(rank=3, dropout=0.0)])
def test_offsets_become_lora(kind: str, spec: Spec, moe: Moe, tmp_path: Path) -> None:
    model = moe(kind)
    moved(model, spec=spec, targets=EXPERTS).save(tmp_path / "a")
    assert json_of(tmp_path / "a")["r"] == 6
    wrapped = in_peft(moe(kind), tmp_path / "a")
    assert gap(logits(wrapped), logits(model)) < CLOSE
    again = moe(kind)
    lf.load(again, tmp_path / "a")
    assert gap(logits(again), logits(model)) < CLOSE


@pytest.mark.parametrize("kind", ["qwen2-moe", "deepseek-v3"])
def test_linears_that_peft_renames(kind: str, moe: Moe, tmp_path: Path) -> None:
    """PEFT takes the linears of DeepSeek's dense blocks for experts, so the file names weights."""
    spec = lf.LoRA(
        rank=3, dropout=0.0, rank_pattern={"gate_proj": 2}, alpha_pattern={r".*\.0\.mlp.*": 7.5}
    )
    model = moe(kind)
    adapter = moved(model, spec=spec)
    assert {p.rsplit(".", 1)[-1] for p in adapter.matches.paths} > {"gate_proj", "gate_up_proj"}
    adapter.save(tmp_path / "a")
    found = json_of(tmp_path / "a")
    assert ("down_proj.weight" in found["target_parameters"]) == (kind == "deepseek-v3")
    wrapped = in_peft(moe(kind), tmp_path / "a")
    assert gap(logits(wrapped), logits(model)) < CLOSE
    wrapped.save_pretrained(tmp_path / "b")
    for path in ("a", "b"):
        again = moe(kind)
        assert set(lf.load(again, tmp_path / path).matches.paths) == set(adapter.matches.paths)
        assert torch.equal(logits(again), logits(model))


def test_linears_that_peft_renames_beside_experts_of_another_form(tmp_path: Path) -> None:
    """PEFT goes by the type of the model alone, and computed something else without a word."""
    make = FAMILIES["longcat"].model
    model = make()
    moved(model, THREE).save(tmp_path / "a")
    theirs = in_peft(make(), tmp_path / "a")
    assert gap(logits(theirs), logits(model)) < CLOSE


def test_a_layer_of_a_model_that_peft_renames(moe: Moe, tmp_path: Path) -> None:
    """There a regular expression would be one for the last parts of paths, in all layers."""
    model = moe("deepseek-v3")
    moved(model, spec=lf.LoRA(rank=3), targets=r".*layers\.1\..*(o_proj|down_proj)").save(
        tmp_path / "a"
    )
    wrapped = in_peft(moe("deepseek-v3"), tmp_path / "a")
    assert gap(logits(wrapped), logits(model)) < CLOSE


def test_ranks_by_the_names_of_weights(moe: Moe, tmp_path: Path) -> None:
    wrapped = made_by_peft(moe("qwen2-moe"), peft.LoraConfig(
        r=3, target_modules=["q_proj"],
        target_parameters=["gate_up_proj", "shared_expert.up_proj.weight"],
        rank_pattern={"up_proj.weight": 2}, alpha_pattern={"up_proj.weight": 9, "gate_up_proj": 4},
    ))  # fmt: skip
    wrapped.save_pretrained(tmp_path / "a")
    model = moe("qwen2-moe")
    adapter = lf.load(model, tmp_path / "a")
    assert gap(logits(model), logits(wrapped)) < CLOSE
    adapter.save(tmp_path / "b")
    again = moe("qwen2-moe")
    lf.load(again, tmp_path / "b")
    assert torch.equal(logits(again), logits(model))


# (spec, peft_type)
OWN: dict[str, tuple[Spec, str]] = {
    "dora": (lf.DoRA(lf.LoRA(rank=3)), "LORAFOLD_EXPERTS_LORA"),
    "dora-pissa": (lf.DoRA(lf.PiSSA(rank=3)), "LORAFOLD_EXPERTS_LORA"),
    "dora-loha": (lf.DoRA(lf.LoHa(rank=3)), "DORA_LOHA"),
    "adalora": (lf.AdaLoRA(rank=3), "LORAFOLD_EXPERTS_ADALORA"),
    "vera": (lf.VeRA(rank=8), "LORAFOLD_EXPERTS_VERA"),
    "loha": (lf.LoHa(rank=3), "LORAFOLD_EXPERTS_LOHA"),
    "lokr": (lf.LoKr(rank=2), "LORAFOLD_EXPERTS_LOKR"),
    "ia3": (lf.IA3(), "LORAFOLD_EXPERTS_IA3"),
    "lt-sft": (lf.LTSFT(density=0.1), "LT_SFT"),
    "fastfood": (lf.Fastfood(dimension=30), "FASTFOOD"),
}


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", ["qwen2-moe", "gpt-oss"])
@pytest.mark.parametrize("method", OWN)
def test_what_peft_lacks_for_experts(kind: str, method: str, moe: Moe, tmp_path, caplog) -> None:
    spec, peft_type = OWN[method]
    model = moe(kind)
    with caplog.at_level(logging.INFO, "lorafold"):
        moved(model, spec=spec, targets=["q_proj", *EXPERTS]).save(tmp_path / "a")
    assert json_of(tmp_path / "a")["peft_type"] == peft_type
    told = "only LoRA on experts" in caplog.text
    assert told == peft_type.startswith("LORAFOLD_")
    assert "PeftModel" not in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    with pytest.raises((ValueError, KeyError)):
        in_peft(moe(kind), tmp_path / "a")
    again = moe(kind)
    adapter = lf.load(again, tmp_path / "a")
    assert gap(logits(again), logits(model)) < (CLOSE if "pissa" in method else 1e-7)
    adapter.save(tmp_path / "b")
    assert json_of(tmp_path / "b")["peft_type"] == peft_type


def test_each_expert_keeps_its_own_triplets(moe: Moe, tmp_path: Path) -> None:
    model = moe("mixtral")
    adapter = moved(model, spec=lf.AdaLoRA(rank=2, init_rank=4), targets=["q_proj", *EXPERTS])
    for delta in adapter.own_deltas.values():
        mask: Any = delta.kept
        mask.view(-1, 4)[:, :] = torch.rand(mask.view(-1, 4).shape) < 0.5
        delta.E.data.mul_(mask)  # type: ignore[operator,union-attr]
    adapter.save(tmp_path / "a")
    again = moe("mixtral")
    loaded = lf.load(again, tmp_path / "a")
    assert gap(logits(again), logits(model)) < CLOSE
    for path, delta in adapter.own_deltas.items():
        mask, found = delta.kept, loaded.own_deltas[path].kept
        assert torch.equal(found, mask if mask.dim() > 1 else mask[mask])


def test_dropout_stays_ours(moe: Moe, tmp_path: Path, caplog) -> None:
    model = moe("qwen3-moe")
    adapter = moved(model, spec=lf.LoRA(rank=3, dropout=0.25), targets="all-linear")
    with caplog.at_level(logging.INFO, "lorafold"):
        adapter.save(tmp_path / "a")
    assert "has lora_dropout 0; lorafold reads 0.25" in caplog.text
    assert json_of(tmp_path / "a")["lora_dropout"] == 0
    wrapped = in_peft(moe("qwen3-moe"), tmp_path / "a")
    assert gap(logits(wrapped), logits(model)) < CLOSE
    loaded = lf.load(moe("qwen3-moe"), tmp_path / "a")
    assert loaded.spec == adapter.spec
    record = json_of(tmp_path / "a", "lorafold.json")
    # what the record of another adapter says is not this one's
    other = moved(moe("qwen3-moe"), spec=lf.LoRA(rank=3, dropout=0.1), targets=["q_proj"])
    other.save(tmp_path / "b", record=record)
    assert lf.load(moe("qwen3-moe"), tmp_path / "b").spec == other.spec
    configure(tmp_path / "a", "lorafold.json", dropout="much")
    with pytest.raises(lf.LorafoldError, match="field dropout: found 'much', expected a float"):
        lf.load(moe("qwen3-moe"), tmp_path / "a")


def test_trained_by_the_command(moe_dir: Moe, moe: Moe, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Book a table", "completion": "for four at eight"}\n' * 8)
    done = lorafold(
        "train", "--model", str(moe_dir("qwen3-moe")), "--data", str(rows), "--epochs", "2",
        "--batch", "4", "--out", str(tmp_path / "a"), "--device", "cpu", "--storage", "fp32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = " ".join((done.stdout + done.stderr).split())
    assert told.count("PEFT supports no dropout for experts and grouped linear") == 1
    wrapped = in_peft(moe("qwen3-moe"), tmp_path / "a")
    model = moe("qwen3-moe")
    bare = logits(model)
    adapter = lf.load(model, tmp_path / "a")
    assert adapter.spec.dropout == 0.05  # type: ignore[attr-defined]
    assert gap(logits(model), bare) > CLOSE
    assert gap(logits(wrapped), logits(model)) < CLOSE


INNER = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
OUTER = "base_model.model.model.layers.1.mlp.experts.lora_B.weight"
EACH = "base_model.model.model.layers.0.mlp.experts.3.w1.lora_A.weight"
DEFECTS: dict[str, tuple[Asked, Asked, list[str]]] = {
    "tensors": (
        {INNER: torch.zeros(15, 64), OUTER: None, f"{INNER}s": torch.zeros(2)}, {},
        [f"unknown key {INNER}s", f"missing key {OUTER}", "and 1 more"],
    ),
    "a router": (
        {}, {"target_parameters": ["gate.weight", "gate_up_proj", "down_proj"]},
        ["target_parameters: found model.layers.0.mlp.gate.weight, model.layers.1.mlp.gate.weight,"
         " expected 3-dimensional parameters of experts, or the weights of linear layers"],
    ),
    "an embedding": (
        {}, {"target_parameters": ["embed_tokens.weight"]},
        ["target_parameters: found model.embed_tokens.weight, expected"],
    ),
    "none": (
        {}, {"target_parameters": ["experts.w1"], "target_modules": []},
        ["target_parameters experts.w1 match no module of this model"],
    ),
    "no list": (
        {}, {"target_parameters": "down_proj"},
        ["target_parameters: found 'down_proj'; input should be a valid list"],
    ),
    "dora": (
        {}, {"use_dora": True}, ['target_parameters=["down_proj","gate_up_proj"] is not supported']
    ),
    "modules of transformers 4": (
        {EACH: torch.zeros(3, 64)},
        {"target_modules": ["w1", "w2", "w3"], "target_parameters": None},
        [f"found tensors of single experts (1, such as {EACH})", "load the adapter with PEFT"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect(defect: str, moe: Moe, tmp_path: Path) -> None:
    path, model = tmp_path / "a", moe("mixtral")
    moved(moe("mixtral"), **CASES["experts"][0]).save(path)
    changed, fields, said = DEFECTS[defect]
    configure(path, **fields)
    change(path, lambda t: t.update(changed) or [t.pop(k) for k in changed if t[k] is None])
    before = [type(m) for m in model.modules()]
    told = refusal(lf.load, model, path)
    assert all(text in told for text in said), told
    assert [type(m) for m in model.modules()] == before


def test_a_model_with_more_experts(moe: Moe, tmp_path: Path) -> None:
    moved(moe("mixtral"), **CASES["experts"][0]).save(tmp_path / "a")
    larger = CONFIGS["mixtral"](num_local_experts=5)
    with pytest.raises(lf.LorafoldError, match=r"shape \[12, 64\], expected \[15, 64\]"):
        lf.load(AutoModelForCausalLM.from_config(larger), tmp_path / "a", allow_other_base=True)


def test_files_of_transformers_4_come_through_peft(moe: Moe, tmp_path: Path) -> None:
    """The advice that the refusal gives."""
    names, tensors = {"w1": (64, 128), "w3": (64, 128), "w2": (128, 64)}, {}
    for layer, expert, name in product(range(2), range(4), names):
        block = f"base_model.model.model.layers.{layer}.block_sparse_moe"
        at, (inn, out) = f"{block}.experts.{expert}.{name}", names[name]
        tensors[f"{at}.lora_A.weight"] = 0.2 * torch.randn(3, inn)
        tensors[f"{at}.lora_B.weight"] = 0.2 * torch.randn(out, 3)
    old = tmp_path / "old"
    old.mkdir()
    save_file(tensors, old / WEIGHTS, metadata={"format": "pt"})
    asked = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3"]}
    (old / "adapter_config.json").write_text(json.dumps(asked))
    with pytest.raises(lf.LorafoldError, match=r"found tensors of single experts \(48"):
        lf.load(moe("mixtral"), old)
    wrapped = in_peft(moe("mixtral"), old)
    wrapped.save_pretrained(tmp_path / "new")
    model = moe("mixtral")
    lf.load(model, tmp_path / "new")
    assert gap(logits(model), logits(wrapped)) < CLOSE


def test_pefts_wrappers_are_in_the_order_of_the_parameters(moe: Moe) -> None:
    """What the keys of both ways rest on, and what the other tests would find only together."""
    wrapped = theirs("experts", moe("gpt-oss"))
    outer = next(m for m in wrapped.modules() if isinstance(m, ParamWrapper))
    assert (outer.parameter_name, outer.base_layer.parameter_name) == ("down_proj", "gate_up_proj")
    model = moe("gpt-oss")
    owners = (m.owner for _, m in Anatomy.of(model).modules if isinstance(m, Matrices))
    assert [n for n in next(owners)._parameters if "bias" not in n] == ["gate_up_proj", "down_proj"]
