"""Exports for vLLM: canonical PEFT, and the line that serves it.

    experts     PEFT's stacked factors; of models that vLLM has other layers for, the request says
                that they are stacked (is_3d_lora_weight)

vLLM (0.32, lora/) takes LoRA of a rank up to 512, packs q, k, v and gate, up itself, and refuses
what it has no name for, but not experts: those it loads and applies nowhere, which only its debug
log says. So experts are written for the families whose names are known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

from safetensors.torch import load_file, save_file

from lorafold.exporting.plain_lora import ADAPTER, FORM, HEADS, leaf_of, tied_heads, write_files, zeros
from lorafold.exporting.target import Line, Progress, Subject, Target, Written, only_products
from lorafold.exporting.update import DOWN, GATE_UP, Factors
from lorafold.peft.config import WEIGHTS

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
EXPERTS = re.compile(rf"(.+\.experts)\.({GATE_UP}|{DOWN})")
STACKED = ("gpt_oss",)  # families whose layers of experts take stacked factors as they are
SPLIT = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")  # and those that are told of them
OWN = {"mixtral": (".mlp.experts.", ".block_sparse_moe.experts.")}  # names that differ
# families whose models there have no LoRA at all (SupportsLoRA)
WITHOUT = ("bloom", "falcon", "gpt2", "gptj", "stablelm")
# families in which vLLM adapts embedding and head (embedding_modules of its models)
WITH_HEADS = (
    "apertus", "cohere", "exaone", "exaone4", "granite", "granitemoe", "llama", "mistral",
    "mixtral", "nemotron", "phimoe", "qwen3", "qwen3_moe", "solar",
)  # fmt: skip


class ToVllm(Target):
    """vLLM's server."""

    name: ClassVar[str] = "vllm"
    engine: ClassVar[str | None] = "vllm"
    server: ClassVar[str | None] = "vllm_url"

    def problems(self, subject: Subject) -> Sequence[str]:
        update, kind = subject.update, subject.config.model_type
        found = only_products(update, FORM)
        if kind in WITHOUT:
            found.append(f"vLLM has no LoRA for models of type {kind}; merge the adapter first")
        if update.rank > RANKS[-1]:
            found.append(
                f"rank {update.rank}: vLLM takes at most {RANKS[-1]}; --as-lora {RANKS[-1]} cuts it"
            )
        heads = [path for path in update.factors if leaf_of(path) in HEADS]
        if heads and kind not in WITH_HEADS:
            found.append(f"{heads[0]}: vLLM adapts no embedding and no head of {kind}")
        elif tied := tied_heads(subject):
            found.append(f"{tied[0]}: embedding and head are tied, which vLLM adapts as one")
        experts = [path for path in update.factors if ".experts." in path]
        if experts and kind not in (*STACKED, *SPLIT):
            known = ", ".join(sorted((*STACKED, *SPLIT)))
            found.append(
                f"{experts[0]}: vLLM passes over experts whose names it does not know without a"
                f" word; they are known of {known}, not of {kind}"
            )
        return found

    def write(self, subject: Subject, directory: Path, progress: Progress) -> Written:
        kind, update = subject.config.model_type, subject.update
        factors = both_of_experts(subject, update.factors)
        base, files, options = write_files(subject, factors, directory)
        notes = [f"rank {update.rank} at every site, scale 1", *base.notes]
        if kind in OWN and any(map(EXPERTS.fullmatch, factors)):
            _rename(directory / ADAPTER / WEIGHTS, *OWN[kind])
            notes.append(f"experts have vLLM's names ({OWN[kind][1].strip('.')}), not PEFT's")
        most = next(rank for rank in RANKS if rank >= update.rank)
        engine: dict[str, object] = {"max_lora_rank": most}
        request: dict[str, object] = {}
        name = str(subject.called)
        if kind in SPLIT and any(map(EXPERTS.fullmatch, factors)):
            engine["enable_mixed_moe_lora_format"] = request["is_3d_lora_weight"] = True
            options = (*options, "--enable-mixed-moe-lora-format")
        line = ("vllm", "serve", base.model, "--enable-lora", "--max-lora-rank", str(most))
        module = partial(module_of, name, request)
        launch: Line = (*line, "--lora-modules", module, *options)
        job = {
            "adapter": f"{{out}}/{ADAPTER}",
            "base": str(subject.base.source.path),
            "lora": {"engine": engine, "request": request},
        }
        notes.append(f"requests ask for it as model {name}")
        return Written(files, (launch,), tuple(notes), job)


def module_of(name: str, request: Mapping[str, object], out: str) -> str:
    """The value of --lora-modules for an adapter: JSON where there is more to say than a name and a
    path, or where they have what vLLM takes for the end of a name, or for JSON.

    Args:
        name: of the adapter.
        request: what else vLLM is told of it.
        out: the directory of the export.
    """
    path = f"{out}/{ADAPTER}"
    if request or "=" in name or "," in name + path:
        return json.dumps({"name": name, "path": path, **request}, ensure_ascii=False)
    return f"{name}={path}"


def both_of_experts(subject: Subject, factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """The same with zeros for the experts' other parameter, where one is changed alone: vLLM
    expects both.
    """
    found = dict(factors)
    for path in factors:
        if (match := EXPERTS.fullmatch(path)) is None:
            continue
        other = f"{match[1]}.{DOWN if match[2] == GATE_UP else GATE_UP}"
        if other not in found:
            found[other] = zeros(subject, other)
    return found


def _rename(file: Path, old: str, new: str) -> None:
    """Rename tensors of a file in place."""
    tensors = {key.replace(old, new): tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
