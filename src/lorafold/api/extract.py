"""`lf.extract`: make an adapter from the difference of two models."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

from lorafold.api import options as opt

if TYPE_CHECKING:
    from lorafold.inspecting.resize import Resized


@opt.verb
def extract(
    tuned: Annotated[str | Path, opt.Option(kind=str)],
    out: opt.Out,
    *,
    rank: opt.Count,
    model: opt.OnlyModel = "smollm2",
    overwrite: opt.Overwrite = False,
    **opening: Unpack[opt.HubOptions],
) -> "Resized":
    """Make a LoRA adapter from the difference between a fine-tuned model and its base model: the
    best approximation of the given rank for every linear layer of the blocks.

    Only one tensor at a time is in memory, so the models may be larger than memory. Other tensors
    that differ (norms, embeddings) are listed and left out.

    Args:
        tuned: The fine-tuned model: a directory or a Hub ID.
        rank: The rank of each module's update.

    Raises LorafoldError if the models have different modules, or equal weights in those layers.

    Examples:
        lorafold lab extract --tuned demo/merged --rank 8 --out extracted
        lorafold lab extract --model smollm2 --tuned demo/merged --rank 4 --out rank-4
        lorafold lab extract --tuned demo/merged --rank 2 --out rank-2 --json
    """
    from lorafold.inspecting import resize as resizing
    from lorafold.resolve import Base

    after = Base(tuned, trust_remote_code=opening.get("trust_remote_code", False))
    return resizing.extract(Base(model, **opening), after, out, rank=rank, overwrite=overwrite)
