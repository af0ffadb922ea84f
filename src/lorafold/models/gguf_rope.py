"""RoPE scaling of GGUF files, which transformers does not read.

    rope_freqs (dims / 2,)      Llama 3: the divisor of each frequency
    ARCH.rope.scaling.type      linear: all frequencies are divided by the factor; yarn: only low
                                frequencies
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError, listed

if TYPE_CHECKING:
    from gguf import GGUFReader

FREQUENCIES = "rope_freqs.weight"
LLAMA3_TYPES = ("llama", "mistral")  # model types that use rope_freqs like Llama 3
YARN = {
    "scaling.original_context_length": "original_max_position_embeddings",
    "scaling.yarn_beta_fast": "beta_fast",
    "scaling.yarn_beta_slow": "beta_slow",
}
UNSUPPORTED = ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier")


def metadata_value(reader: GGUFReader, key: str) -> Any:
    """The value of a metadata key; None if it is absent."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def set_rope_scaling(config: Any, readers: Sequence[GGUFReader], what: str) -> None:
    """Adds the RoPE scaling of a model's GGUF files to its configuration."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in rope or rope.get("rope_type", "default") != "default":
        return  # none or several kinds of RoPE, or transformers has read the scaling
    factors = [t.data for reader in readers for t in reader.tensors if t.name == FREQUENCIES]
    if factors and config.model_type in LLAMA3_TYPES:
        config.rope_parameters = _as_llama3(config, factors[0], what)
        return
    first, prefix = readers[0], f"{metadata_value(readers[0], 'general.architecture')}.rope."
    keys = [key for key in first.fields if key.startswith(prefix)]
    metadata = {key.removeprefix(prefix): metadata_value(first, key) for key in keys}
    kind, factor = metadata.get("scaling.type", "none"), metadata.get("scaling.factor")
    if "scale_linear" in metadata:  # in files of 2023
        kind, factor = "linear", metadata["scale_linear"]
    odd = [key for key in UNSUPPORTED if metadata.get(f"scaling.{key}", 1.0) != 1.0]
    if wrong := [*({kind} - {"none", "linear", "yarn"}), *odd]:
        raise LorafoldError(
            f"{what}: unsupported RoPE scaling {listed(wrong)} ({prefix}scaling.*);"
            " use the model in Hugging Face's format"
        )
    if kind != "none" and factor is not None:
        own = {name: metadata[key] for key, name in YARN.items() if key in metadata}
        config.rope_parameters = {
            **rope, "rope_type": kind, "factor": factor, **(own if kind == "yarn" else {})
        }  # fmt: skip


def _as_llama3(config: Any, tensor: Any, what: str) -> dict[str, Any]:
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factors = torch.tensor(tensor.copy()).double()  # (rotated dimensions / 2,)
    scaled = deepcopy(config)
    scaled.rope_parameters = {
        **config.rope_parameters,
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = config.rope_parameters["rope_theta"] ** -(
        torch.arange(len(factors)).double() / len(factors)
    )
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    if wanted.shape != factors.shape or not torch.allclose(
        plain / factors, wanted.double(), rtol=1e-4
    ):
        raise LorafoldError(
            f"{what}: the tensor {FREQUENCIES} scales RoPE differently from Llama 3, the only"
            " supported scaling by a tensor; use the model in Hugging Face's format"
        )
    return scaled.rope_parameters
