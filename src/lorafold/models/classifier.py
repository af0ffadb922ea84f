"""Sequence classifiers: the body of a base with a head for given classes, or for one score.

    logits = head(h at the last token)          (classes,); some architectures pool the hidden
                                                states in another way

`AutoModelForSequenceClassification` builds it from any base. If the model's files have no head, it
is initialized at random from a seed, trained whole, and saved with the adapter. The names of the
classes are stored in the config (`id2label`) and in the adapter's `lorafold.json`. A reward model
is such a model with one output: transformers' form of a regression, and PEFT's SEQ_CLS. The head
computes in fp32 over a body of any storage: a score in bf16 has 8 significant bits, so that many
texts would have the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorafold.core.anatomy import bare_modules, decoder_of
from lorafold.core.presets import beneath
from lorafold.core.towers import aside
from lorafold.errors import LorafoldError
from lorafold.files.card import CLASSES, REWARD
from lorafold.files.record import RECORD, read_object, read_record
from lorafold.models.load_errors import loading
from lorafold.models.loading import check_complete, read_weights
from lorafold.models.sources import ModelSource
from lorafold.models.storage import Storage
from lorafold.models.weights import FileWeights, Weights, model_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


LANGUAGE_MODEL, REWARD_MODEL = "a language model", "a reward model"
PEFT_HEADS = (".score.weight", ".classifier.weight")  # in the files of PEFT's classifiers


def load_classifier(
    source: ModelSource,
    classes: Sequence[str],
    pad_id: int,
    storage: Storage | torch.dtype,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a classifier, in evaluation mode. With one class it is a reward model.

    Raises LorafoldError if transformers has no classifier of this architecture, or if the files
    lack weights of the body.

    Args:
        source: The base model.
        classes: The names of the classes, in the order of their numbers.
        pad_id: The token that fills short texts, at the right.
        storage: How the base stores its weights; a dtype for weights that are not quantized.
        device: Where to load the model.
        seed: The seed of the head, if the files have none.
        trust_remote_code: Run the code in the model's directory.
    """
    with loading(f"model {source.name}"):
        from transformers import AutoModelForSequenceClassification

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            names, numbers = dict(enumerate(classes)), {name: i for i, name in enumerate(classes)}
            config: dict[str, Any] = {"id2label": names, "label2id": numbers}
            if len(classes) == 1:
                config["problem_type"] = "regression"
            auto = AutoModelForSequenceClassification
            model, missing = read_weights(
                auto, source, storage, device, trust_remote_code, **config
            )
        # a decoder finds the last token by it
        model.config.get_text_config().pad_token_id = pad_id
        # each text takes a single forward pass, so a cache would never be used
        model.config.get_text_config().use_cache = False
    heads = tuple(f"{path}." for path in head_paths(model))
    new = [name for name in missing if name.startswith(heads)]
    check_complete(source, [name for name in missing if name not in new])
    widen_heads(model, None if new else FileWeights(model_files(source.path)))
    return model


