"""axolotl's plugins: those that change what is learned are refused, those that only make a step
faster or measure and log the run are passed over, and of others nothing is known.
"""

from __future__ import annotations

from typing import Any

from lorafold.errors import LorafoldError
from lorafold.translating.convert import names
from lorafold.translating.rules import Outcome, Settings, left

OF_AXOLOTL = "axolotl.integrations."
LEARNS_OTHERWISE = {
    "densemixer": "passes gradients to the router through every expert",
    "diffusion": "trains a model that fills in masks",
    "grokfast": "filters the gradients of past steps",
    "hatchery": "trains on another machine",
    "kd": "learns a teacher's probabilities",
    "llm_compressor": "keeps weights at zero",
    "nemo_gym": "is rewarded by environments of its own",
    "spectrum": "trains the layers with the most signal",
}
LEARNS_THE_SAME = (
    "cut_cross_entropy", "expert_parallel", "kernels", "liger", "lm_eval", "swanlab"
)  # fmt: skip


def plugins(value: Any, settings: Settings) -> Outcome:
    """`plugins`. LorafoldError for one that lorafold has nothing in place of."""
    others = []
    for name in names(value):
        part = name.removeprefix(OF_AXOLOTL).partition(".")[0]
        if name.startswith(OF_AXOLOTL) and part in LEARNS_OTHERWISE:
            raise LorafoldError(f"found {name}, which {LEARNS_OTHERWISE[part]}: lorafold does not")
        if not (name.startswith(OF_AXOLOTL) and part in LEARNS_THE_SAME):
            others.append(name)
    if others:
        return left(f"what {', '.join(others)} does there is not known and not done")
    return left("they make steps faster there, measure or log, and do not change what is learned")
