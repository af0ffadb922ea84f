"""The language model of a multimodal model, and the towers beside it.

    language_model(model)   "model.language_model"; "" where the model as a whole is one
    towers(model)           {"model.vision_tower": "vision"}, and "audio"
    aside(model)            the towers, and the connectors between them and the language model

They are found by what the model says of itself, never by its name. The language model is the
outermost part on the way to the input embedding whose configuration is one of text alone. A tower
is a part that takes images, video or audio in. An encoder-decoder (Whisper, an image encoder under
a text decoder) is one model, and so are two encoders side by side (CLIP): neither half is a tower
of the other.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lorafold.core.anatomy import bare_modules, input_embedding

MODALITIES = {"image": "vision", "video": "vision", "audio": "audio"}


def language_model(model: nn.Module) -> str:
    """The path of the language model inside a multimodal model; "" for every other model."""
    way = _way(model)
    if not way or _of_text(model):
        return ""
    path, part = next(((p, m) for p, m in way if _of_text(m)), ("", model))
    return "" if _half(model, part) or not _generates(model, part) else path


def towers(model: nn.Module) -> dict[str, str]:
    """The paths of the towers, and what each takes in: "vision" or "audio"."""
    language, way = language_model(model), dict(_way(model))
    config = _config(model)
    # a tower may lie inside a language model whose own configuration has a part for it
    within = _of_text(model) and getattr(config, "sub_configs", None)
    if not language and (not within or config.is_encoder_decoder):
        return {}
    known, found = _takes(model), dict[str, str]()
    for path, module in bare_modules(model):
        over = not path or path in way
        inside = f"{path}.".startswith(tuple(f"{p}." for p in (*found, language) if p))
        if not over and not inside and (kinds := [k for k in _takes(module) if k in known]):
            found[path] = kinds[0]
    return found


def aside(model: nn.Module) -> tuple[str, ...]:
    """The paths of the parts that are neither in the language model nor over it, as heads are."""
    language = language_model(model)
    if not language:
        return tuple(towers(model))
    steps = language.split(".")
    around = [".".join(steps[:n]) for n in range(len(steps))]
    left_out = {*around, language, *heads(model)}
    paths = [
        f"{outer}.{name}" if outer else name
        for outer in around
        for name, _ in model.get_submodule(outer).named_children()
    ]
    return tuple(path for path in paths if path not in left_out)


def heads(model: Any) -> list[str]:
    """The paths of the parts over the base model, such as a classifier's head; where the model
    does not say what its base is, that of the output embedding.
    """
    base = getattr(model, "base_model", model)
    if base is not model:
        return [name for name, child in model.named_children() if child is not base]
    end = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [path for path, m in bare_modules(model) if end is not None and m is end]


def _way(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The path and module of each module on the way to the input embedding, without the model."""
    embedding = input_embedding(model)
    found = next((path for path, m in bare_modules(model) if path and m is embedding), "")
    steps = found.split(".") if found else []
    paths = [".".join(steps[:n]) for n in range(1, len(steps) + 1)]
    return [(path, model.get_submodule(path)) for path in paths]


def _config(module: nn.Module) -> Any:
    return getattr(module, "config", None)


def _of_text(module: nn.Module) -> bool:
    """Whether the module's configuration is that of a text model itself."""
    config = _config(module)
    if not hasattr(config, "get_text_config"):
        return False
    return not config.sub_configs or config.get_text_config(decoder=True) is config


def _half(model: nn.Module, part: nn.Module) -> bool:
    """Whether the part is the decoder of the model, which is an encoder-decoder."""
    config = _config(part)
    decodes = getattr(config, "is_decoder", False) or not config.is_encoder_decoder
    return _config(model).is_encoder_decoder and decodes


def _generates(model: Any, part: nn.Module) -> bool:
    """Whether the layers of the part have places in a cache, and look back alone or have an output
    embedding over them: an encoder beside another has neither.
    """
    numbered = [m for m in part.modules() if hasattr(m, "layer_idx")]
    causal = any(getattr(m, "is_causal", True) for m in numbered)
    return causal or (bool(numbered) and model.get_output_embeddings() is not None)


def _takes(module: nn.Module) -> list[str]:
    """What the module takes in beside text: "vision", "audio"; none for a connector, or text."""
    named: Any = getattr(module, "input_modalities", ())
    names = [named] if isinstance(named, str) else named
    return list(dict.fromkeys(MODALITIES[name] for name in names if name in MODALITIES))