def load_reward_model(
    source: ModelSource,
    pad_id: int,
    storage: Storage | torch.dtype,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a classifier with one output, in evaluation mode. Raises as `load_classifier`.

    Args:
        source: The base model.
        pad_id: The token that fills short texts, at the right.
        storage: How the base stores its weights; a dtype for weights that are not quantized.
        device: Where to load the model.
        seed: The seed of the head, if the files have none.
        trust_remote_code: Run the code in the model's directory.
    """
    how: dict[str, Any] = {"seed": seed, "trust_remote_code": trust_remote_code}
    return load_classifier(source, (REWARD,), pad_id, storage, device, **how)


def head_paths(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the modules with parameters that are neither part of the model's body nor
    of towers and connectors beside it.

    Raises LorafoldError if there are none.
    """
    body, _ = decoder_of(model)
    inside = beneath([body, *aside(model)])
    found = [
        p
        for p, m in bare_modules(model)
        if any(p is not None for p in m._parameters.values()) and not inside(p)
    ]
    if not body or not found:
        raise LorafoldError(
            f"{type(model).__name__}: found no head beside its body, expected a classifier"
        )
    return tuple(found)


def widen_heads(model: nn.Module, files: Weights | None = None) -> None:
    """Let the heads of a classifier compute in fp32 if they are in 16 bits.

    Args:
        model: A classifier without adapters.
        files: Has the values of the heads as they were before the model took 16 bits of them; None
            for new heads.
    """
    for path in head_paths(model):
        head = model.get_submodule(path)
        own = list(head.named_parameters(recurse=False))
        if not any(p.dtype in (torch.bfloat16, torch.float16) for _, p in own):
            continue
        for name, p in own:
            found = files.find(f"{path}.{name}") if files is not None else None
            value = p.detach() if files is None or found is None else files.get(found).to(p.device)
            setattr(head, name, nn.Parameter(value.to(torch.float32, copy=True), p.requires_grad))
        head.register_forward_pre_hook(_widened)


def _widened(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of a forward, with activations in fp32; a hook of torch."""
    return tuple(x.float() if isinstance(x, Tensor) else x for x in args)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that fills short texts: the tokenizer's padding token, or else its
    end-of-sequence token. Raises LorafoldError if it has neither.
    """
    found = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if found is None:
        raise LorafoldError(
            "tokenizer: found neither a padding nor an end-of-sequence token, expected one of them"
            " to fill the texts of a batch to one length"
        )
    return int(found)


def classes_of_adapter(path: str | Path) -> tuple[str, ...] | None:
    """Return the classes of a saved adapter, in the order of their numbers, or None if it is not an
    adapter of a classifier. Raises LorafoldError if its record is damaged.
    """
    classes = read_record(path).get(CLASSES)
    if classes is None:
        return None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise LorafoldError(
            f"{Path(path) / RECORD}: field {CLASSES}: found {classes!r}, expected a list of text"
        )
    return tuple(classes)


def outputs_of_model(source: ModelSource) -> tuple[str, ...] | None:
    """Return the names of the outputs of a model that has a head for texts already, or None if it
    has none.
    """
    config = source.config()
    if not any(
        name.endswith("ForSequenceClassification") for name in config.get("architectures") or ()
    ):
        return None
    # transformers does not write its default to the file
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(names[key] for key in sorted(names, key=int))


def known_classes(source: ModelSource, adapters: Sequence[str | Path]) -> tuple[str, ...] | None:
    """Return the classes of the adapters, or else of the model, or None if neither has classes.

    Raises LorafoldError if the adapters' classes differ.
    """
    found = {str(path): classes for path in adapters if (classes := classes_of_adapter(path))}
    if len(set(found.values())) > 1:
        raise LorafoldError(
            "adapters: expected the same classes in all of them, found "
            + "; ".join(f"{', '.join(classes)} in {name}" for name, classes in found.items())
        )
    if found:
        return next(iter(found.values()))
    outputs = outputs_of_model(source)
    return outputs if outputs and len(outputs) > 1 else None


def is_reward_model(source: ModelSource, adapters: Sequence[str | Path]) -> bool:
    """Whether one of the adapters is that of a reward model, or else the model is one.

    Raises LorafoldError if a record is damaged.
    """
    for path in adapters:
        record = read_record(path)
        if record.get(REWARD) is True or (not record and _outputs_in_peft(Path(path)) == 1):
            return True
    return len(outputs_of_model(source) or ()) == 1


def _outputs_in_peft(path: Path) -> int:
    """The outputs of the head in an adapter that PEFT wrote for a classifier; 0 if it is for none.

    Raises LorafoldError if its tensors can't be read.
    """
    config, tensors = path / "adapter_config.json", path / "adapter_model.safetensors"
    if not config.is_file() or read_object(config).get("task_type") != "SEQ_CLS":
        return 0
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(tensors, framework="pt") as file:
            names = file.keys()
            heads = [key for key in names if key.endswith(PEFT_HEADS)]
            return int(file.get_slice(heads[0]).get_shape()[0]) if heads else 0
    except (SafetensorError, OSError) as error:
        raise LorafoldError(f"{tensors}: {error}") from None


def kind_of(source: ModelSource, adapters: Sequence[str | Path]) -> str:
    """What a model with its adapters is, in words: a language model, a reward model, or a
    classifier of its classes. Raises LorafoldError as `known_classes` does.
    """
    if classes := known_classes(source, adapters):
        return f"a classifier of {', '.join(classes)}"
    return REWARD_MODEL if is_reward_model(source, adapters) else LANGUAGE_MODEL


def check_language_model(
    source: ModelSource, adapters: Sequence[str | Path], advice: str = ""
) -> None:
    """Raise LorafoldError unless the adapters are those of a language model.

    Args:
        adapters: The adapters' directories.
        advice: What to do instead, for the message.
    """
    if (kind := kind_of(source, adapters)) != LANGUAGE_MODEL:
        raise LorafoldError(
            f"{', '.join(map(str, adapters))}: found {kind}, expected an adapter of a language"
            f" model{advice}"
        )
