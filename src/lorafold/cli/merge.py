"""`lorafold merge`: a plain model out of a base and its adapters."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.common import (
    BASE,
    STORAGES,
    DeviceOption,
    JsonOption,
    Output,
    SeedOption,
    Source,
    emit,
    messages,
)
from lorafold.cli.groups import grouped


class Rounding(StrEnum):
    """How folded weights are rounded to the model's dtype."""

    auto = "auto"
    nearest = "nearest"
    stochastic = "stochastic"


@grouped
def command(
    adapter: Annotated[
        list[Path],
        typer.Option(
            help="A saved adapter in PEFT's format. Repeat the option to fold several, in order."
        ),
    ],
    output: Output,
    source: Source,
    into: Annotated[
        str | None,
        typer.Option(
            help=(
                "The weights to fold into: original (the base's own, before quantization),"
                " dequantized (those that the adapter was trained on), nf4 or int8 (quantized"
                " again). Without it dequantized if it was trained on a quantized base, else"
                " original."
            )
        ),
    ] = None,
    base: Annotated[
        str,
        typer.Option(
            rich_help_panel=BASE,
            help=f"How the base stored its weights in training, if no record says: {STORAGES}.",
        ),
    ] = "auto",
    rounding: Annotated[
        Rounding,
        typer.Option(
            help=(
                "nearest; stochastic, which is right on average; or auto, which takes stochastic"
                " for the tensors whose update rounding to nearest would lose."
            )
        ),
    ] = Rounding.auto,
    seed: SeedOption = 0,
    certificate: Annotated[
        bool,
        typer.Option(
            help="Compare merged and adapted model on text. Each is loaded once, one at a time.",
        ),
    ] = True,
    probe: Annotated[
        str | None,
        typer.Option(help="Rows to compare on, a file as for train. Without it built-in texts."),
    ] = None,
    allow_other_base: Annotated[
        bool,
        typer.Option(
            "--allow-other-base",
            rich_help_panel=BASE,
            help="Fold into a model that the adapter was not trained on.",
        ),
    ] = False,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Fold adapters into their base: a plain Hugging Face model that runs at the base's speed and
    needs no adapter library.

    One tensor is held at a time, so that models larger than the memory can be merged (with
    --no-certificate). OUT/merge.json holds the certificate: how far the merged model's output lies
    from the adapted one's, and what rounding did to the update.
    """
    from lorafold.merging.run import merge

    result = merge(
        source.model,
        adapter,
        output.out,
        into=into,
        storage=base,
        rounding=rounding.value,
        seed=seed,
        certificate=certificate,
        probe=probe,
        allow_other_base=allow_other_base,
        overwrite=output.overwrite,
        device=device,
        console=messages(),
        **source.how,
    )
    emit(json, result.as_json(), result.summary())
