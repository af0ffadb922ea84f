"""Exports for PEFT and for servers that take its plain LoRA: one rank, one alpha, no patterns.

Exports for vLLM: canonical PEFT, and the line that serves it.

    experts     PEFT's stacked factors; of models that vLLM has other layers for, the request says
                that they are stacked (is_3d_lora_weight)

vLLM (0.32, lora/) takes LoRA of a rank up to 512, packs q, k, v and gate, up itself, and refuses
what it has no name for, but not experts: those it loads and applies nowhere, which only its debug
log says. So experts are written for the families whose names are known.

Exports for SGLang: canonical PEFT with what its loader expects, and the line that serves it.

    q, k, v; gate, up    packed into one buffer each, so those that are not changed are there, as
                         zeros
    experts              a pair of matrices for each: experts.E.{gate,up,down}_proj

SGLang (0.5.23, srt/lora/) scales by alpha / r alone, knows modules by the last part of their names,
and passes over the others unless --lora-strict-loading is given, as the line here has it. It has no
build for CPUs, so nothing runs here: the files are read as its loader reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafold.errors import LorafoldError, as_one
from lorafold.exporting.plain_lora import (
    ADAPTER,
    FORM,
    HEADS,
    OTHER_TEMPLATE,
    TEMPLATE,
    leaf_of,
    tied_heads,
    write_files,
    zeros,
)
from lorafold.exporting.target import (
    DOWN,
    GATE_UP,
    Factors,
    Line,
    Progress,
    Subject,
    Target,
    Written,
    apart,
    only_products,
)
from lorafold.files.atomic import write_json
from lorafold.peft.config import CONFIG, WEIGHTS


class ToPeft(Target):
    """PEFT's own format, for any base that it knows."""

    name: ClassVar[str] = "peft"
    engine: ClassVar[str | None] = "peft"

    def problems(self, subject: Subject) -> Sequence[str]:
        return only_products(subject.update, "a plain LoRA")

    def write(self, subject: Subject, directory: Path, progress: Progress) -> Written:
        base, files, _ = write_files(subject, subject.update.factors, directory)
        at = f", revision={base.revision!r}" if base.revision else ""
        launch = (
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            f"model = AutoModelForCausalLM.from_pretrained({base.model!r}{at})",
            'model = PeftModel.from_pretrained(model, "{out}/adapter")',
        )
        notes = [f"rank {subject.update.rank} at every site, scale 1", *base.notes]
        notes += [OTHER_TEMPLATE] * (TEMPLATE in files)
        job = {"adapter": f"{{out}}/{ADAPTER}", "base": str(subject.base.source.path)}
        return Written(files, launch, tuple(notes), job)


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
            file = directory / ADAPTER / WEIGHTS
            named = {key.replace(*OWN[kind]): tensor for key, tensor in load_file(file).items()}
            save_file(named, file, metadata={"format": "pt"})
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


PACKS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
KNOWN = frozenset(
    {
        *(name for pack in PACKS for name in pack), "o_proj", "down_proj", "qkv_proj",
        "gate_up_proj", "embed_tokens", "lm_head",
    }
)  # fmt: skip
FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")  # whose experts are gate, then up
ROOT = "base_model.model."
PROBES = 4  # random inputs, or rows, on which factors are compared
EXACT = 1e-5  # relative, in fp32


