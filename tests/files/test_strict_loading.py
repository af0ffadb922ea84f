"""Loading reports everything wrong with an adapter at once, and leaves the model unchanged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaModel

import error_cases
import lorafold as lf
from adapter_files import WEIGHTS, change, configure, json_of
from lorafold.files.atomic import MANIFEST
from lorafold.models import fingerprint
from lorafold.models.weights import FileWeights, InMemory, model_files

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
Tensors = dict[str, torch.Tensor]
Model = Callable[[str], Any]


@pytest.fixture
def saved(tiny_model: Model, tmp_path: Path) -> Path:
    """An adapter without a manifest, as PEFT's own are: what is wrong shows in the files alone."""
    path = lf.attach(tiny_model("llama"), lf.LoRA(rank=4), ["q_proj"]).save(tmp_path / "adapter")
    (path / MANIFEST).unlink()
    return path


def refusal(model: Any, path: Path, **options: Any) -> str:
    """The error of loading, one line, after which the model is bit for bit what it was."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes = {n: type(m) for n, m in model.named_modules()}
    trainable = [p.requires_grad for p in model.parameters()]
    told = error_cases.refusal(lf.load, model, path, **options)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return told


def test_loads_untouched(saved: Path, tiny_model: Model) -> None:
    lf.load(tiny_model("llama"), saved)


EMBEDDING = "base_model.model.model.embed_tokens"
NOWHERE = "base_model.model.nowhere.lora_A.weight"
DEFECTS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "unknown": (
        lambda t: t.update({NOWHERE: torch.ones(4, 32)}),
        "unknown key base_model.model.nowhere.lora_A",
    ),
    "missing": (lambda t: t.pop(A), f"missing key {A}"),
    "misshapen": (
        lambda t: t.update({A: torch.ones(3, 32)}), f"{A}: shape [3, 32], expected [4, 32]"
    ),
    "transposed": (
        lambda t: t.update({A: torch.ones(32, 4)}), f"{A}: shape [32, 4], expected [4, 32]"
    ),
    "nan": (lambda t: t[B][0].fill_(float("nan")), f"{B}: 4 of 128 values are not finite"),
    "inf": (lambda t: t[B][0, :1].fill_(float("inf")), f"{B}: 1 of 128 values are not finite"),
    "whole numbers": (
        lambda t: t.update({A: torch.ones(4, 32, dtype=torch.int64)}),
        f"{A}: dtype torch.int64, expected a floating-point dtype",
    ),
    "other embedding": (
        lambda t: t.update({f"{EMBEDDING}.weight": torch.ones(300, 32)}),
        f"{EMBEDDING}.weight: a base weight that differs",
    ),
    "longer embedding": (
        lambda t: t.update({f"{EMBEDDING}.base_layer.weight": torch.ones(301, 32)}),
        "base_layer.weight: a base weight of shape [301, 32], but this base's has shape [300, 32]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_of_the_tensors(defect: str, saved: Path, tiny_model: Model) -> None:
    edit, said = DEFECTS[defect]
    change(saved, edit)
    message = refusal(tiny_model("llama"), saved)
    assert said in message, message
    assert message.count(";") == 0, "one defect, one complaint"


def test_several_defects_in_one_message(saved: Path, tiny_model: Model) -> None:
    for name in ("unknown", "missing", "nan", "other embedding"):
        change(saved, DEFECTS[name][0])
    model = tiny_model("llama")
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight)
    message = refusal(model, saved)
    assert int(message.rpartition(" and ")[2].removesuffix(" more")) >= 4
    assert len(message.replace(str(saved), "")) <= 300
    assert "the adapter was trained on another base" in message
    assert "up_proj.weight (other values)" in message


def unsupported(**field: Any) -> tuple[dict[str, Any], list[str]]:
    [(name, value)] = field.items()
    shown = json.dumps(value, separators=(",", ":")) if not isinstance(value, str) else repr(value)
    return field, [f"{name}={shown} is not supported"]


NO_REGEX = "value error, not a regular expression"
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another method": ({"peft_type": "OFT"}, ["peft_type 'OFT' is not supported", "LORA"]),
    "no method": ({"peft_type": None}, ["peft_type None is not supported"]),
    "quantization-aware": unsupported(use_qalora=True),
    "replication": unsupported(layer_replication=[[0, 2], [1, 2]]),
    "parameters": (
        {"target_parameters": ["model.norm.weight"]},
        ["target_parameters: found model.norm.weight, expected 3-dimensional"],
    ),
    "tokens without rows": (
        {"trainable_token_indices": [1, 2]},
        ["missing key", "embed_tokens.token_adapter.trainable_tokens_delta"],
    ),
    "tokens in words": (
        {"trainable_token_indices": "1, 2"},
        ["trainable_token_indices: found '1, 2'; input should be a valid list"],
    ),
    "from the future": unsupported(use_something_new=3),
    "lora bias": unsupported(lora_bias=True),
    "tying": unsupported(ensure_weight_tying=True),
    "residual base": (
        {"init_lora_weights": "pissa"},
        ["init_lora_weights='pissa' is not supported", "initialization changes the base weights"],
    ),
    "pissa niter": unsupported(init_lora_weights="pissa_niter_4"),
    "loftq": unsupported(init_lora_weights="loftq"),
    "rank in words": ({"r": "8"}, ["r: found '8'; input should be a valid integer"]),
    "no rank": ({"r": 0}, ["rank: found 0"]),
    "odd bias": ({"bias": "some"}, ["bias: found 'some'"]),
    "targets missing": ({"target_modules": None}, ["target_modules: found None"]),
    "targets nowhere": (
        {"target_modules": ["c_attn"]}, ["target_modules c_attn match no module of this model"]
    ),
    "targets broken": (
        {"target_modules": "(q_proj"}, [f"target_modules: found '(q_proj'; {NO_REGEX}"]
    ),
    "saved broken": (
        {"modules_to_save": ["(q_proj"]}, [f"modules_to_save: found ['(q_proj']; {NO_REGEX}"]
    ),
    "pattern broken": (
        {"rank_pattern": {"(q": 4}}, [f"rank_pattern: found {{'(q': 4}}; {NO_REGEX}"]
    ),
    "rank pattern": ({"rank_pattern": {"q_proj": "x"}}, ["rank_pattern: found"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_ask_for_more(case: str, saved: Path, tiny_model: Model) -> None:
    fields, said = REFUSED[case]
    configure(saved, **fields)
    message = refusal(tiny_model("llama"), saved)
    assert all(text in message for text in said), message


def test_all_of_a_config_at_once(saved: Path, tiny_model: Model) -> None:
    fields = {"layer_replication": [[0, 1]], "r": "8", "bias": "some"}
    configure(saved, use_qalora=True, init_lora_weights="olora", **fields)
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    message = refusal(tiny_model("llama"), saved)
    for text in ("r: found '8'", "; and 4 more", "adapter_model.bin", "convert to"):
        assert text in message, message


def test_dora_names_its_mark_until_it_is_there(saved: Path, tiny_model: Model) -> None:
    """The magnitudes are missing, or it is refused by name: it is never read as plain LoRA."""
    configure(saved, use_dora=True)
    message = refusal(tiny_model("llama"), saved)
    assert "use_dora=true is not supported" in message or "lora_magnitude_vector" in message


def test_neutral_values_and_origins_are_no_obstacle(saved: Path, tiny_model: Model) -> None:
    origins = {"peft_version": "9.9", "revision": "abc", "auto_mapping": {"parent_library": "x"}}
    unknown = {"something_new": None, "other_new": False, "third": {}, "fourth": []}
    idle = {"megatron_core": "megatron.core", "qalora_group_size": 16, "inference_mode": False}
    configure(saved, **origins, **unknown, **idle, rank_pattern=None, task_type=None)
    lf.load(tiny_model("llama"), saved)


CUTS = [(WEIGHTS, share) for share in (0, 0.01, 0.5, 0.999)]


@pytest.mark.parametrize(
    ("file", "share"), [*CUTS, ("adapter_config.json", 0.5), ("lorafold.json", 0.5)]
)
def test_files_cut_short(file: str, share: float, saved: Path, tiny_model: Model) -> None:
    data = (saved / file).read_bytes()
    (saved / file).write_bytes(data[: int(len(data) * share)])
    message = refusal(tiny_model("llama"), saved)
    assert file in message
    assert "not readable" in message or "found data at" in message


@pytest.mark.parametrize(
    "edit", [{"shape": [0, 2]}, {"dtype": "int4"}, {"values": "zz"}, {"more": 1}]
)
def test_fingerprints_that_are_none(edit: dict[str, Any], saved: Path, tiny_model: Model) -> None:
    base = json_of(saved, "lorafold.json")["base"]
    base["lm_head.weight"].update(edit)
    configure(saved, "lorafold.json", base=base)
    told = refusal(tiny_model("llama"), saved)
    assert "lorafold.json: field base: not a valid fingerprint (lm_head.weight" in told


def test_files_missing(saved: Path, tiny_model: Model, tmp_path: Path) -> None:
    assert "no adapter_config.json" in refusal(tiny_model("llama"), tmp_path / "nowhere")
    (saved / WEIGHTS).unlink()
    assert "adapter_model.safetensors: the file is missing" in refusal(tiny_model("llama"), saved)
    shutil.move(saved, tmp_path / "outer" / "sft")
    assert "found an adapter in" in (message := refusal(tiny_model("llama"), tmp_path / "outer"))
    assert "sft" in message


def test_wrong_base(saved: Path, tiny_model: Model) -> None:
    def other() -> Any:
        model = tiny_model("llama")
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.001)
        return model

    message = refusal(other(), saved)
    assert "the adapter was trained on another base" in message
    assert "--allow-other-base" in message
    lf.load(other(), saved, allow_other_base=True)
    change(saved, DEFECTS["misshapen"][0])  # shapes are no matter of opinion
    assert "shape" in refusal(tiny_model("llama"), saved, allow_other_base=True)


def test_another_architecture_is_named_together_with_its_targets(saved: Path, tiny_model) -> None:
    message = refusal(tiny_model("gpt2"), saved)
    assert "fingerprinted weights" in message
    assert message.endswith("; and 1 more")
    targets = refusal(tiny_model("gpt2"), saved, allow_other_base=True)
    assert "target_modules q_proj match no module" in targets


def test_merged_model_is_another_base(saved: Path, tiny_model: Model) -> None:
    model = tiny_model("llama")
    adapter = lf.load(model, saved)
    for name, p in adapter.named_parameters():
        torch.nn.init.constant_(p, 0.05) if name.endswith("B") else None
    adapter.merge()
    assert "q_proj.weight (other values)" in refusal(model, saved)


def test_values_that_are_not_finite_are_not_saved(tiny_model: Model, tmp_path: Path) -> None:
    adapter = lf.attach(tiny_model("llama"), lf.LoRA(rank=4), ["q_proj"])
    next(adapter.parameters()).data[0, 0] = float("nan")
    with pytest.raises(lf.LorafoldError, match="1 of 128 values are not finite"):
        adapter.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_module_to_save_without_a_name_in_peft(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 300}
    model = LlamaModel(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=4))
    adapter = lf.attach(model, lf.LoRA(rank=4), ["q_proj"], modules_to_save=["norm"])
    with pytest.raises(lf.LorafoldError, match=r"can't select them without .*input_layernorm"):
        adapter.save(tmp_path / "a")


def test_fingerprint_of_a_model_and_of_its_files(tiny_model: Model, tiny_model_dir) -> None:
    for kind in ("llama", "gpt2", "gemma", "qwen2"):
        model, files = tiny_model(kind), FileWeights(model_files(tiny_model_dir(kind)))
        of_model = fingerprint.of_model(model)
        in_files = fingerprint.of(files)
        assert 10 < len(of_model) <= fingerprint.MAX_TENSORS
        shared = of_model.keys() & in_files.keys()
        assert {k: of_model[k] for k in shared} == {k: in_files[k] for k in shared}
        # tied weights are in the one and absent in the other
        halves = [tiny_model(kind).to(dtype) for dtype in (torch.bfloat16, torch.float16)]
        for known in (of_model, in_files, *map(fingerprint.of_model, halves)):
            for weights in (files, *map(InMemory.of_model, (model, *halves))):
                assert fingerprint.differences(known, weights) == []


def test_fingerprint_under_the_body_s_own_names(tiny_model, tiny_model_dir, tmp_path: Path) -> None:
    """Files saved from the body alone lack the first word of every name."""
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path / "body")
    body = FileWeights(model_files(tmp_path / "body"))
    assert "wte.weight" in body.names
    assert fingerprint.differences(fingerprint.of_model(model), body) == []
    in_files = fingerprint.of(FileWeights(model_files(tmp_path / "body")))
    assert fingerprint.differences(in_files, InMemory.of_model(model)) == []
    assert fingerprint.differences(fingerprint.of_model(tiny_model("llama")), body) != []


def test_fingerprint_is_the_base_s_under_adapters(tiny_model: Model) -> None:
    model = tiny_model("llama")
    bare = fingerprint.of_model(model)
    adapter = lf.attach(model, lf.LoRA(rank=4), "all-linear", modules_to_save=["lm_head"])
    for p in adapter.parameters():
        torch.nn.init.normal_(p)
    assert fingerprint.of_model(model) == bare
    assert not any(name.startswith("lm_head") for name in fingerprint.of_model(model, ["lm_head"]))


def skeleton(path: Path) -> Any:
    """A model without data."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))


