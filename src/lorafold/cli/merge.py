"""`lorafold merge`: a plain model out of a base and its adapters."""

from enum import StrEnum
from typing import Annotated

import typer

from lorafold.cli.common import (
    Adapters,
    AllowOtherOption,
    Computing,
    JsonOption,
    Output,
    SeedOption,
    TrainedStorageOption,
    emit,
    messages,
)
from lorafold.cli.groups import grouped
from lorafold.models.storages import MADE

EXAMPLES = (
    "lorafold merge demo/adapter --out merged",
    "lorafold merge demo/adapter --out quick --no-certificate",
    "lorafold merge demo/adapter --out small --into nf4",
)


class Rounding(StrEnum):
    """How folded weights are rounded to the model's dtype."""

    auto = "auto"
    nearest = "nearest"
    stochastic = "stochastic"


@grouped
def command(
    adapters: Adapters,
    output: Output,
    computing: Computing,
    into: Annotated[
        str | None,
        typer.Option(
            help=(
                "The weights to merge into: trained (those that the adapter was trained on,"
                " dequantized if they were quantized), original (the base's own, before"
                f" quantization), or {' or '.join(MADE)} (original, and the result is quantized)."
                " Without it trained."
            )
        ),
    ] = None,
    storage: TrainedStorageOption = "auto",
    rounding: Annotated[
        Rounding,
        typer.Option(
            help=(
                "nearest; stochastic, which has no error on average; or auto, which takes"
                " stochastic for the tensors whose update rounding to nearest would lose."
            )
        ),
    ] = Rounding.auto,
    seed: SeedOption = 0,
    certificate: Annotated[
        bool,
        typer.Option(
            help="Compare the merged with the adapted model on text, loading one at a time.",
        ),
    ] = True,
    probe: Annotated[
        str | None,
        typer.Option(help="Rows to compare on, as for train. Without it built-in texts."),
    ] = None,
    allow_other_base: AllowOtherOption = False,
    json: JsonOption = False,
) -> None:
    """Fold adapters into their base and write a plain Hugging Face model, which is as fast as the
    base and needs no adapter library.

    One tensor at a time is in memory, so with --no-certificate the model may be larger than the
    memory. The certificate, OUT/merge.json, states how far the output of the merged model is from
    that of the adapted one, and how much of the update rounding lost.
    """
    from lorafold.api.merge import merge

    result = merge(
        computing.model,
        adapters.some,
        output.out,
        into=into,
        storage=storage,
        rounding=rounding.value,
        seed=seed,
        certificate=certificate,
        probe=probe,
        allow_other_base=allow_other_base,
        overwrite=output.overwrite,
        console=messages(),
        **computing.how,
    )
    emit(json, result.as_json(), result.summary())
