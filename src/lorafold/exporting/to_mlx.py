"""Exports for mlx-lm: an adapter directory in the format of mlx-lm's own training.

    lora_a (in, r) = down^T, lora_b (r, out) = up^T with every scale in it; DoRA: m (out,)
    experts       switch_mlp.{gate,up,down}_proj    lora_a (E, r, in), lora_b (E, out, r)

mlx-lm (0.32.2, tuner/utils.py) supports one rank and scale per file and builds LoRA layers at all
paths in `keys`, so `keys` contains exactly the paths of the tensors. Most of its models read
rope_theta and num_experts, not rope_parameters and num_local_experts, so a base with the newer keys
is copied, and the older keys are added.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lorafold.core.attach import adapted_modules
from lorafold.exporting.plain_lora import OTHER_TEMPLATE, TEMPLATE, base_reference, write_template
from lorafold.exporting.target import (
    FILE_CONTENT,
    ExportedFiles,
    Factors,
    Progress,
    Subject,
    Target,
    Update,
    full_attention_period,
    lora_problems,
    split_experts,
    window_notes,
)
from lorafold.files.atomic import read_object, write_json
from lorafold.fold.plan import deltas_of
from lorafold.inspecting.updates import pad_rank
from lorafold.layers import is_linear, layer_of
from lorafold.methods.dora import DoRADelta

MODEL_CONFIG, MANIFEST = "config.json", "manifest.json"
THETA = "rope_theta"
# mlx-lm reads the full-attention layers of Gemma 3 from this key, not from layer_types
GEMMA, PATTERN, DEFAULT_PERIOD = "gemma3_text", "sliding_window_pattern", 6
PARTIAL = "partial_rotary_factor"
KINDS = ("full_attention", "sliding_attention")  # layer types with their own positions
WEIGHTS, CONFIG, BASE = "adapters.safetensors", "adapter_config.json", "base"
BLOCK = re.compile(r"(model\.layers\.\d+)\.(.+)")
EXPERTS = re.compile(r"mlp\.experts\.(\w+)")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
# families whose sliding windows mlx-lm ignores
NO_WINDOWS = (
    "gemma2", "mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
)  # fmt: skip
# mlx-lm's path of a block's experts, by model type
EXPERT_PATHS = {
    "gpt_oss": "mlp.experts",
    "mixtral": "block_sparse_moe.switch_mlp",
    "olmoe": "mlp.switch_mlp",
    "qwen2_moe": "mlp.switch_mlp",
    "qwen3_moe": "mlp.switch_mlp",
}


def legacy_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    more = {**_positions(config), **_pattern(config)}
    if "num_local_experts" in config and "num_experts" not in config:
        more["num_experts"] = config["num_local_experts"]
    return {**config, **more} if more else None


def _pattern(config: Mapping[str, Any]) -> dict[str, Any]:
    kinds = config.get("layer_types")
    if config.get("model_type") != GEMMA or PATTERN in config or not isinstance(kinds, list):
        return {}
    period = full_attention_period(kinds)
    return {} if period in (None, DEFAULT_PERIOD) else {PATTERN: period}


def _positions(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or config.get(THETA) is not None:
        return {}
    full, local = (rope.get(kind) for kind in KINDS)
    of_full = full if isinstance(full, Mapping) else rope
    if THETA not in of_full:
        return {}
    more = {THETA: of_full[THETA]}
    if PARTIAL in of_full and PARTIAL not in config:
        more[PARTIAL] = of_full[PARTIAL]
    if of_full.get("rope_type", "default") != "default":
        more["rope_scaling"] = {k: v for k, v in of_full.items() if k != THETA}
    if isinstance(local, Mapping) and THETA in local:
        more["rope_local_base_freq"] = local[THETA]
    return more


def write_legacy_base(source: Path, directory: Path) -> bool:
    config = legacy_config(read_object(source / MODEL_CONFIG))
    if config is None:
        return False
    directory.mkdir()
    for file in source.iterdir():
        if file.name in (MODEL_CONFIG, MANIFEST) or not file.is_file():
            continue
        real = file.resolve()
        try:
            os.link(real, directory / file.name)
        except OSError:
            shutil.copyfile(real, directory / file.name)
    write_json(directory / MODEL_CONFIG, config)
    return True


class ToMlx(Target):
    name = "mlx"
    engine = "mlx"

    def problems(self, subject: Subject) -> Sequence[str]:
        update = subject.update
        if doras := _dora_factors(subject):
            update = Update({path: pair for path, (pair, _) in doras.items()})
        reasons = lora_problems(update, "an mlx-lm adapter")
        config = subject.config
        if config.model_type == GEMMA and full_attention_period(config.layer_types) is None:
            reasons.append(
                "the base: mlx-lm supports Gemma 3 only with full attention in every Nth layer,"
                " but this model's layer_types are irregular"
            )
        return [*reasons, *filter(None, (_naming_problem(subject, p) for p in update.factors))]

    def write(self, subject: Subject, directory: Path, progress: Progress) -> ExportedFiles:
        doras, kind = _dora_factors(subject), subject.config.model_type
        factors = {path: pair for path, (pair, _) in doras.items()} or subject.update.factors
        rank = Update(factors).rank
        tensors = {}
        for path, pair in factors.items():
            for name, (up, down) in _mlx_factors(kind, path, pad_rank(pair, rank)):
                turned = up.dim() == 2
                tensors[f"{name}.lora_a"] = down.t() if turned else down
                tensors[f"{name}.lora_b"] = up.t() if turned else up
            if path in doras:
                tensors[f"{name}.m"] = doras[path][1]
        (out := directory / "adapter").mkdir()
        contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, out / WEIGHTS, metadata={"format": "mlx"})
        layers = subject.config.get_text_config().num_hidden_layers
        keys = adapter_keys({key.rsplit(".", 1)[0] for key in tensors}, layers)
        config = {
            "fine_tune_type": "dora" if doras else "lora",
            "num_layers": layers,
            "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys},
        }
        write_json(out / CONFIG, config)
        return self._written(subject, directory, rank)

    def _written(self, subject: Subject, directory: Path, rank: int) -> ExportedFiles:
        base, template = base_reference(subject.base), write_template(subject, directory)
        source = subject.base.source.path
        notes, model, path = [f"rank {rank} in every module, scale 1"], base.model, str(source)
        if write_legacy_base(source, directory / BASE):
            model = path = f"{{out}}/{BASE}"
            notes.append(
                "base/ is a copy of the base with the older config keys that mlx-lm reads, such as"
                " rope_theta instead of rope_parameters"
            )
        elif base.revision:
            notes.append(
                f"mlx-lm loads the newest revision of {base.model}, but this adapter is for"
                f" {base.revision}"
            )
        else:
            notes += base.notes
        if subject.config.model_type in NO_WINDOWS:
            notes += window_notes("mlx-lm", subject.config)
        options = ("--model", model, "--adapter-path", "{out}/adapter")
        launch = [("mlx_lm.generate", *options, "--prompt", "Hello"), ("mlx_lm.server", *options)]
        if template:
            launch = [(*launch[1], "--chat-template", f"{FILE_CONTENT}{{out}}/{TEMPLATE}")]
            notes.append(OTHER_TEMPLATE)
        files = (f"adapter/{WEIGHTS}", f"adapter/{CONFIG}", *[TEMPLATE] * template)
        return ExportedFiles(files, launch, notes, {"adapter": "{out}/adapter", "base": path})


def adapter_keys(paths: Iterable[str], layers: int) -> list[str]:
    """The `keys` for these modules, relative to a block if all blocks have the same modules."""
    matches = {path: BLOCK.fullmatch(path) for path in paths}
    inside = Counter(match[2] for match in matches.values() if match)
    if any(blocks != layers for blocks in inside.values()):
        return sorted(matches)
    return sorted([*inside, *(path for path, match in matches.items() if not match)])


def _dora_factors(subject: Subject) -> Mapping[str, tuple[Factors, Tensor]]:
    """Factors and magnitude (out,) by module if all changes are DoRA on linear layers, else {}."""
    doras = {}
    for path, module in adapted_modules(subject.model):
        deltas = [*deltas_of(module, subject.names)]
        if not deltas:
            continue
        delta = deltas[0]
        if len(deltas) > 1 or not isinstance(delta, DoRADelta) or not is_linear(module):
            return {}
        pair = delta.inner.factors()
        if pair is None or layer_of(module).matrices or subject.update.other:
            return {}
        doras[path] = ((pair[0].float(), pair[1].float()), delta.magnitude.float())
    return doras


def _naming_problem(subject: Subject, path: str) -> str:
    block, kind = BLOCK.fullmatch(path), subject.config.model_type
    if path in (EMBEDDING, HEAD):
        if getattr(subject.config.get_text_config(), "tie_word_embeddings", False):
            return f"{path}: mlx-lm can't adapt a tied embedding and head separately"
        return ""
    if block is None:
        return f"{path}: mlx-lm has no such module; expected modules in model.layers"
    if EXPERTS.fullmatch(block[2]) and kind not in EXPERT_PATHS:
        known = ", ".join(EXPERT_PATHS)
        return f"{path}: mlx-lm's names of experts are known for {known}, not for {kind}"
    return ""


def _mlx_factors(kind: str, path: str, factors: Factors) -> Iterator[tuple[str, Factors]]:
    block = BLOCK.fullmatch(path)
    experts = EXPERTS.fullmatch(block[2]) if block else None
    if block is None or experts is None:
        yield path, factors
        return
    for name, each in split_experts(kind, experts[1], factors):
        yield f"{block[1]}.{EXPERT_PATHS[kind]}.{name}", each
