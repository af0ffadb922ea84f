"""The files of a quantized model as those of a plain one: the same tensors in the same order, each
quantized weight with its dequantized shape and dtype in the place of its codes, and no scales.

Nothing is dequantized here. Whoever writes the files asks the module for its matrix, one at a time.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lorafold.bases.compressed import CompressedLinear
from lorafold.core.anatomy import bare_modules
from lorafold.models.checkpoint import Checkpoint, MappedModel
from lorafold.models.container import Container, Entry

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def as_plain(
    checkpoint: Checkpoint, mapped: MappedModel
) -> tuple[Checkpoint, MappedModel, dict[str, str]]:
    """Return the checkpoint and the model's entries as those of a plain model, and the paths of the
    modules that have the values of dequantized tensors, by the names of these.

    The modules then dequantize to the dtype that the config names, else to bf16.

    Args:
        checkpoint: The files.
        mapped: The model over them.
    """
    dtype = mapped.model.config.dtype
    dtype = dtype if dtype in DTYPES else torch.bfloat16
    entries, by_file = dict(mapped.entries), {e.name: e for e in checkpoint.entries.values()}
    paths: dict[str, str] = {}
    for path, module in bare_modules(mapped.model):
        if not isinstance(module, CompressedLinear):
            continue
        module.compute_dtype = dtype
        codes = entries[f"{path}.{'weight_packed' if module.codes.packed else 'weight'}"]
        shape = (module.out_features, module.in_features)
        plain = Entry(
            codes.name.removesuffix("_packed"),
            DTYPES[dtype],
            shape,
            codes.file,
            codes.offset,
            shape[0] * shape[1] * dtype.itemsize,
        )
        for name in [n for n in entries if n.rpartition(".")[0] == path and n[-5:] != ".bias"]:
            del by_file[entries.pop(name).name]
        entries[f"{path}.weight"] = by_file[plain.name] = plain
        paths[plain.name] = path
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
