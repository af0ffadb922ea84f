"""The `config.json` of a merged model: biases that folding added, weights that are no longer
shared, a vocabulary that grew.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from lorafold.core.anatomy import tied_parameters
from lorafold.errors import LorafoldError, NotMergeable
from lorafold.fold.plan import Switches, switch_on
from lorafold.models.checkpoint import MappedModel, build
from lorafold.models.weights import Entry


def untied_config(
    config: dict[str, Any], mapped: MappedModel, apart: Collection[str], trust_remote_code: bool
) -> tuple[dict[str, Any], list[str]]:
    """(content of the config file for a model without ties, the parameters that its files must have
    besides those of the base): all that were tied, but for those that the architecture ties
    whatever its config says.

    Args:
        config: The content of the base's `config.json`.
        mapped: The base.
        apart: The parameters that must not be tied.
        trust_remote_code: Run Python code that comes with the model.

    Raises LorafoldError where the architecture ties those that must not be.
    """
    written = _without_ties(config)
    written["tie_word_embeddings"] = False
    loose = type(mapped.model.config).from_dict(copy.deepcopy(written))
    still = tied_parameters(build(loose, trust_remote_code))
    if wrong := sorted(still.keys() & set(apart)):
        raise LorafoldError(
            f"{', '.join(wrong)}: the architecture shares these weights whatever its config"
            " says, so they can't be untied"
        )
    had = {*mapped.entries, *mapped.converted}
    lacking: list[str] = []
    for name in mapped.tied:
        if not any(n in had or n in lacking for n in (name, *still.get(name, ()))):
            lacking.append(name)
    return written, lacking


def _without_ties(config: dict[str, Any]) -> dict[str, Any]:
    """The content without ties in its parts, such as that of the language model."""
    found = {
        key: _without_ties(value) if isinstance(value, dict) else value
        for key, value in config.items()
    }
    nested = {key: {**found[key], "tie_word_embeddings": False} for key in ("text_config",)
              if isinstance(found.get(key), dict)}  # fmt: skip
    own = {"tie_word_embeddings": False} if "tie_word_embeddings" in config else {}
    return {**found, **nested, **own}


def with_biases(
    config: dict[str, Any], mapped: MappedModel, switches: Switches
) -> tuple[dict[str, Any], dict[str, Entry]]:
    """(content of the config file, entries of added biases by parameter).

    The model gets the biases that its files lack, as zeros.

    Args:
        config: The content of the base's `config.json`.
        mapped: The base; its model and its entries gain the biases.
        switches: Fields of the config to set to true, with the modules that each gives a bias.

    Raises NotMergeable for a bias whose weight transformers converts on loading, so that the bias
    has no name in the files.
    """
    model = mapped.model
    switch_on(model, switches)
    found = {}
    for path in chain(*switches.values()):
        if (like := mapped.entries.get(f"{path}.weight")) is None:
            raise NotMergeable(
                f"{path}: transformers converts its weight on loading, so a bias can't be added to"
                " the files"
            )
        bias: Any = model.get_submodule(path)._parameters["bias"]
        name = like.name.removesuffix("weight") + "bias"
        found[f"{path}.bias"] = replace(
            like, name=name, shape=tuple(bias.shape), size=bias.nbytes
        )
    mapped.entries.update(found)
    on = dict.fromkeys(switches, True)
    if "text_config" not in config:
        return {**config, **on}, found
    return {**config, "text_config": {**config["text_config"], **on}}, found


def declared(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The config file's content for a model with a vocabulary of this size."""
    if "text_config" not in config:
        return {**config, "vocab_size": size}
    top = {"vocab_size": size} if "vocab_size" in config else {}
    return {**config, **top, "text_config": {**config["text_config"], "vocab_size": size}}
