"""Exports for SGLang: canonical PEFT with what its loader expects, and the line that serves it.

    q, k, v; gate, up    packed into one buffer each, so those that are not changed are there, as
                         zeros
    experts              a pair of matrices for each: experts.E.{gate,up,down}_proj

SGLang (0.5.23, srt/lora/) scales by alpha / r alone, knows modules by the last part of their names,
and passes over the others unless --lora-strict-loading is given, as the line here has it. It has no
build for CPUs, so nothing runs here: the files are read as its loader reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafold.core.matrices import module_at
from lorafold.errors import LorafoldError, as_one
from lorafold.exporting.plain_lora import ADAPTER, FORM, leaf_of, tied_heads, write_files, zeros
from lorafold.exporting.target import Progress, Subject, Target, Written, only_products
from lorafold.exporting.update import Factors, apart
from lorafold.files.atomic import write_json
from lorafold.peft.config import CONFIG, WEIGHTS

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
        scale, named = config["lora_alpha"] / config["r"], set(map(leaf_of, config["target_modules"]))
        largest, kind = 0.0, subject.config.model_type
        wanted = dict(_single(kind, packed(subject, subject.update.factors)))
        for path, (up, down) in wanted.items():
            if leaf_of(path) not in named & KNOWN:
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
    """The value of --lora-paths for an adapter: JSON where the name has an equals sign.

    Args:
        name: of the adapter.
        out: the directory of the export.
    """
    path = f"{out}/{ADAPTER}"
    if "=" in name:
        return json.dumps({"lora_name": name, "lora_path": path}, ensure_ascii=False)
    return f"{name}={path}"


def packed(subject: Subject, factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """The same with zeros at those modules of a pack that are not changed."""
    found = dict(factors)
    for path in factors:
        parent, _, name = path.rpartition(".")
        for other in next((pack for pack in PACKS if name in pack), ()):
            beside = f"{parent}.{other}"
            if beside not in found and _there(subject, beside):
                found[beside] = zeros(subject, beside)
    return found


def _there(subject: Subject, path: str) -> bool:
    try:
        return module_at(subject.model, path) is not None
    except AttributeError:
        return False


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
