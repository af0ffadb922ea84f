"""`lf.merge`: merge adapters into their base model."""

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
    **base_options: Unpack[opt.TrainedBaseOptions],
) -> "Merged":
    """Merge adapters into their base model and write a plain Hugging Face model, which is as fast
    as the base model and needs no adapter library.

    Only one tensor at a time is in memory, so without `certificate` the model may be larger than
    memory. The merge report, OUT/merge.json, contains the difference between the outputs of the
    merged model and of the model with adapters, and the share of the update lost to rounding. The
    directory appears only when it is complete.

    Args:
        into: The weights to merge into: trained (the weights that the adapter was trained on,
            dequantized if needed), original (the base model before quantization), or nf4 or int8
            (original, with the result quantized). Default: trained.
        rounding: nearest; stochastic, which is unbiased; or auto, which uses stochastic for tensors
            whose update would be lost by rounding to nearest.
        certificate: Compare the merged model with base + adapters on text, loading one at a time.
        probe: Rows to compare on, as for train. Default: built-in texts.

    Raises LorafoldError, with nothing written, for a model, adapter, probe or `out` that can't be
    used, and NotMergeable, with all reasons, if the adapters can't be merged.

    Examples:
        lorafold merge demo/adapter --out merged
        lorafold merge demo/adapter --out quick --no-certificate
        lorafold merge demo/adapter --out small --into nf4
    """
    from lorafold.api.arguments import as_path, as_paths, missing_argument
    from lorafold.api.model_arguments import resolve_base
    from lorafold.merging import run

    if out is None:
        raise missing_argument("out")
    if not as_paths(adapters):
        raise LorafoldError("adapters: found no adapter, expected at least one to merge")
    base, saved = resolve_base(model, adapters, console, **base_options)
    merge_options = run.MergeOptions(into, rounding, seed, certificate, probe, overwrite)
    return run.merge(base, saved, as_path(out), merge_options, console)
