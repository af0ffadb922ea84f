"""Every target by its name."""

from __future__ import annotations

from lorafold.errors import LorafoldError
from lorafold.exporting.target import Target
from lorafold.exporting.to_gguf import ToGguf, ToLlamaCpp
from lorafold.exporting.to_gguf_model import ToGgufModel
from lorafold.exporting.to_mlx import ToMlx
from lorafold.exporting.to_ollama import ToOllama
from lorafold.exporting.to_peft import ToPeft
from lorafold.exporting.to_sglang import ToSglang
from lorafold.exporting.to_vllm import ToVllm

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        ToPeft(), ToGguf(), ToLlamaCpp(), ToGgufModel(), ToOllama(), ToVllm(), ToSglang(), ToMlx()
    )
}


def target_of(name: str) -> Target:
    """The target of this name. Raises LorafoldError with the names that there are."""
    if not isinstance(name, str) or name not in TARGETS:
        raise LorafoldError(f"--to: found {name!r}, expected one of {', '.join(TARGETS)}")
    return TARGETS[name]