class ToSglang(Target):
    """SGLang's server."""

    name: ClassVar[str] = "sglang"

    def problems(self, subject: Subject) -> Sequence[str]:
        update, kind = subject.update, subject.config.model_type
        found = only_products(update, FORM)
        experts = [path for path in update.factors if EXPERTS.fullmatch(path)]
        if experts and kind not in FAMILIES:
            known = ", ".join(FAMILIES)
            found.append(
                f"{experts[0]}: SGLang's order of gates and ups is known of {known}, not of {kind}"
            )
        other = [p for p in update.factors if leaf_of(p) not in KNOWN]
        if other:
            found.append(f"{other[0]}: SGLang adapts no module of that name")
        if tied := tied_heads(subject):
            found.append(f"{tied[0]}: embedding and head are tied, which SGLang adapts as one")
        return found

    def write(self, subject: Subject, directory: Path, progress: Progress) -> Written:
        factors, rank = packed(subject, subject.update.factors), subject.update.rank
        base, files, options = write_files(subject, factors, directory)
        notes = [f"rank {rank} at every site, scale 1", *base.notes]
        if added := len(factors) - len(subject.update.factors):
            notes.append(f"{added} modules have zeros, because SGLang packs them with others")
        if any(map(EXPERTS.fullmatch, factors)):
            _split(directory / ADAPTER, subject.config.model_type, factors, rank)
            notes.append("experts have a pair of matrices each: for SGLang, not for PEFT")
        name = str(subject.called)
        line = (
            "python", "-m", "sglang.launch_server", "--model-path", base.model, "--enable-lora",
            "--lora-paths", partial(path_of, name), "--max-lora-rank", str(rank),
            "--lora-strict-loading",
        )  # fmt: skip
        notes.append(f"requests ask for it as model {base.model}:{name}")
        return Written(files, ((*line, *options),), tuple(notes))

    def read_back(self, subject: Subject, directory: Path) -> str:
        tensors = load_file(directory / ADAPTER / WEIGHTS)
        config = json.loads((directory / ADAPTER / CONFIG).read_text(encoding="utf-8"))
        scale = config["lora_alpha"] / config["r"]
        named = {leaf_of(path) for path in config["target_modules"]} & KNOWN
        largest, kind = 0.0, subject.config.model_type
        wanted = dict(_single(kind, packed(subject, subject.update.factors)))
        for path, (up, down) in wanted.items():
            if leaf_of(path) not in named:
                raise LorafoldError(f"sglang: {path} is not among its target modules")
            a, b = (_taken(tensors, path, half) for half in "AB")
            largest = max(largest, _difference((scale * b, a), (up, down)))
        if tensors:
            over = as_one(sorted(tensors))
            raise LorafoldError(f"sglang: read back, {over}: it has no module for that")
        if largest > EXACT:
            raise LorafoldError(
                f"sglang: read back, they differ by {largest:.1e} from the update"
            )
        return (
            f"SGLang has no build for CPUs; read back, not run: {len(wanted)} modules under names"
            f" that its loader takes, at most {largest:.0e} from the update"
        )


def path_of(name: str, out: str) -> str:
    """The value of --lora-paths for an adapter: JSON where the name has an equals sign."""
    path = f"{out}/{ADAPTER}"
    if "=" in name:
        return json.dumps({"lora_name": name, "lora_path": path}, ensure_ascii=False)
    return f"{name}={path}"


def packed(subject: Subject, factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """The same with zeros at those modules of a pack that are not changed."""
    found, modules = dict(factors), dict(subject.model.named_modules())
    for path in factors:
        parent, _, name = path.rpartition(".")
        for other in next((pack for pack in PACKS if name in pack), ()):
            beside = f"{parent}.{other}"
            if beside not in found and beside in modules:
                found[beside] = zeros(subject, beside)
    return found


def _single(kind: str, factors: Mapping[str, Factors]) -> Iterator[tuple[str, Factors]]:
    """Yield each matrix that is changed, by the name that SGLang has for it, experts one by one."""
    for path, pair in factors.items():
        if (match := EXPERTS.fullmatch(path)) is None:
            yield path, pair
            continue
        for name, (up, down) in apart(kind, match[2], pair):
            for e in range(len(up)):
                yield f"{match[1]}.{e}.{name}", (up[e], down[e])


def _split(adapter: Path, kind: str, factors: Mapping[str, Factors], rank: int) -> None:
    """Put a pair of matrices for each expert in the place of PEFT's stacked ones."""
    kept = {k: t for k, t in load_file(adapter / WEIGHTS).items() if ".experts." not in k}
    names = set()
    for path, (up, down) in _single(kind, factors):
        if ".experts." in path:
            more = rank - down.shape[0]
            names.add(leaf_of(path))
            key = f"{ROOT}{path}"
            kept[f"{key}.lora_A.weight"] = torch.nn.functional.pad(down, (0, 0, 0, more))
            kept[f"{key}.lora_B.weight"] = torch.nn.functional.pad(up, (0, more)).contiguous()
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    config.pop("target_parameters", None)
    config["target_modules"] = sorted({*(config["target_modules"] or ()), *names})
    save_file(kept, adapter / WEIGHTS, metadata={"format": "pt"})
    write_json(adapter / CONFIG, config)


def _taken(tensors: dict[str, Tensor], path: str, half: str) -> Tensor:
    """Take a factor, (r, in) for A and (out, r) for B, out of the file's tensors."""
    for key in (f"{ROOT}{path}.lora_{half}.weight", f"{ROOT}{path}.lora_embedding_{half}"):
        if key in tensors:
            return tensors.pop(key)
    raise LorafoldError(f"sglang: {path}.lora_{half} is not in the file")


def _difference(one: Factors, other: Factors) -> float:
    """How far two products are apart on random inputs, relative to the second."""
    (up, down), (b, a) = one, other
    x = torch.randn(a.shape[-1], PROBES, generator=torch.Generator().manual_seed(0))
    own, theirs = b @ (a @ x), up.float() @ (down.float() @ x)
    whole = float(own.norm())
    return float((own - theirs).norm()) / whole if whole else float(theirs.norm())
