"""Small real checkpoints in quantized formats, written by the packages that define them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafold as lf
from command_cases import rows_file
from conftest import lorafold
from error_cases import refusal
from lorafold.api.merge import merge

IDS = torch.arange(5, 25)[None]
METHODS = {"lora": lf.LoRA(rank=4, dropout=0.0), "dora": lf.DoRA(lf.LoRA(rank=4, dropout=0.0))}
ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(8)]
FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True}
INT8: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
DYNAMIC = FP8 | {"strategy": "token", "dynamic": True}
GROUP = {"strategy": "group", "group_size": 32}
# name -> format, arguments of the weights, arguments of the activations, storage
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, str]] = {
    "fp8": ("naive-quantized", FP8 | {"strategy": "tensor"}, None, "fp8"),
    "fp8-dynamic": ("float-quantized", FP8 | {"strategy": "channel"}, DYNAMIC, "fp8"),
    "fp8-block": ("naive-quantized", FP8 | {"strategy": "block", "block_structure": [16, 32]},
                  None, "fp8"),
    "int4": ("pack-quantized", INT4 | GROUP, None, "int4"),
    "int4-channel": ("pack-quantized", INT4 | {"strategy": "channel"}, None, "int4"),
    "int4-asymmetric": ("pack-quantized", INT4 | GROUP | {"symmetric": False}, None, "int4"),
    "int8": ("naive-quantized", INT8 | {"strategy": "channel"}, None, "int8"),
    "int8-packed": ("pack-quantized", INT8 | {"strategy": "channel"}, None, "int8"),
    "int8-asymmetric": ("int-quantized", INT8 | {"strategy": "channel", "symmetric": False},
                        INT8 | {"strategy": "token", "dynamic": True}, "int8"),
}  # fmt: skip


def compressor_of(settings: dict[str, Any]) -> tuple[Any, Any]:
    """compressed-tensors' own class and scheme for the weights of this config."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(settings)
    scheme = config.config_groups["group_0"]
    return BaseCompressor.get_value_from_registry(scheme.format or config.format), scheme


