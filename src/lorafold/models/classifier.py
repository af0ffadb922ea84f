"""Sequence classifiers: a base's body under a head for given classes.

    logits = head(h at the last token)          (classes,); other architectures pool as their
                                                authors chose

`AutoModelForSequenceClassification` builds it from any base. Where the files hold no head it is
drawn from a seed, and an adapter saves it with itself as a module trained whole. The classes' names
lie in the config (`id2label`), and in the adapter's `lorafold.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from lorafold.core.anatomy import bare_modules, decoder_of
from lorafold.errors import LorafoldError
from lorafold.files.card import CLASSES
from lorafold.files.record import RECORD, read_record
from lorafold.models.load_errors import loading
from lorafold.models.loading import check_complete, read_weights
from lorafold.models.sources import ModelSource
from lorafold.models.storage import Storage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    """The classifier in evaluation mode on `device`, its weights in one dtype or held as `storage`
    says.

    A head that the files lack is drawn from `seed`. `pad_id` is the token that fills short rows up,
    at the right. Raises LorafoldError where transformers has no such classifier, or the files lack
    weights of the body.
    """
    import torch

    with loading(f"model {source.name}"):
        from transformers import AutoModelForSequenceClassification

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            names, numbers = dict(enumerate(classes)), {name: i for i, name in enumerate(classes)}
            auto = AutoModelForSequenceClassification
            model, missing = read_weights(
                auto, source, storage, device, trust_remote_code, id2label=names, label2id=numbers
            )
        # by which a decoder finds the last token
        model.config.get_text_config().pad_token_id = pad_id
        # one pass a text: keys and values would be kept for nothing
        model.config.get_text_config().use_cache = False
    heads = tuple(f"{path}." for path in head_paths(model))
    check_complete(source, [name for name in missing if not name.startswith(heads)])
    return model


def head_paths(model: nn.Module) -> tuple[str, ...]:
    """The modules over the body that hold parameters.

    LorafoldError where the model has no head that can be told from its body.
    """
    body, _ = decoder_of(model)
    found = [
        p
        for p, m in bare_modules(model)
        if any(p is not None for p in m._parameters.values()) and not f"{p}.".startswith(f"{body}.")
    ]
    if not body or not found:
        raise LorafoldError(f"{type(model).__name__} has no head apart from its body")
    return tuple(found)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills rows up: the tokenizer's own, or the end of sequence.

    LorafoldError where there is neither.
    """
    found = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if found is None:
        raise LorafoldError(
            "the tokenizer has neither a padding nor an end-of-sequence token: texts can't be"
            " batched"
        )
    return int(found)


def classes_of_adapter(path: str | Path) -> tuple[str, ...] | None:
    """The classes that a saved adapter tells apart, by number; None if it is no classifier's.

    LorafoldError for a damaged record.
    """
    classes = read_record(path).get(CLASSES)
    if classes is None:
        return None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise LorafoldError(
            f"{Path(path) / RECORD}: field {CLASSES}: found {classes!r}, expected a list of text"
        )
    return tuple(classes)


def classes_of_model(source: ModelSource) -> tuple[str, ...] | None:
    """The classes of a model that is a classifier itself; None if it is none."""
    config = source.config()
    if not any(
        name.endswith("ForSequenceClassification") for name in config.get("architectures") or ()
    ):
        return None
    # transformers leaves out its own default
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(names[key] for key in sorted(names, key=int))


def known_classes(source: ModelSource, adapters: Sequence[str | Path]) -> tuple[str, ...] | None:
    """The classes that the adapters or else the model were trained on; None where none was.

    LorafoldError where they differ.
    """
    found = {str(path): classes for path in adapters if (classes := classes_of_adapter(path))}
    if len(set(found.values())) > 1:
        raise LorafoldError(
            "classes differ: "
            + "; ".join(f"{name} has {', '.join(classes)}" for name, classes in found.items())
        )
    return next(iter(found.values())) if found else classes_of_model(source)
