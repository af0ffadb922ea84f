"""`lf.merge`: a plain model out of a base and its adapters."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Unpack

from lorafold.api import options as opt
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from lorafold.merging.run import Merged


@opt.verb
def merge(
    model: opt.Model = None,
    adapters: opt.SomeAdapters = (),
    out: opt.OutLast = None,
    *,
    into: str | None = None,
    rounding: Literal["auto", "nearest", "stochastic"] = "auto",
    seed: opt.Seed = 0,
    certificate: bool = True,
    probe: Annotated[str | Path | None, opt.Option(kind=str)] = None,
    overwrite: opt.Overwrite = False,
    console: opt.Progress = None,
    **opening: Unpack[opt.AsTrained],
) -> "Merged":
    """Fold adapters into their base and write a plain Hugging Face model, which is as fast as the
    base and needs no adapter library.

    One tensor at a time is in memory, so without `certificate` the model may be larger than the
    memory. The certificate, OUT/merge.json, states how far the output of the merged model is from
    that of the adapted one, and how much of the update rounding lost. The directory appears whole
    or not at all.

    Args:
        into: The weights to merge into: trained (those that the adapter was trained on, dequantized
            if they were quantized), original (the base's own, before quantization), or nf4 or int8
            (original, and the result is quantized). Default: trained.
        rounding: nearest; stochastic, which has no error on average; or auto, which takes
            stochastic for the tensors whose update rounding to nearest would lose.
        certificate: Compare the merged with the adapted model on text, loading one at a time.
        probe: Rows to compare on, as for train. Default: built-in texts.

    Raises LorafoldError, with nothing written, for a model, adapter, probe or `out` that can't be
    used, and NotMergeable with every reason for which the adapters can't be folded.

    Examples:
        lorafold merge demo/adapter --out merged
        lorafold merge demo/adapter --out quick --no-certificate
        lorafold merge demo/adapter --out small --into nf4
    """
    from lorafold.api.arguments import as_path, as_paths, missing
    from lorafold.merging import run
    from lorafold.peft.saved import open_all
    from lorafold.resolve import base_for

    if out is None:
        raise missing("out")
    if not (found := open_all(as_paths(adapters))):
        raise LorafoldError("adapters: found no adapter, expected at least one to merge")
    base = base_for(model, found, console, **opening)
    wanted = run.MergeOptions(into, rounding, seed, certificate, probe, overwrite)
    return run.merge(base, found, as_path(out), wanted, console)