def extremes(w: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """The least and the greatest element of each block of w (out, in) that shares a scale."""
    out, inn = w.shape
    rows, columns = {
        "tensor": (out, inn), "channel": (1, inn), "group": (1, args.group_size),
        "block": tuple(args.block_structure or ()),
    }[args.strategy]  # fmt: skip
    strips = [[b for b in strip.split(columns, 1)] for strip in w.split(rows)]
    low, high = (
        torch.stack([torch.stack([of(b) for b in strip]) for strip in strips])
        for of in (torch.min, torch.max)
    )
    return (low.view(1), high.view(1)) if args.strategy == "tensor" else (low, high)


def make_compressed(base: Path, path: Path, kind: str) -> Path:
    """Write the plain model at `base`, in bf16, in the format of `kind`, by compressed-tensors."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    form, weights, activations, _ = KINDS[kind]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    about = {"quant_method": "compressed-tensors", "quantization_status": "frozen"}
    groups = {"group_0": {**group, "format": form}}
    config = QuantizationConfig.model_validate(
        {"config_groups": groups, "ignore": ["lm_head"], "format": form, **about}
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    apply_quantization_config(model, config)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        low, high = extremes(module.weight.detach().float(), scheme.weights)
        scale, zero = calculate_qparams(low, high, scheme.weights)
        module.weight_scale.data.copy_(scale)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path, state_dict=model.state_dict())
    compressor.update_config(str(path))
    for file in base.iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, path)
    return path


def make_fine_grained(base: Path, path: Path, block: int = 32) -> Path:
    """Write the plain model at `base` as fine-grained FP8, as the format says."""
    shutil.copytree(base, path)
    config = json.loads((path / "config.json").read_text())
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    config["quantization_config"] = settings | {"weight_block_size": [block, block]}
    (path / "config.json").write_text(json.dumps(config))

    def quantized(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if "_proj.weight" in n]:
            w = tensors[name].float()
            blocks = w.unfold(0, block, block).unfold(1, block, block)
            scale = blocks.abs().amax((2, 3)) / torch.finfo(torch.float8_e4m3fn).max
            spread = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
            tensors[name] = (w / spread).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale

    edit(path, quantized)
    return path


def edit(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a directory's only file of weights."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def plain_of(path: Path, base: Path) -> nn.Module:
    """The plain model in fp32 with the weights of a checkpoint, by compressed-tensors."""
    from transformers import AutoModelForCausalLM

    tensors = load_file(path / "model.safetensors")
    settings = json.loads((path / "config.json").read_text())["quantization_config"]
    compressor, scheme = compressor_of(settings)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parent = name.removesuffix(".weight")
        if f"{parent}.weight_scale" not in tensors:
            parameter.data = tensors[name].float()
            continue
        own = {n.removeprefix(f"{parent}."): t for n, t in tensors.items() if f"{parent}." in n}
        parameter.data = compressor.decompress(own, scheme)["weight"].float()
    return model.eval()


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def moved(
    model: Any, method: str = "lora", name: str = "a", targets: Any = "all-linear"
) -> lf.Adapter:
    torch.manual_seed(1)
    adapter = lf.attach(model, METHODS[method], targets, name=name)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return adapter


def adapted_alike(over: Any, plain: Any, method: str) -> lf.Adapter:
    """The same adapter over codes, which is returned, and over the dequantized weights: values and
    gradients agree.
    """
    adapters = [moved(model, method) for model in (over, plain)]
    with lf.only(over), lf.only(plain):
        bare = over(IDS).logits.detach()
        assert relative(bare, plain(IDS).logits) < 1e-6
    y, expected = (model(IDS).logits for model in (over, plain))
    assert relative(expected, bare) > 1e-2
    assert relative(y, expected) < 1e-5
    for model in (over, plain):
        model(IDS, labels=IDS).loss.backward()
    for a, b in zip(*(x.parameters() for x in adapters), strict=True):
        assert relative(a.grad, b.grad) < 1e-4
    return adapters[0]


def rows_at(path: Path) -> Path:
    return rows_file(path / "rows.jsonl", ROWS)


def commands(path: Path, storage: str, out: Path) -> str:
    """Train into `out / "adapter"`, evaluate and merge without --base; returns what training
    printed.
    """
    model, adapter, data = ["--model", str(path)], str(out / "adapter"), str(rows_at(out))
    sizes = ["--steps", "3", "--batch", "4"]
    done = lorafold("train", *model, "--data", data, "--out", adapter, *sizes)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert f" ({storage}, computed in" in said
    record = json.loads((out / "adapter" / "lorafold.json").read_text())
    assert record["recipe"]["storage"] == storage
    done = lorafold("eval", *model, "--adapter", adapter, "--data", data)
    assert done.returncode == 0, done.stderr
    merged = str(out / "merged")
    done = lorafold("merge", *model, "--adapter", adapter, "--out", merged, "--json")
    assert done.returncode == 0, done.stderr
    certificate = json.loads(done.stdout.splitlines()[-1])
    assert (certificate["into"], certificate["kl"] < 1e-4) == ("trained", True)
    return said


def refused_everywhere(
    source: Path, change: Callable[[dict[str, Tensor]], Any], said: str, out: Path
) -> None:
    """With changed tensors the model is neither loaded nor trained on, and the adapter `out / "a"`
    is not merged: one line says it, and nothing is written.
    """
    path, rows = out / "q", rows_at(out)
    shutil.copytree(source, path)
    edit(path, change)
    for work in (
        lambda: lf.load_model(path),
        lambda: lf.train(lf.Recipe(steps=1), model=str(path), data=str(rows), out=out / "out"),
        lambda: merge(path, [out / "a"], out / "out"),
    ):
        assert said in refusal(work)
    assert sorted(p.name for p in out.iterdir()) == ["a", "q", "rows.jsonl"]
