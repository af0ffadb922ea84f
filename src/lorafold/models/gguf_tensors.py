"""What transformers makes of the tensors of a GGUF file, where it does not say so itself.

    blk.0.ffn_gate_exps, blk.0.ffn_up_exps   ->  experts.gate_up_proj      zeros for one that is not
                                                                           there
    those that the architecture lacks        ->  nothing
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError, listed
from lorafold.models.gguf_files import value
from lorafold.models.gguf_rope import FREQUENCIES, SCALED
from lorafold.models.load_errors import tell_unread

if TYPE_CHECKING:
    from gguf import GGUFReader

HALF = re.compile(r"(.+\.ffn_)(gate|up)(_exps\..+)")
OTHER_HALF = {"gate": "up", "up": "gate"}
BLOCK = re.compile(r"blk\.(\d+)\.(?!attn_rot_embd)")  # old files have those positions' angles


def missing_halves(readers: Sequence[GGUFReader]) -> list[str]:
    """The tensors of experts that are missing, by the file's names, although the ones are there
    that transformers joins them to.
    """
    names = set(_names(readers))
    halves = [found.groups() for found in map(HALF.fullmatch, sorted(names)) if found]
    others = [before + OTHER_HALF[own] + after for before, own, after in halves]
    return [name for name in others if name not in names]


def check_read(model: Any, report: Any, readers: Sequence[GGUFReader], what: str) -> None:
    """Log the tensors that transformers passes over.

    Raises LorafoldError for those of the model's own blocks, without which it computes something
    else than the file's model.

    Args:
        model: what it made of the files.
        report: its own, which has those that it knows of.
        readers: the files.
        what: what messages begin with.
    """
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    architecture = value(readers[0], "general.architecture")
    if is_gguf_arch_supported(architecture):
        tell_unread(what, sorted(report["unexpected_keys"]))
        return
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={})
    read = {*get_gguf_hf_weights_map(model, processor)}
    if model.config.model_type in SCALED:
        read.add(FREQUENCIES)
    # those of experts are known to it without their ending
    unread = [n for n in _names(readers) if not {n, n.removesuffix(".weight")} & read]
    blocks = model.config.get_text_config().num_hidden_layers
    inside = [n for n in unread if (at := BLOCK.match(n)) and int(at[1]) < blocks]
    if inside:
        raise LorafoldError(
            f"{what}: {type(model).__name__} has no place for {len(inside)} tensors of its blocks,"
            f" without which it is another model: {listed(inside)}"
        )
    tell_unread(what, unread)


def _names(readers: Sequence[GGUFReader]) -> list[str]:
    return [tensor.name for reader in readers for tensor in reader.tensors]
