"""What `config.json` must say of a merged model: biases that it gained, embedding and head that are
tied no longer, a vocabulary that grew.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from lorafold.core.anatomy import tied_parameters
from lorafold.errors import LorafoldError, NotMergeable
from lorafold.fold.biases import Switches, switch_on
from lorafold.models.checkpoint import MappedModel, build
from lorafold.models.container import Entry


def untied_config(
    config: dict[str, Any], mapped: MappedModel, trust_remote_code: bool
) -> dict[str, Any]:
    """The config file's content for a model whose embedding and head differ.

    LorafoldError where the architecture ties them regardless.
    """
    loose = copy.deepcopy(mapped.model.config)
    loose.tie_word_embeddings = False
    loose.get_text_config().tie_word_embeddings = False
    if still := tied_parameters(build(loose, trust_remote_code)):
        raise LorafoldError(
            f"{', '.join(sorted(still))}: the architecture shares them whatever its config says, so"
            " they can't be untied"
        )
    nested = {
        key: {**value, "tie_word_embeddings": False}
        for key, value in config.items()
        if key == "text_config"
    }
    return {**config, **nested, "tie_word_embeddings": False}


def with_biases(
    config: dict[str, Any], mapped: MappedModel, switches: Switches
) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The config file's content for a model whose config has these switches on; and, by parameter,
    an entry for each bias that the files lack, which the model gets as zeros.

    NotMergeable where the files hold a weight that is converted, with which no bias can go.
    """
    model = mapped.model
    switch_on(model, switches)
    found = {}
    for path in chain(*switches.values()):
        if (like := mapped.entries.get(f"{path}.weight")) is None:
            raise NotMergeable(
                f"{path}: the files hold its weight in a form that is converted on loading, so no"
                " bias can go with it"
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
    """The config file's content for a model whose vocabulary has this size."""
    if "text_config" not in config:
        return {**config, "vocab_size": size}
    top = {"vocab_size": size} if "vocab_size" in config else {}
    return {**config, **top, "text_config": {**config["text_config"], "vocab_size": size}}