def test_base_on_the_meta_device(saved: Path, tiny_model: Model, tiny_model_dir) -> None:
    """The base's own numbers come from its files, the factors lie on the CPU."""
    llama = tiny_model_dir("llama")
    adapter = lf.load(skeleton(llama), saved, base=FileWeights(model_files(llama)))
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in adapter.parameters())
    real = lf.load(tiny_model("llama"), saved)
    for a, b in zip(adapter.parameters(), real.parameters(), strict=True):
        assert torch.equal(a, b)
    other = FileWeights(model_files(tiny_model_dir("qwen2")))
    assert "another base" in error_cases.refusal(lf.load, skeleton(llama), saved, base=other)


def test_trained_biases_over_the_meta_device(tiny_model, tiny_model_dir, tmp_path: Path) -> None:
    """A file holds a bias whole, a delta the difference: the base's own comes from the files."""
    adapter = lf.attach(tiny_model("qwen2"), lf.LoRA(rank=4), ["q_proj"], bias="lora_only")
    for p in adapter.parameters():
        torch.nn.init.normal_(p)
    adapter.save(tmp_path / "a")
    base = tiny_model_dir("qwen2")
    again = lf.load(skeleton(base), tmp_path / "a", base=FileWeights(model_files(base)))
    for a, b in zip(adapter.parameters(), again.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)
