"""Whether a trainer of TRL compares the adapter that trains with the right reference.

    DPOTrainer(model, lf.reference(model), ...)     the model under the adapters below
    DPOTrainer(model, ...)                          a second model, by its name: the bare base

Callbacks don't see the trainer, but its configuration and whether `lf.reference` was called.
"""

from __future__ import annotations

import logging
from typing import Any

from lorafold.adapter import Adapter
from lorafold.adapter.reference import below
from lorafold.core.attach import selection_of
from lorafold.errors import LorafoldError

logger = logging.getLogger(__name__)


def check_reference(adapter: Adapter, args: Any) -> None:
    """Raise LorafoldError if the trainer compares with a reference that lacks adapters; log a
    warning if it loads one that the model has already.

    Args:
        adapter: the adapter that trains.
        args: the trainer's configuration.
    """
    compares = hasattr(args, "sync_ref_model") and getattr(args, "beta", 1.0) != 0
    if not compares or getattr(args, "precompute_ref_log_probs", False):
        return  # a reference that is computed ahead is the model as it starts
    under = below(adapter.model)
    if selection_of(adapter.model).referred == under:
        return
    config, own = type(args).__name__, "lorafold.reference(model)"
    how = f"ref_model={own}, or for a trainer that takes none trainer.ref_model = {own}"
    if under:
        raise LorafoldError(
            f"AdapterCallback: {config}: found the bare base as reference, which TRL loads by the"
            f" model's name, expected the model under {', '.join(under)}, over which the adapter"
            f" {adapter.name!r} trains; give {how} (own_reference=True if yours is right)"
        )
    logger.warning(
        f"{config}: TRL loads the base once more as reference; {how} takes no memory."
    )
