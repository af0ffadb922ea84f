"""`lf.inspect`: analyse an adapter's update, with advice on its rank."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from lorafold.api import options as opt
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from lorafold.inspecting.result import Inspection


@opt.verb
def inspect(
    adapter: opt.Adapter,
    model: opt.Model = None,
    *,
    over: opt.Over = (),
    against: str | Path | None = None,
    directions: str | Path | None = None,
    data: opt.OptionalRows = None,
    rows: opt.Count = 64,
    max_length: opt.Length = None,
    full: bool = False,
    html: str | Path | None = None,
    console: opt.Progress = None,
    **base_options: Unpack[opt.RowsOptions],
) -> "Inspection":
    """Analyse an adapter's update: its effective rank, its relation to the base model, the tokens
    that it reads and writes, and the loss along it.

    The figures come from the adapter's factors and the base model's files. Only `data` loads the
    model itself.

    Args:
        against: A second adapter for the same base model: another rank, seed or task. With `over`,
            an adapter on top of the same base adapters, or one of them.
        directions: A safetensors file with named vectors in the residual stream, for example probes
            or the decoder of a sparse autoencoder.
        data: Rows, as for train, to measure the loss along base + t dW and between two adapters.
        rows: The number of rows to use for each point of a line.
        full: Also compare with the base model's spectrum: intruder dimensions, and which of the
            base directions change. It needs the SVD of every base matrix, which is slow the first
            time.
        html: Also write heat maps, spectra and tables to one HTML file.

    Raises LorafoldError as `lf.load` does, and for a method that does not change matrices.

    Examples:
        lorafold lab inspect demo/adapter
        lorafold lab inspect demo/adapter --full --html inside.html
        lorafold lab inspect demo/adapter --data demo/test.jsonl --rows 16

    Notes:
        How to read the figures. Effective rank: the number of directions that contain 90, 95 or 99%
        of an update's energy (its squared singular values). If it is far below the nominal rank,
        use `lorafold lab resize` to make the adapter smaller. Relative norm: the norm of the update
        divided by the norm of the base weight. Amplification: the norm of the update divided by the
        norm of the base weight in the update's directions. phi, with `against`: the share of one
        subspace that lies in another, at most 1. Barrier: how far the loss between two adapters
        rises above the straight line between their losses, in nats.
    """
    from lorafold.api import arguments as args
    from lorafold.api.model_arguments import load_with_adapters, truncation_length
    from lorafold.files.terminal import print_lines
    from lorafold.inspecting.inspect import inspect as inspect_adapter
    from lorafold.inspecting.loss_paths import measure_paths
    from lorafold.inspecting.report import page
    from lorafold.inspecting.summary import path_sentences
    from lorafold.peft.adapter_directory import SavedAdapter, open_all
    from lorafold.resolve import base_for

    html_path, below = args.as_html_path(html), args.as_paths(over)
    console = args.console_or_quiet(console)
    if below and against is not None and data is not None:
        raise LorafoldError(
            "over, against, data: expected at most two of them, because the loss between two"
            " adapters is measured without base adapters"
        )
    reading = args.as_reading(base_options)
    examples = None if data is None else args.as_rows(data, reading, console)[:rows]
    stack = open_all([*below, args.as_path(adapter, "adapter")])
    other = None if against is None else SavedAdapter.open(against)
    base = base_for(model, stack if other is None else (*stack, other), console, **base_options)
    length = 0 if examples is None else truncation_length(base, max_length, stack, console)
    with console.status("measuring the modules") as status:
        result = inspect_adapter(
            base,
            stack,
            against=other,
            directions=None if directions is None else args.as_path(directions, "directions"),
            full=full,
            progress=lambda done, total: status.update(f"module {done} of {total}"),
        )
    print_lines(console, result.tokens_left_out)
    if examples is not None:
        compared = stack if other is None else (stack[-1], other)
        loaded, tokenizer = load_with_adapters(base, compared, console=console)
        with console.status("measuring the loss along lines in weight space"):
            paths = measure_paths(loaded, tokenizer, examples, length, len(below))
        result = replace(result, paths=paths, advice=[*result.advice, *path_sentences(paths)])
    if html_path is not None:
        page(result, html_path)
    return result
