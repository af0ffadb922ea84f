"""`lorafold merge`: a plain model out of a base and its adapters."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.common import (
    DeviceOption,
    JsonOption,
    ModelOption,
    OutOption,
    OverwriteOption,
    RevisionOption,
    SeedOption,
    TrustRemoteCodeOption,
    emit,
    messages,
)


class Rounding(StrEnum):
    auto = "auto"
    nearest = "nearest"
    stochastic = "stochastic"


def command(
    adapter: Annotated[
        list[Path],
        typer.Option(
            help=(
                "A saved adapter (PEFT's format); repeat the option to fold several, in this order."
            )
        ),
    ],
    out: OutOption,
    model: ModelOption = "smollm2",
    into: Annotated[
        str | None,
        typer.Option(
            help=(
                "original (the weights before they were packed), dequantized (those that it was"
                " trained on), nf4 or int8 (packed again). "
                "Without it what the adapter was trained on: dequantized if that was packed, else"
                " original."
            )
        ),
    ] = None,
    base: Annotated[
        str,
        typer.Option(help="How the base was held in training, where no record says: nf4, int8 ..."),
    ] = "auto",
    rounding: Annotated[
        Rounding,
        typer.Option(
            help="nearest, stochastic (right on average), or auto: what each tensor's update needs."
        ),
    ] = Rounding.auto,
    seed: SeedOption = 0,
    certificate: Annotated[
        bool,
        typer.Option(
            "--certificate/--no-certificate",
            help="Compare merged and adapted model on text; loads one after the other.",
        ),
    ] = True,
    probe: Annotated[
        str | None,
        typer.Option(help="Texts to compare on, a file as for train; built-in ones without it."),
    ] = None,
    allow_other_base: Annotated[
        bool,
        typer.Option(
            "--allow-other-base", help="Fold into a model that the adapter was not trained on."
        ),
    ] = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    json: JsonOption = False,
) -> None:
    """Fold adapters into their base: a plain Hugging Face model that runs at the base's speed and
    knows nothing of adapters.

    Works tensor by tensor, so that a model larger than the memory can be merged (with
    --no-certificate). OUT/merge.json holds the certificate: how far the merged model's answers lie
    from the adapted one's, and what the rounding did to the update.
    """
    from lorafold.merging.run import merge

    result = merge(
        model,
        adapter,
        out,
        into=into,
        base=base,
        rounding=rounding.value,
        seed=seed,
        certificate=certificate,
        probe=probe,
        allow_other_base=allow_other_base,
        overwrite=overwrite,
        revision=revision,
        trust_remote_code=trust_remote_code,
        device=device,
        console=messages(),
    )
    emit(json, result.as_json(), result.summary())
