"""A language model that was loaded alone, out of files of a model with towers.

    config.json names         Qwen3_5ForConditionalGeneration    model.language_model.layers.0 ...
    AutoModelForCausalLM is   Qwen3_5ForCausalLM                 model.layers.0 ...

transformers has a class of the text alone for some such models, and other programs take the one
that config.json names. So the files of adapters have the module paths of that class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorafold.core.anatomy import bare_modules, decoder_of
from lorafold.models.sources import known

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Whole:
    """The model that a language model is a part of, on the meta device, and the paths there of the
    parts that both have, by their paths in the language model.
    """

    model: nn.Module
    paths: Mapping[str, str]

    def outward(self, path: str) -> str:
        """The path in the whole model of what the language model has at a path."""
        return moved(path, self.paths.items())

    def inward(self, path: str) -> str:
        """The reverse; a path that the whole model does not have is left as it is."""
        return moved(path, ((b, a) for a, b in self.paths.items()))


def moved(path: str, roots: Iterable[tuple[str, str]]) -> str:
    """The path with its root, if it is the first of a pair, replaced by the second."""
    for a, b in roots:
        if path == a or path.startswith(f"{a}."):
            return b + path[len(a) :]
    return path


def whole_of(model: nn.Module) -> Whole | None:
    """The whole that a language model was loaded out of; None for any other model."""
    import transformers as tf

    config = _in_files(model)
    if config is None or isinstance(model.config, type(config)):
        return None
    cls: Any = getattr(tf, next(iter(config.architectures or ()), ""), None)
    if cls is None or isinstance(model, cls) or _task(cls) == _task(type(model)):
        return None
    with torch.device("meta"):
        whole = cls(config)
    path, body = decoder_of(model)
    inner = [p for p, m in bare_modules(whole) if p and isinstance(body, type(m))]
    ends = [(_end(model), _end(whole))] if _end(model) and _end(whole) else []
    return Whole(whole, {path: inner[0], **dict(ends)}) if path and inner else None


def _in_files(model: nn.Module) -> PreTrainedConfig | None:
    """The configuration in the files that a model was read from, where they are at hand."""
    from transformers import AutoConfig

    found, own = known(model), getattr(model, "config", None)
    name = found.path if found else getattr(own, "_name_or_path", "")
    trusted = found is not None and found.trust_remote_code  # left open, transformers asks on stdin
    if not name:
        return None
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            name, local_files_only=True, trust_remote_code=trusted
        )
    except (OSError, ValueError):
        return None
    return None if config.get_text_config() is config else config


def _task(cls: type) -> str:
    """What a model of a class is for, from its name: "ForCausalLM", "ForSequenceClassification"."""
    return cls.__name__[cls.__name__.rfind("For") :]


def _end(model: Any) -> str:
    """The path of the output embedding; empty without one."""
    end = model.get_output_embeddings()
    return next((path for path, m in bare_modules(model) if m is end), "") if end else ""
