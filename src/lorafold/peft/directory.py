"""Writes adapters as directories in PEFT's format, which `saved.py` reads.

    adapter_config.json            method, targets, bias, modules to save
    adapter_model.safetensors      fp32, under PEFT's names: base_model.model.<module
                                   path>.lora_A.weight ...
    lorafold.json                  the base's fingerprint, what it lies over, how it was made
    README.md                      the model card
    tokenizer.json ...             the tokenizer, if the adapter has one of its own

`table.py` says what each method looks like in these files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from lorafold.core.spec import Spec
from lorafold.core.targets import Matches
from lorafold.errors import LorafoldError, as_one
from lorafold.files.atomic import atomic_directory, write_json
from lorafold.files.card import CARD, OVER, VOCABULARY, Beside, training_card
from lorafold.files.record import BASE, RECORD
from lorafold.methods.parts.extras import Bias
from lorafold.methods.parts.replace import ReplaceDelta
from lorafold.models import fingerprint
from lorafold.models.architecture import opened_by_name, whole_of
from lorafold.models.classifier import new_heads
from lorafold.models.weights import Weights
from lorafold.peft.checks import not_finite
from lorafold.peft.config import CONFIG, WEIGHTS, write_config
from lorafold.peft.form import DROPOUT, form_of, tell
from lorafold.peft.format import ROOT
from lorafold.peft.paths import renamed
from lorafold.peft.selection import buffers_beneath, describe
from lorafold.peft.tensors import Parts, saved_tensors, sites


@dataclass(frozen=True)
class Chosen:
    """What of a model an adapter changes, and how: its method, the adapted modules by the pattern
    with which the user selected them, the biases that train too, and the names with which the user
    selected modules to train whole.
    """

    spec: Spec
    matches: Matches
    bias: Bias = "none"
    modules_to_save: tuple[str, ...] = ()


def write(
    path: str | Path,
    model: nn.Module,
    chosen: Chosen,
    parts: Parts,
    base: Weights,
    beside: Beside,
) -> Path:
    """Write the directory, completely or not at all.

    Raises LorafoldError if the path exists and may not be replaced, if PEFT's format can't express
    the adapter, or if a value is not finite.

    Args:
        path: The directory to write.
        model: The model that the adapter is attached to.
        parts: The adapter's deltas by module path.
    """
    spec, matches = chosen.spec, chosen.matches
    targets = matches.paths
    replaced = [
        p for p, deltas in parts.items() if any(isinstance(d, ReplaceDelta) for d in deltas)
    ]
    saved = [p for p in replaced if p not in targets]
    form, whole = form_of(model, spec, targets), whole_of(model)
    named = whole.outward if whole else str
    of_parameters = {named(p): named(parameter) for p, parameter in form.parameters.items()}
    selection = describe(
        whole.model if whole else model, [named(p) for p in targets if p],
        tuple(matches.by_pattern), [*map(named, saved)], chosen.modules_to_save,
        replace(form, parameters=of_parameters),
    )  # fmt: skip
    found = sites(model, parts, targets, base)
    config = write_config(model, spec, found, selection, chosen.bias, form)
    tensors = {
        renamed(key, named): saved.encoded().contiguous().cpu()
        for key, saved in saved_tensors(model, parts, targets, base).items()
    }
    # PEFT reads all that a module which it saves whole has
    tensors |= {
        key: buffer.contiguous().cpu()
        for name, buffer in buffers_beneath(model, selection.modules_to_save).items()
        if (key := renamed(f"{ROOT}.{name}", named)) not in tensors
    }
    if wrong := [text for key, t in tensors.items() if (text := not_finite(key, t))]:
        raise LorafoldError(f"{path} was not written: {as_one(wrong)}")
    record = {k: v for k, v in beside.record.items() if k != DROPOUT} | form.record
    beneath = new_heads(model) if OVER in record else ()  # replaced there
    known = record.get(BASE) or fingerprint.of(base, [*replaced, *beneath])
    about = {**record, "lorafold": version("lorafold"), BASE: known}
    shown = {k: v for k, v in record.items() if k in (OVER, VOCABULARY)} | {
        "recipe": {"method": type(spec).__name__, **vars(spec)}
    }
    own_card = training_card(
        config["base_model_name_or_path"] or "",
        shown,
        {},
        opened_by=opened_by_name(model),
        in_peft=form.method.of_peft and not form.refused,
    )
    with atomic_directory(path, beside.overwrite) as directory:
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        write_json(directory / CONFIG, config)
        write_json(directory / RECORD, about)
        if beside.tokenizer is not None:
            beside.tokenizer.save_pretrained(directory)
        (directory / CARD).write_text(beside.card or own_card, encoding="utf-8")
    tell(form, path)
    return Path(path)
