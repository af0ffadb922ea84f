"""A base whose config.json older readers take for another model, in their form.

    rope_parameters {rope_theta, rope_type, ...}    ->  rope_theta, rope_scaling,
                                                        partial_rotary_factor
    num_local_experts                               ->  num_experts
    layer_types of Gemma 3                          ->  sliding_window_pattern

Transformers 5 writes the first. mlx-lm 0.32 reads the second in most of its models and computes
with a default of 10,000 where it is missing, without a word.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafold.exporting.windows import period_of
from lorafold.files.atomic import write_json
from lorafold.files.record import read_object

CONFIG, MANIFEST = "config.json", "manifest.json"
PARAMETERS, THETA, SCALING, LOCAL = (
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
)
RENAMED = (("num_local_experts", "num_experts"),)
# where mlx-lm has Gemma 3's layers that attend to all positions, whatever layer_types says
GEMMA, PATTERN, USUAL = "gemma3_text", "sliding_window_pattern", 6
PARTIAL = "partial_rotary_factor"
KINDS = ("full_attention", "sliding_attention")  # of layers that have positions of their own


def older_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration with the older names too, or None if it needs none.

    Args:
        config: the content of config.json.
    """
    more = _positions(config)
    more |= _pattern(config)
    more |= {new: config[old] for old, new in RENAMED if old in config and new not in config}
    return {**config, **more} if more else None


def _pattern(config: Mapping[str, Any]) -> dict[str, Any]:
    kinds = config.get("layer_types")
    if config.get("model_type") != GEMMA or PATTERN in config or not isinstance(kinds, list):
        return {}
    period = period_of(kinds)
    return {} if period in (None, USUAL) else {PATTERN: period}


def _positions(config: Mapping[str, Any]) -> dict[str, Any]:
    found = config.get(PARAMETERS)
    if not isinstance(found, Mapping) or config.get(THETA) is not None:
        return {}
    full, local = (found.get(kind) for kind in KINDS)
    own = full if isinstance(full, Mapping) else found
    if THETA not in own:
        return {}
    more: dict[str, Any] = {THETA: own[THETA]}
    if PARTIAL in own and PARTIAL not in config:
        more[PARTIAL] = own[PARTIAL]
    if own.get("rope_type", "default") != "default":
        more[SCALING] = {k: v for k, v in own.items() if k != THETA}
    if isinstance(local, Mapping) and THETA in local:
        more[LOCAL] = local[THETA]
    return more


def write_older(source: Path, directory: Path) -> bool:
    """Write a model's directory with the older names, if its own has them not. The other files are
    hard links, or copies on another disk.

    Args:
        source: the directory of the model.
        directory: the one to make.
    """
    config = older_config(read_object(source / CONFIG))
    if config is None:
        return False
    directory.mkdir()
    for file in source.iterdir():
        if file.name in (CONFIG, MANIFEST) or not file.is_file():
            continue
        real = file.resolve()
        try:
            os.link(real, directory / file.name)
        except OSError:
            shutil.copyfile(real, directory / file.name)
    write_json(directory / CONFIG, config)
    return True
