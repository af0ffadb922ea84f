"""Architectures to estimate: by a model's name, whose configuration is all that is read, or by a
number of parameters.

`--params 7b, 13b, 70b` are Llama 2's shapes (Touvron et al. 2023, arXiv 2307.09288), `65b` and
`33b` Llama's (arXiv 2302.13971, table 2).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.errors import LorafoldError
from lorafold.io.intact import check_intact
from lorafold.io.loading import loading, one_line
from lorafold.io.models import ACCEPTED, EMBEDDED, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LLAMA = {  # width, of the MLP, blocks, heads, key heads, context
    "7b": (4096, 11008, 32, 32, 32, 4096),
    "13b": (5120, 13824, 40, 40, 40, 4096),
    "33b": (6656, 17920, 60, 52, 52, 2048),
    "65b": (8192, 22016, 80, 64, 64, 2048),
    "70b": (8192, 28672, 80, 64, 8, 4096),
}


def llama(size: str) -> PreTrainedConfig:
    """The configuration of the Llama of that size. LorafoldError for another word."""
    from transformers import LlamaConfig

    if size.lower() not in LLAMA:
        raise LorafoldError(f"params {size}: expected one of {', '.join(LLAMA)}")
    width, mlp, blocks, heads, key_heads, context = LLAMA[size.lower()]
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=context,
        vocab_size=32000,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


def configuration(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The configuration of a model by name: smollm2, a directory, a GGUF file (its header is read)
    or a hub id (one file is fetched).

    LorafoldError where there is none.
    """
    from transformers import AutoConfig

    path = Path(name).expanduser()
    with loading(f"model {name}"):
        if path.is_file() and path.suffix == ".gguf":
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        if name == EMBEDDED:
            return AutoConfig.from_pretrained(resolve_model(name).intact("config.json"))
        if path.exists() and not (path / "config.json").is_file():
            raise LorafoldError(f"model {name}: no config.json in it; {ACCEPTED}")
        check_intact(path, ["config.json"])
        try:
            return AutoConfig.from_pretrained(
                path if path.exists() else name,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
        except OSError as error:
            raise LorafoldError(
                f"model {name}: not on this machine, and the hub gave no answer: {one_line(error)};"
                f" {ACCEPTED}"
            ) from error
