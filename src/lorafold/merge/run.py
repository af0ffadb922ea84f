"""From a model and its adapters to a plain Hugging Face directory with its certificate: the whole of `lorafold merge`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lorafold.adapter import load
from lorafold.errors import LorafoldError
from lorafold.io.atomic import atomic_directory, write_json
from lorafold.io.models import load_model, load_tokenizer, resolve_model
from lorafold.merge.certificate import Gap, compare, probe_ids
from lorafold.merge.fold import execute, plan
from lorafold.merge.rounding import Rounding

CERTIFICATE = "merge.json"
Progress = Callable[[str, int, int], None]  # the stage, done, in all


def merge(
    model: str, adapters: Sequence[str | Path], out: str | Path, *, rounding: Rounding = "auto", seed: int = 0, certificate: bool = True,
    probe: str | Path | None = None, allow_other_base: bool = False, overwrite: bool = False, revision: str | None = None,
    trust_remote_code: bool = False, device: str = "cpu", progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Fold adapters, in the order given, into a model and write it to `out`, which appears whole or not at all.

    Returns what `merge.json` in it says. kl (nats), max_logit_gap, argmax_agreement and relative_logit_gap are None without the
    certificate; update_survival and rounding_noise are shares of the update's norm.
    Raises LorafoldError, with nothing left behind, for what is wrong with the model, an adapter, the probe file or `out`.
    """
    if not adapters:
        raise LorafoldError("nothing to merge: give at least one adapter")
    source = resolve_model(model, revision)
    tell = progress or (lambda stage, done, total: None)
    with atomic_directory(out, overwrite) as tmp:
        texts = probe_ids(load_tokenizer(model, revision, trust_remote_code), probe) if certificate else []
        planned = plan(source.path, adapters, allow_other_base=allow_other_base, trust_remote_code=trust_remote_code)
        folded = execute(planned, tmp, rounding=rounding, seed=seed, progress=lambda done, total: tell("folding", done, total))
        del planned
        gap: dict[str, Any] = dict.fromkeys(f.name for f in fields(Gap))
        if certificate:

            def adapted() -> PreTrainedModel:
                base = load_model(model, torch.float32, device, revision, trust_remote_code)
                for i, path in enumerate(adapters):
                    load(base, path, f"adapter{i}", allow_other_base=allow_other_base)
                return base.eval()

            def merged() -> PreTrainedModel:
                return load_model(str(tmp), torch.float32, device, trust_remote_code=trust_remote_code).eval()

            gap = asdict(compare(adapted, merged, texts, tmp, lambda done, total: tell("comparing", done, total)))
        result = {
            **gap,
            "update_survival": folded.sums.survival,
            "rounding_noise": folded.sums.noise,
            "rounding": rounding,
            "seed": seed,
            "rounded": folded.rounded,
            "untied": list(folded.untied),
            "model": source.name,
            "adapters": [str(path) for path in adapters],
            "out": str(out),
        }
        write_json(tmp / CERTIFICATE, result)
    return result
