"""Exports of plain LoRA for PEFT, vLLM and SGLang.

vLLM (0.32, lora/) supports ranks up to 512 and packs q, k, v and gate, up itself. It rejects
unknown module names, but it loads and silently ignores experts with unknown names, so experts are
written only for model families whose names are known. Some families need is_3d_lora_weight in
requests.

SGLang (0.5.23, srt/lora/) scales by alpha / r and identifies modules by the last part of their
names. It packs q, k, v and gate, up into one buffer each, so unchanged modules of a pack are
written as zeros. Each expert needs its own pair of factors. SGLang has no CPU build, so the files
are only read back, as its loader would read them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafold.core.anatomy import last_part
from lorafold.errors import LorafoldError, join_problems
from lorafold.exporting.plain_lora import (
    ADAPTER,
    FORMAT,
    HEADS,
    OTHER_TEMPLATE,
    TEMPLATE,
    tied_heads,
    write_adapter,
    zero_factors,
)
from lorafold.exporting.target import (
    DOWN,
    GATE_UP,
    ExportedFiles,
    Factors,
    Line,
    Progress,
    SiteFactors,
    Subject,
    Target,
    lora_problems,
    split_experts,
)
from lorafold.files.atomic import read_object, write_json
from lorafold.inspecting.updates import pad_rank
from lorafold.peft.config import CONFIG, WEIGHTS


class ToPeft(Target):
    name = "peft"
    engine = "peft"

    def problems(self, subject: Subject) -> Sequence[str]:
        return lora_problems(subject.update, "a plain LoRA")

    def write(self, subject: Subject, directory: Path, progress: Progress) -> ExportedFiles:
        base, files, _, notes = write_adapter(subject, subject.update.factors, directory)
        at = f", revision={base.revision!r}" if base.revision else ""
        launch = (
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            f"model = AutoModelForCausalLM.from_pretrained({base.model!r}{at})",
            'model = PeftModel.from_pretrained(model, "{out}/adapter")',
        )
        notes += [OTHER_TEMPLATE] * (TEMPLATE in files)
        job = {"adapter": f"{{out}}/{ADAPTER}", "base": str(subject.base.source.path)}
        return ExportedFiles(files, launch, notes, job)


RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank
EXPERTS = re.compile(rf"(.+\.experts)\.({GATE_UP}|{DOWN})")
STACKED = ("gpt_oss",)  # families that accept stacked factors of experts
SPLIT = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")  # families that need is_3d_lora_weight
RENAMED = {"mixtral": (".mlp.experts.", ".block_sparse_moe.experts.")}  # vLLM's names
# families without LoRA in vLLM (SupportsLoRA)
VLLM_WITHOUT_LORA = ("bloom", "falcon", "gpt2", "gptj", "stablelm")
# families with adapters for embedding and head in vLLM (embedding_modules)
VLLM_WITH_HEADS = (
    "apertus", "cohere", "exaone", "exaone4", "granite", "granitemoe", "llama", "mistral",
    "mixtral", "nemotron", "phimoe", "qwen3", "qwen3_moe", "solar",
)  # fmt: skip


class ToVllm(Target):
    name = "vllm"
    engine = "vllm"
    server = "vllm_url"

    def problems(self, subject: Subject) -> Sequence[str]:
        update, kind = subject.update, subject.config.model_type
        reasons = lora_problems(update, FORMAT)
        if kind in VLLM_WITHOUT_LORA:
            reasons.append(f"vLLM supports no LoRA for models of type {kind}; merge the adapter")
        if update.rank > RANKS[-1]:
            reasons.append(
                f"rank {update.rank}: vLLM supports at most {RANKS[-1]}; use --as-lora {RANKS[-1]}"
            )
        heads = [path for path in update.factors if last_part(path) in HEADS]
        if heads and kind not in VLLM_WITH_HEADS:
            reasons.append(f"{heads[0]}: vLLM supports no LoRA on the embedding or head of {kind}")
        elif tied := tied_heads(subject):
            reasons.append(f"{tied[0]}: vLLM can't adapt a tied embedding and head separately")
        experts = [path for path in update.factors if ".experts." in path]
        if experts and kind not in (*STACKED, *SPLIT):
            known = ", ".join(sorted((*STACKED, *SPLIT)))
            reasons.append(
                f"{experts[0]}: vLLM silently ignores experts with unknown names; the names are"
                f" known for {known}, not for {kind}"
            )
        return reasons

    def write(self, subject: Subject, directory: Path, progress: Progress) -> ExportedFiles:
        kind, update = subject.config.model_type, subject.update
        experts = [match for path in update.factors if (match := EXPERTS.fullmatch(path))]
        # vLLM expects both parameters of experts
        parameters = [f"{match[1]}.{name}" for match in experts for name in (GATE_UP, DOWN)]
        factors = with_zeros(subject, update.factors, parameters)
        base, files, options, notes = write_adapter(subject, factors, directory)
        if kind in RENAMED and experts:
            file = directory / ADAPTER / WEIGHTS
            named = {key.replace(*RENAMED[kind]): tensor for key, tensor in load_file(file).items()}
            save_file(named, file, metadata={"format": "pt"})
            notes.append(
                f"experts have vLLM's names ({RENAMED[kind][1].strip('.')}) instead of PEFT's"
            )
        most = next(rank for rank in RANKS if rank >= update.rank)
        engine: dict[str, object] = {"max_lora_rank": most}
        request: dict[str, object] = {}
        name = str(subject.adapter_name)
        if kind in SPLIT and experts:
            engine["enable_mixed_moe_lora_format"] = request["is_3d_lora_weight"] = True
            options.append("--enable-mixed-moe-lora-format")
        line = ("vllm", "serve", base.model, "--enable-lora", "--max-lora-rank", str(most))
        module = partial(lora_module_option, name, request)
        launch: Line = (*line, "--lora-modules", module, *options)
        job = {
            "adapter": f"{{out}}/{ADAPTER}",
            "base": str(subject.base.source.path),
            "lora": {"engine": engine, "request": request},
        }
        notes.append(f"the model name in requests is {name}")
        return ExportedFiles(files, (launch,), notes, job)


def lora_module_option(name: str, request: Mapping[str, object], out: str) -> str:
    path = f"{out}/{ADAPTER}"
    if request or "=" in name or "," in name + path:
        return json.dumps({"name": name, "path": path, **request}, ensure_ascii=False)
    return f"{name}={path}"


def with_zeros(subject: Subject, factors: SiteFactors, paths: Iterable[str]) -> dict[str, Factors]:
    return {
        **factors,
        **{path: zero_factors(subject, path) for path in paths if path not in factors},
    }


SGLANG_PACKS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
SGLANG_MODULES = frozenset(
    {
        *(name for pack in SGLANG_PACKS for name in pack), "o_proj", "down_proj", "qkv_proj",
        "gate_up_proj", "embed_tokens", "lm_head",
    }
)  # fmt: skip
SGLANG_FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")  # experts are gate, then up
ROOT = "base_model.model."
PROBES = 4  # random inputs, or rows, on which factors are compared
MAX_DIFFERENCE = 1e-5  # relative, in fp32


class ToSglang(Target):
    name = "sglang"

    def problems(self, subject: Subject) -> Sequence[str]:
        update, kind = subject.update, subject.config.model_type
        reasons = lora_problems(update, FORMAT)
        experts = [path for path in update.factors if EXPERTS.fullmatch(path)]
        if experts and kind not in SGLANG_FAMILIES:
            known = ", ".join(SGLANG_FAMILIES)
            reasons.append(
                f"{experts[0]}: SGLang's order of gate and up is known for {known}, not for {kind}"
            )
        if other := [p for p in update.factors if last_part(p) not in SGLANG_MODULES]:
            reasons.append(f"{other[0]}: SGLang supports no LoRA on modules of this name")
        if tied := tied_heads(subject):
            reasons.append(f"{tied[0]}: SGLang can't adapt a tied embedding and head separately")
        return reasons

    def write(self, subject: Subject, directory: Path, progress: Progress) -> ExportedFiles:
        factors, rank = with_packed_modules(subject, subject.update.factors), subject.update.rank
        base, files, options, notes = write_adapter(subject, factors, directory)
        if added := len(factors) - len(subject.update.factors):
            notes.append(f"{added} unchanged modules are zeros: SGLang packs them with others")
        if any(map(EXPERTS.fullmatch, factors)):
            _write_per_expert(directory / ADAPTER, subject.config.model_type, factors, rank)
            notes.append("each expert has its own A and B, for SGLang; PEFT can't load them")
        name = str(subject.adapter_name)
        line = (
            "python", "-m", "sglang.launch_server", "--model-path", base.model, "--enable-lora",
            "--lora-paths", partial(lora_path_option, name), "--max-lora-rank", str(rank),
            "--lora-strict-loading",
        )  # fmt: skip
        notes.append(f"the model name in requests is {base.model}:{name}")
        return ExportedFiles(files, ((*line, *options),), notes)

    def read_back(self, subject: Subject, directory: Path) -> str:
        tensors = load_file(directory / ADAPTER / WEIGHTS)
        config = read_object(directory / ADAPTER / CONFIG)
        scale = config["lora_alpha"] / config["r"]
        named = {last_part(path) for path in config["target_modules"]} & SGLANG_MODULES
        largest, kind = 0.0, subject.config.model_type
        expected = dict(_per_expert(kind, with_packed_modules(subject, subject.update.factors)))
        for path, (up, down) in expected.items():
            if last_part(path) not in named:
                raise LorafoldError(f"sglang: {path} is missing in the written target_modules")
            a, b = (_pop_factor(tensors, path, half) for half in "AB")
            largest = max(largest, _relative_difference((scale * b, a), (up, down)))
        if tensors:
            over = join_problems(sorted(tensors))
            raise LorafoldError(f"sglang: found written tensors that match no module: {over}")
        if largest > MAX_DIFFERENCE:
            raise LorafoldError(
                f"sglang: the written factors differ by {largest:.1e} from the update"
            )
        return (
            f"SGLang has no CPU build; read back, not run: {len(expected)} modules with names that"
            f" its loader accepts, at most {largest:.0e} from the update"
        )


def lora_path_option(name: str, out: str) -> str:
    path = f"{out}/{ADAPTER}"
    if "=" in name:
        return json.dumps({"lora_name": name, "lora_path": path}, ensure_ascii=False)
    return f"{name}={path}"


def with_packed_modules(subject: Subject, factors: SiteFactors) -> dict[str, Factors]:
    modules = {path for path, _ in subject.model.named_modules()}
    packs = [
        f"{parent}.{other}"
        for parent, _, name in (path.rpartition(".") for path in factors)
        for pack in SGLANG_PACKS
        if name in pack
        for other in pack
    ]
    return with_zeros(subject, factors, [path for path in packs if path in modules])


def _per_expert(kind: str, factors: SiteFactors) -> Iterator[tuple[str, Factors]]:
    for path, pair in factors.items():
        if (match := EXPERTS.fullmatch(path)) is None:
            yield path, pair
            continue
        for name, (up, down) in split_experts(kind, match[2], pair):
            for e in range(len(up)):
                yield f"{match[1]}.{e}.{name}", (up[e], down[e])


def _write_per_expert(adapter: Path, kind: str, factors: SiteFactors, rank: int) -> None:
    tensors = {k: t for k, t in load_file(adapter / WEIGHTS).items() if ".experts." not in k}
    experts = {path: pair for path, pair in _per_expert(kind, factors) if ".experts." in path}
    for path, pair in experts.items():
        up, down = pad_rank(pair, rank)
        tensors[f"{ROOT}{path}.lora_A.weight"] = down
        tensors[f"{ROOT}{path}.lora_B.weight"] = up.contiguous()
    config = read_object(adapter / CONFIG)
    config.pop("target_parameters", None)
    config["target_modules"] = sorted({*(config["target_modules"] or ()), *map(last_part, experts)})
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    write_json(adapter / CONFIG, config)


def _pop_factor(tensors: dict[str, Tensor], path: str, half: str) -> Tensor:
    """Pops a factor from the file's tensors: (r, in) for A, (out, r) for B."""
    for key in (f"{ROOT}{path}.lora_{half}.weight", f"{ROOT}{path}.lora_embedding_{half}"):
        if key in tensors:
            return tensors.pop(key)
    raise LorafoldError(f"sglang: {path}.lora_{half} is missing in the written file")


def _relative_difference(written: Factors, other: Factors) -> float:
    (up, down), (b, a) = written, other
    x = torch.randn(a.shape[-1], PROBES, generator=torch.Generator().manual_seed(0))
    product, expected = b @ (a @ x), up.float() @ (down.float() @ x)
    whole = float(product.norm())
    return float((product - expected).norm()) / whole if whole else float(expected.norm())
