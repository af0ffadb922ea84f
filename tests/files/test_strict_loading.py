"""Loading is strict: whatever is wrong with an adapter directory is named, all of it at once, and
the model is left as it was.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold as lf
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


def change(path: Path, edit: Callable[[Tensors], Any]) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


def configure(path: Path, **fields: Any) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | fields))


def refusal(model: Any, path: Path, **options: Any) -> str:
    """The error of loading, one line, after which the model is bit for bit what it was."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes = {n: type(m) for n, m in model.named_modules()}
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(lf.LorafoldError) as e:
        lf.load(model, path, **options)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "\n" not in str(e.value)
    return str(e.value)


def test_loads_untouched(saved: Path, tiny_model: Model) -> None:
    lf.load(tiny_model("llama"), saved)


DEFECTS: dict[str, tuple[Callable[[Tensors], Any], list[str]]] = {
    "unknown": (
        lambda t: t.update({"base_model.model.nowhere.lora_A.weight": torch.ones(4, 32)}),
        ["unknown key base_model.model.nowhere.lora_A"],
    ),
    "missing": (lambda t: t.pop(A), [f"missing key {A}"]),
    "misshapen": (
        lambda t: t.update({A: torch.ones(3, 32)}),
        [f"{A}: shape [3, 32], expected [4, 32]"],
    ),
    "transposed": (
        lambda t: t.update({A: torch.ones(32, 4)}),
        [f"{A}: shape [32, 4], expected [4, 32]"],
    ),
    "nan": (lambda t: t[B][0].fill_(float("nan")), [f"{B}: 4 of 128 values are not finite"]),
    "inf": (lambda t: t[B][0, :1].fill_(float("inf")), [f"{B}: 1 of 128 values are not finite"]),
    "whole numbers": (
        lambda t: t.update({A: torch.ones(4, 32, dtype=torch.int64)}),
        [f"{A}: dtype torch.int64, expected a floating-point dtype"],
    ),
    "other embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(300, 32)}),
        ["base_model.model.model.embed_tokens.weight: a base weight that differs"],
    ),
    "longer embedding": (
        lambda t: t.update(
            {"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(301, 32)}
        ),
        [
            "embed_tokens.base_layer.weight: a base weight of shape [301, 32], where this base has"
            " [300, 32]"
        ],
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_of_the_tensors(defect: str, saved: Path, tiny_model: Model) -> None:
    edit, said = DEFECTS[defect]
    change(saved, edit)
    message = refusal(tiny_model("llama"), saved)
    assert all(text in message for text in said), message
    assert message.count(";") == 0, "one defect, one complaint"


def test_several_defects_in_one_message(saved: Path, tiny_model: Model) -> None:
    for name in ("unknown", "missing", "nan", "other embedding"):
        change(saved, DEFECTS[name][0])
    model = tiny_model("llama")
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight)
    message = refusal(model, saved)
    assert int(message.rpartition(" and ")[2].removesuffix(" more")) >= 4
    assert len(message.replace(str(saved), "")) <= 300
    assert "not the base it was trained on" in message
    assert "up_proj.weight (other values)" in message


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another method": ({"peft_type": "OFT"}, ["peft_type 'OFT' is not supported", "LORA"]),
    "no method": ({"peft_type": None}, ["peft_type None is not supported"]),
    "quantization-aware": ({"use_qalora": True}, ["use_qalora=true is not supported"]),
    "replication": (
        {"layer_replication": [[0, 2], [1, 2]]},
        ["layer_replication=[[0,2],[1,2]] is not supported"],
    ),
    "parameters": (
        {"target_parameters": ["model.norm.weight"]},
        ["target_parameters: found model.norm.weight, expected the matrices of experts"],
    ),
    "tokens without rows": (
        {"trainable_token_indices": [1, 2]},
        ["missing key", "embed_tokens.token_adapter.trainable_tokens_delta"],
    ),
    "tokens in words": (
        {"trainable_token_indices": "1, 2"},
        ["trainable_token_indices: found '1, 2'; input should be a valid list"],
    ),
    "from the future": ({"use_something_new": 3}, ["use_something_new=3 is not supported"]),
    "lora bias": ({"lora_bias": True}, ["lora_bias=true is not supported"]),
    "tying": ({"ensure_weight_tying": True}, ["ensure_weight_tying=true is not supported"]),
    "residual base": (
        {"init_lora_weights": "pissa"},
        ["init_lora_weights='pissa' is not supported", "belongs to a base"],
    ),
    "pissa niter": (
        {"init_lora_weights": "pissa_niter_4"},
        ["init_lora_weights='pissa_niter_4' is not supported"],
    ),
    "loftq": ({"init_lora_weights": "loftq"}, ["init_lora_weights='loftq' is not supported"]),
    "rank in words": ({"r": "8"}, ["r: found '8'; input should be a valid integer"]),
    "no rank": ({"r": 0}, ["rank: found 0"]),
    "odd bias": ({"bias": "some"}, ["bias: found 'some'"]),
    "targets missing": ({"target_modules": None}, ["target_modules: found None"]),
    "targets nowhere": (
        {"target_modules": ["c_attn"]},
        ["target_modules c_attn match no module of this model"],
    ),
    "targets broken": (
        {"target_modules": "(q_proj"},
        ["target_modules: found '(q_proj'; value error, not a regular expression"],
    ),
    "saved broken": (
        {"modules_to_save": ["(q_proj"]},
        ["modules_to_save: found ['(q_proj']; value error, not a regular expression"],
    ),
    "pattern broken": (
        {"rank_pattern": {"(q": 4}},
        ["rank_pattern: found {'(q': 4}; value error, not a regular expression"],
    ),
    "rank pattern": ({"rank_pattern": {"q_proj": "x"}}, ["rank_pattern: found"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_ask_for_more(case: str, saved: Path, tiny_model: Model) -> None:
    fields, said = REFUSED[case]
    configure(saved, **fields)
    message = refusal(tiny_model("llama"), saved)
    assert all(text in message for text in said), message


def test_all_of_a_config_at_once(saved: Path, tiny_model: Model) -> None:
    configure(
        saved,
        use_qalora=True,
        layer_replication=[[0, 1]],
        r="8",
        bias="some",
        init_lora_weights="olora",
    )
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    message = refusal(tiny_model("llama"), saved)
    for text in ("r: found '8'", "; and 4 more", "adapter_model.bin", "convert it to"):
        assert text in message, message


def test_dora_names_its_mark_until_it_is_there(saved: Path, tiny_model: Model) -> None:
    """Either DoRA is understood, then the magnitudes are missing, or it is refused by name; never
    read as plain LoRA.
    """
    configure(saved, use_dora=True)
    message = refusal(tiny_model("llama"), saved)
    assert "use_dora=true is not supported" in message or "lora_magnitude_vector" in message


def test_neutral_values_and_origins_are_no_obstacle(saved: Path, tiny_model: Model) -> None:
    configure(
        saved,
        peft_version="9.9",
        revision="abc",
        something_new=None,
        other_new=False,
        third={},
        fourth=[],
        megatron_core="megatron.core",
        qalora_group_size=16,
        auto_mapping={"parent_library": "x"},
        rank_pattern=None,
        task_type=None,
        inference_mode=False,
    )
    lf.load(tiny_model("llama"), saved)


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


CUTS = [("adapter_model.safetensors", share) for share in (0, 0.01, 0.5, 0.999)]


@pytest.mark.parametrize(
    ("file", "share"), [*CUTS, ("adapter_config.json", 0.5), ("lorafold.json", 0.5)]
)
def test_files_cut_short(file: str, share: float, saved: Path, tiny_model: Model) -> None:
    cut(saved / file, share)
    message = refusal(tiny_model("llama"), saved)
    assert file in message
    assert "not readable" in message or "found its data at" in message


@pytest.mark.parametrize(
    "edit", [{"shape": [0, 2]}, {"dtype": "int4"}, {"values": "zz"}, {"more": 1}]
)
def test_fingerprints_that_are_none(edit: dict[str, Any], saved: Path, tiny_model: Model) -> None:
    record = json.loads((saved / "lorafold.json").read_text())
    record["base"]["lm_head.weight"].update(edit)
    (saved / "lorafold.json").write_text(json.dumps(record))
    assert "lorafold.json: field base: not a valid fingerprint (lm_head.weight" in refusal(
        tiny_model("llama"), saved
    )


def test_files_missing(saved: Path, tiny_model: Model, tmp_path: Path) -> None:
    assert "no adapter_config.json" in refusal(tiny_model("llama"), tmp_path / "nowhere")
    (saved / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors: it is missing" in refusal(tiny_model("llama"), saved)
    shutil.move(saved, tmp_path / "outer" / "sft")
    assert "there is one in" in (message := refusal(tiny_model("llama"), tmp_path / "outer"))
    assert "sft" in message


def test_wrong_base(saved: Path, tiny_model: Model) -> None:
    def other() -> Any:
        model = tiny_model("llama")
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.001)
        return model

    message = refusal(other(), saved)
    assert "not the base it was trained on" in message
    assert "--allow-other-base" in message
    lf.load(other(), saved, allow_other_base=True)
    # shapes are no matter of opinion
    assert "shape" in refusal(tiny_model("llama"), misshapen(saved), allow_other_base=True)


def misshapen(path: Path) -> Path:
    change(path, DEFECTS["misshapen"][0])
    return path


def test_another_architecture_is_named_together_with_its_targets(
    saved: Path, tiny_model: Model
) -> None:
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
    from transformers import LlamaConfig, LlamaModel

    model = LlamaModel(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=300,
        )
    )
    adapter = lf.attach(model, lf.LoRA(rank=4), ["q_proj"], modules_to_save=["norm"])
    with pytest.raises(lf.LorafoldError, match=r"can't name them without .*input_layernorm"):
        adapter.save(tmp_path / "a")


def test_fingerprint_of_a_model_and_of_its_files(
    tiny_model: Model, tiny_model_dir: Callable[[str], Path]
) -> None:
    for kind in ("llama", "gpt2", "gemma", "qwen2"):
        model, files = tiny_model(kind), FileWeights(model_files(tiny_model_dir(kind)))
        of_model = fingerprint.of_model(model)
        in_files = fingerprint.of(files)
        assert 10 < len(of_model) <= fingerprint.TENSORS
        assert {k: of_model[k] for k in of_model.keys() & in_files.keys()} == {
            k: in_files[k] for k in of_model.keys() & in_files.keys()
        }
        # tied weights are in the one and absent in the other
        for known in (of_model, in_files):
            for weights in (
                InMemory.of_model(model),
                files,
                InMemory.of_model(tiny_model(kind).bfloat16()),
                InMemory.of_model(tiny_model(kind).half()),
            ):
                assert fingerprint.differences(known, weights) == []
        for half in (torch.bfloat16, torch.float16):
            known = fingerprint.of_model(tiny_model(kind).to(half))
            for weights in (
                InMemory.of_model(model),
                files,
                InMemory.of_model(tiny_model(kind).bfloat16()),
                InMemory.of_model(tiny_model(kind).half()),
            ):
                assert fingerprint.differences(known, weights) == []


def test_fingerprint_under_the_body_s_own_names(
    tiny_model: Model, tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
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


def test_base_on_the_meta_device(
    saved: Path, tiny_model: Model, tiny_model_dir: Callable[[str], Path]
) -> None:
    """A skeleton without data takes an adapter as well: the base's own numbers come from its files,
    the factors lie on the CPU.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(tiny_model_dir("llama"))
        )
    files = FileWeights(model_files(tiny_model_dir("llama")))
    adapter = lf.load(skeleton, saved, base=files)
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in adapter.parameters())
    real = lf.load(tiny_model("llama"), saved)
    assert all(
        torch.equal(a, b) for a, b in zip(adapter.parameters(), real.parameters(), strict=True)
    )
    with torch.device("meta"):
        other = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(tiny_model_dir("llama"))
        )
    assert "not the base" in refusal_of_files(
        other, saved, FileWeights(model_files(tiny_model_dir("qwen2")))
    )


def refusal_of_files(model: Any, path: Path, base: FileWeights) -> str:
    with pytest.raises(lf.LorafoldError) as e:
        lf.load(model, path, base=base)
    return str(e.value)


def test_trained_biases_over_the_meta_device(
    tiny_model: Model, tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """A file holds a bias whole, a delta the difference: the base's own comes from the files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    adapter = lf.attach(tiny_model("qwen2"), lf.LoRA(rank=4), ["q_proj"], bias="lora_only")
    for p in adapter.parameters():
        torch.nn.init.normal_(p)
    adapter.save(tmp_path / "a")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(tiny_model_dir("qwen2"))
        )
    again = lf.load(
        skeleton, tmp_path / "a", base=FileWeights(model_files(tiny_model_dir("qwen2")))
    )
    for a, b in zip(adapter.parameters(), again.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)
