"""The files of a quantized model as those of a plain one: the same tensors in the same order, each
quantized weight with its dequantized shape and dtype in the place of its codes, and no scales.

    q_proj.weight_packed, .weight_scale                  ->  q_proj.weight            (out, in)
    experts.gate_up_proj_blocks, .gate_up_proj_scales    ->  experts.gate_up_proj     (E, in, out)

Nothing is dequantized here. Whoever writes the files asks the site for its matrix, one at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch

from lorafold.bases.compressed import CompressedLinear
from lorafold.bases.expert_matrices import BLOCKS, held
from lorafold.core.anatomy import bare_modules
from lorafold.core.matrices import Matrices
from lorafold.models.checkpoint import Checkpoint, MappedModel
from lorafold.models.weights import NAMES, Container, Entry

PLAIN = (torch.bfloat16, torch.float16, torch.float32)


def as_plain(
    checkpoint: Checkpoint, mapped: MappedModel
) -> tuple[Checkpoint, MappedModel, dict[str, str]]:
    """Return the checkpoint and the model's entries as those of a plain model, and the sites
    that have the values of dequantized tensors, by the names of these.

    The sites then dequantize to the dtype that the config names, else to bf16.

    Args:
        checkpoint: The files.
        mapped: The model over them.
    """
    dtype = mapped.model.config.dtype
    dtype = dtype if dtype in PLAIN else torch.bfloat16
    entries, by_file = dict(mapped.entries), {e.name: e for e in checkpoint.entries.values()}
    paths: dict[str, str] = {}
    for path, module, parameter, own, shape in _quantized(mapped):
        codes = entries[own[0]]
        name = codes.name.removesuffix("_packed").removesuffix(BLOCKS)
        plain = Entry(
            name,
            NAMES[dtype],
            shape,
            codes.file,
            codes.offset,
            prod(shape) * dtype.itemsize,
        )
        module.compute_dtype = dtype
        for part in own:
            del by_file[entries.pop(part).name]
        entries[parameter] = by_file[name] = plain
        paths[name] = path
    files = {
        name: Container(
            {
                e.name: e
                for e in sorted(by_file.values(), key=lambda e: e.offset)
                if e.file.name == name
            },
            container.metadata,
        )
        for name, container in checkpoint.files.items()
    }
    return replace(checkpoint, files=files), replace(mapped, entries=entries), paths


def _quantized(
    mapped: MappedModel,
) -> Iterator[tuple[str, Any, str, list[str], tuple[int, ...]]]:
    """Each quantized matrix, or parameter of several: its site, the module that says what it is
    dequantized to, its parameter's path in a plain model, the paths of the tensors that are not
    written again, codes first, and its shape as a plain model stores it.
    """
    beside = defaultdict(list)
    for name in mapped.entries:
        beside[name.rpartition(".")[0]].append(name)
    for path, module in bare_modules(mapped.model):
        if isinstance(module, CompressedLinear):
            codes = f"{path}.{'weight_packed' if module.codes.packed else 'weight'}"
            others = [n for n in beside[path] if n not in (codes, f"{path}.bias")]
            shape: tuple[int, ...] = (module.out_features, module.in_features)
            yield path, module, f"{path}.weight", [codes, *others], shape
        elif isinstance(module, Matrices) and (stored := held(module)).quantized:
            own = [path.removesuffix(module.name) + name for name in stored.names]
            yield path, module.owner, path, own, (stored.number, *stored.sides)
