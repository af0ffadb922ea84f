"""What transformers makes of the tensors of a GGUF file, where it does not say so itself.

    blk.0.ffn_gate_exps, blk.0.ffn_up_exps   ->  experts.gate_up_proj      zeros for one that is not
                                                                           there
    rope_freqs                               ->  nothing                   Llama 3's long context
    others that the architecture lacks       ->  nothing
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError
from lorafold.models.load_errors import tell_unread

if TYPE_CHECKING:
    from gguf import GGUFReader

HALF = re.compile(r"(.+\.ffn_)(gate|up)(_exps\..+)")
OTHER_HALF = {"gate": "up", "up": "gate"}
ROPE = "rope_freqs.weight"
SCALED = ("llama", "mistral")  # the models whose positions that scales as Llama 3's


def missing_halves(readers: Sequence[GGUFReader]) -> list[str]:
    """The tensors of experts that are missing, by the file's names, although the ones are there
    that transformers joins them to.
    """
    names = set(_names(readers))
    halves = filter(None, map(HALF.fullmatch, sorted(names)))
    return [o for before, own, after in (h.groups() for h in halves)
            if (o := before + OTHER_HALF[own] + after) not in names]  # fmt: skip


def tell_passed_over(
    model: Any, report: Any, readers: Sequence[GGUFReader], what: str
) -> None:
    """Log the tensors that transformers passes over.

    Args:
        model: what it made of the files.
        report: its own, which has those that it knows of.
        readers: the files.
        what: what the message begins with.
    """
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    architecture = readers[0].fields["general.architecture"].contents()
    if is_gguf_arch_supported(architecture):
        tell_unread(what, sorted(report["unexpected_keys"]))
        return
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={})
    read = {*get_gguf_hf_weights_map(model, processor)}
    if model.config.model_type in SCALED:
        read.add(ROPE)
    tell_unread(what, [name for name in _names(readers) if name not in read])


def rope_as_in_file(config: Any, readers: Sequence[GGUFReader], what: str) -> None:
    """Have a model scale its rotary positions as its file does, which transformers does not read.

    Raises LorafoldError for a scaling that is not Llama 3's.

    Args:
        config: the model's; it gets the scaling.
        readers: the files.
        what: what the message begins with.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found = [tensor.data for reader in readers for tensor in reader.tensors if tensor.name == ROPE]
    if not found or config.model_type not in SCALED:
        return
    factors = torch.tensor(found[0].copy()).double()  # (rotated dimensions / 2,)
    if bool((factors == 1).all()):
        return
    scaled = deepcopy(config)
    scaled.rope_parameters = {
        **config.rope_parameters,
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theta = config.rope_parameters["rope_theta"]
    plain = theta ** -(torch.arange(len(factors)).double() / len(factors))
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    if wanted.shape != factors.shape or not torch.allclose(
        plain / factors, wanted.double(), rtol=1e-4
    ):
        raise LorafoldError(
            f"{what}: its tensor {ROPE} scales rotary positions in another way than Llama 3's, the"
            " only one that is known here; use the model in Hugging Face's format"
        )
    config.rope_parameters = scaled.rope_parameters


def _names(readers: Sequence[GGUFReader]) -> list[str]:
    return [tensor.name for reader in readers for tensor in reader.tensors]
