"""`lf.resize`: change an adapter's rank."""

from typing import TYPE_CHECKING, Unpack

from lorafold.api import options as opt

if TYPE_CHECKING:
    from lorafold.inspecting.resize import Resized


@opt.verb
def resize(
    adapter: opt.Adapter,
    out: opt.Out,
    *,
    model: opt.Model = None,
    over: opt.Over = (),
    rank: opt.OptionalCount = None,
    energy: float | None = None,
    data: opt.OptionalRows = None,
    max_length: opt.Length = None,
    overwrite: opt.Overwrite = False,
    console: opt.Progress = None,
    **base_options: Unpack[opt.RowsOptions],
) -> "Resized":
    """Change the rank of an adapter by singular value decomposition, with the smallest possible
    error.

    The result is plain LoRA in PEFT format, whatever the method was, on top of the same base
    adapters. The error is the share of the update's (Frobenius) norm that is lost. To find out
    which rank is enough, use `lorafold lab inspect`.

    Args:
        rank: The rank of every module, or less if its update has a smaller rank.
        energy: Instead of `rank`, the share of each update's energy to keep, for example 0.95.
        data: Rows, as for train, to measure how the loss changes, in nats per token.

    Raises LorafoldError unless exactly one of rank and energy is given, for bad rows, and for an
    adapter that has no form in weight space, changes biases with its weights or can't be read.

    Examples:
        lorafold lab resize demo/adapter --rank 4 --out rank-4
        lorafold lab resize demo/adapter --energy 0.95 --out most
        lorafold lab resize demo/adapter --rank 4 --out new --data demo/test.jsonl
    """
    from dataclasses import replace

    from lorafold.api.arguments import as_path, as_paths, as_reading, as_rows
    from lorafold.api.model_arguments import load_with_adapters, truncation_length
    from lorafold.inspecting import resize as resizing
    from lorafold.inspecting.loss_paths import compare_losses
    from lorafold.peft.adapter_directory import SavedAdapter, open_all
    from lorafold.resolve import base_for

    resizing.check_rank_or_energy(rank, energy)  # before any rows are read
    reading = as_reading(base_options)
    rows = None if data is None else as_rows(data, reading, console)
    stack = open_all([*as_paths(over), as_path(adapter, "adapter")])
    base = base_for(model, stack, console, **base_options)
    length = 0 if rows is None else truncation_length(base, max_length, stack, console)
    result = resizing.resize(base, stack, out, rank=rank, energy=energy, overwrite=overwrite)
    if rows is None:
        return result
    # reading them has already checked the base and the base adapters
    base, stack_with_result = replace(base, allow_other_base=True), (*stack, SavedAdapter.open(out))
    loaded, tokenizer = load_with_adapters(base, stack_with_result, console=console)
    return replace(result, losses=compare_losses(loaded, tokenizer, rows, length, len(stack) - 1))
