"""Adapter directories in PEFT's format: written whole, read strictly.

    adapter_config.json  adapter_model.safetensors  README.md       as PEFT writes and reads them
    lorafold.json                                                   the base's fingerprint, the recipe and its figures

Reading finds everything that is wrong, with the config, the keys, the shapes, the values and the base, before anything is changed.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lorafold.bases import is_linear, layer_class, layer_of
from lorafold.bases.dense import Conv1D
from lorafold.core.delta import Delta
from lorafold.core.presets import bare_modules
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.io.atomic import atomic_directory, write_json
from lorafold.io.card import plain_card
from lorafold.io.fingerprint import Fingerprint, Values, differences, fingerprint, values_of
from lorafold.io.formats import Config, Entry, config_of, entries_of, spec_of, tensor_of

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "lorafold.json"
PREFIX = "base_model.model."
Parts = Mapping[str, Sequence[Delta]]  # module path -> the deltas laid there, the method's own first


@dataclass(frozen=True)
class Stored:
    """What a directory holds: the spec and where it goes, its tensors by key, the fingerprint of its base if there is one."""

    path: Path
    spec: Spec
    targets: str | list[str]
    bias: Any
    modules_to_save: tuple[str, ...]
    tensors: dict[str, Tensor]
    base: Fingerprint


def write(
    path: str | Path, model: nn.Module, spec: Spec, parts: Parts, bias: str, modules_to_save: Sequence[str],
    *, overwrite: bool, card: str | None, record: Mapping[str, Any],
) -> Path:  # fmt: skip
    """Write an adapter's directory whole or not at all, and return its path. LorafoldError as `atomic_directory`."""
    tensors = {}
    for key, delta, entry, module in keyed(model, parts):
        value = tensor_of(delta, entry.name).detach().float().cpu()
        value = value if entry.plus is None else value + (0 if (own := own_parameter(module, entry.plus)) is None else own.float().cpu())
        tensors[key] = (value if entry.shape is None else value.view(entry.shape)).contiguous()
    sites = [p for p, deltas in parts.items() if not is_extra(deltas[0])]
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    config = config_of(spec) | {
        "base_model_name_or_path": base, "bias": bias, "modules_to_save": list(modules_to_save) or None, "inference_mode": True,
        "task_type": task_of(model), "target_modules": target_names(model, sites),
    }  # fmt: skip
    if config["peft_type"] in ("LORA", "ADALORA", "VERA"):
        config["fan_in_fan_out"] = any(layer_class(model.get_submodule(p)) is Conv1D for p in sites)
    with atomic_directory(path, overwrite) as tmp:
        save_file(tensors, tmp / WEIGHTS, metadata={"format": "pt"})
        (tmp / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        version = importlib.metadata.version("lorafold")
        write_json(tmp / RECORD, {"lorafold": version, "base": fingerprint(model, values_of(model)), **record})
        (tmp / "README.md").write_text(card or plain_card(base, repr(spec)))
    return Path(path)


def read(path: str | Path) -> Stored:
    """What lies in an adapter directory. LorafoldError for one that can't be read, or asks for what is not supported."""
    path = Path(path)
    if not path.is_dir():
        raise LorafoldError(f"adapter {path}: no such directory")
    if not (path / WEIGHTS).is_file():
        pickled = " (adapter_model.bin is a pickle, which can run code; convert it to safetensors)" * (path / "adapter_model.bin").is_file()
        raise LorafoldError(f"adapter {path}: no {WEIGHTS} in it{pickled}")
    config: Config = _json(path / CONFIG)
    try:
        with safe_open(path / WEIGHTS, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise LorafoldError(f"adapter {path / WEIGHTS}: not a complete safetensors file: {e}") from None
    try:
        spec = spec_of(config)
    except LorafoldError as e:
        raise LorafoldError(f"adapter {path}: {e}") from None
    base = _json(path / RECORD).get("base", {}) if (path / RECORD).is_file() else {}
    targets = config.get("target_modules") or spec.targets
    return Stored(path, spec, targets, config.get("bias") or "none", tuple(config.get("modules_to_save") or ()), tensors, base)


def fill(model: nn.Module, parts: Parts, stored: Stored, values: Values, allow_other_base: bool) -> None:
    """Put the stored tensors into freshly laid deltas; where their module is on the meta device they stay on the CPU.

    LorafoldError lists every key that is missing, unknown or misshapen, values that are not finite, and a base that differs
    (unless allow_other_base); no tensor has been changed then.
    """
    problems = [] if allow_other_base else [f"another base: {p}" for p in differences(stored.base, model, values)]
    problems = problems if len(problems) <= 4 else [*problems[:3], f"another base: and {len(problems) - 3} more tensors differ"]
    if problems:
        problems.append("allow_other_base (--allow-other-base) takes it all the same")
    rest = dict(stored.tensors)
    found: list[tuple[Delta, Entry, Tensor, Tensor | None]] = []
    for key, delta, entry, module in keyed(model, parts):
        own = tensor_of(delta, entry.name)
        expected = tuple(own.shape) if entry.shape is None else entry.shape
        if (tensor := rest.pop(key, None)) is None:
            problems.append(f"missing {key} {list(expected)}")
        elif tuple(tensor.shape) != expected:
            problems.append(f"{key} is {list(tensor.shape)}, expected {list(expected)}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{key} holds values that are not finite")
        else:
            path = key.removeprefix(PREFIX).removesuffix(f".{entry.key}").removesuffix(".base_layer")
            plus = None if entry.plus is None or own_parameter(module, entry.plus) is None else values(f"{path}.{entry.plus}")
            found.append((delta, entry, tensor.view(own.shape), plus))
    problems += [p for key, tensor in rest.items() if (p := stray(key, tensor, model, values)) is not None]
    if problems:
        shown = problems if len(problems) <= 12 else [*problems[:11], f"and {len(problems) - 11} more"]
        raise LorafoldError(f"adapter {stored.path} does not fit this model: {'; '.join(shown)}")
    for delta, entry, tensor, plus in found:
        assign(delta, entry.name, tensor.float() if plus is None else tensor.float() - plus.float().cpu())


def keyed(model: nn.Module, parts: Parts) -> Iterator[tuple[str, Delta, Entry, nn.Module]]:
    """(key in the file, delta, entry, module) of every tensor of an adapter; a shared tensor once."""
    shared: set[str] = set()
    for path, deltas in parts.items():
        module = model.get_submodule(path)
        wrapped = not is_extra(deltas[0])
        for delta in deltas:
            inside = "base_layer." if wrapped and is_extra(delta) else ""
            for entry in entries_of(delta, layer_of(module)):
                key = f"base_model.{entry.key}" if entry.shared else f"{PREFIX}{path}.{inside}{entry.key}"
                if key not in shared:
                    yield key, delta, entry, module
                if entry.shared:
                    shared.add(key)


def is_extra(delta: Delta) -> bool:
    """A trained bias or a module to save: laid beside the method's own deltas, and named after the module's own parameters."""
    return all(entry.key in ("weight", "bias") for entry in entries_of(delta, layer_of(nn.Identity())))


def own_parameter(module: nn.Module, name: str) -> Tensor | None:
    return module._parameters.get(name)


def assign(delta: Delta, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module, old = delta.get_submodule(owner), tensor_of(delta, name)
    value = value.contiguous() if old.is_meta else value.to(old.device).contiguous()
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=old.requires_grad)
    else:
        module._buffers[leaf] = value


def stray(key: str, tensor: Tensor, model: nn.Module, values: Values) -> str | None:
    """What is wrong with a key that no delta has: nothing if it is a copy of the base's own parameter, as PEFT keeps of embeddings."""
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    own = dict(model.named_parameters(remove_duplicate=False)).get(name)
    if own is None or tuple(own.shape) != tuple(tensor.shape):
        return f"unknown {key} {list(tensor.shape)}"
    unit = torch.finfo(torch.bfloat16).eps
    same = torch.allclose(values(name).float().cpu(), tensor.float(), rtol=unit, atol=1e-7)
    return None if same else f"{key} holds other values than the base: it was trained too, or belongs to another base"


def target_names(model: nn.Module, sites: Sequence[str]) -> list[str]:
    """The last parts of the paths where these select exactly the sites, by PEFT's rule; else the paths themselves."""
    names = sorted({p.rsplit(".", 1)[-1] for p in sites})
    hit = {p for p, _ in bare_modules(model) if p.rsplit(".", 1)[-1] in names}
    return names if hit == set(sites) and "" not in sites else sorted(sites)


def task_of(model: nn.Module) -> str | None:
    name = type(model).__name__
    tasks = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
             "ForConditionalGeneration": "SEQ_2_SEQ_LM", "ForTokenClassification": "TOKEN_CLS"}  # fmt: skip
    return next((task for end, task in tasks.items() if re.search(f"{end}$", name)), None)


def peft_targets(stored: Stored, model: nn.Module) -> str | list[str]:
    """The targets as PEFT means them: its "all-linear" takes every linear but the output layer."""
    if stored.targets != "all-linear":
        return stored.targets
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return [p for p, m in bare_modules(model) if is_linear(m) and m is not head]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LorafoldError(f"adapter {path.parent}: no {path.name} in it") from None
    except (OSError, ValueError) as e:
        raise LorafoldError(f"adapter {path}: can't be read as JSON: {e}") from None
