"""`lorafold resize`: the best adapter of another rank."""

from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.common import (
    BaseOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    OutOption,
    OverwriteOption,
    RevisionOption,
    TrustRemoteCodeOption,
    emit,
    messages,
)
from lorafold.cli.loaded import AllowOtherBaseOption, load_adapted


def command(
    adapter: Annotated[
        Path,
        typer.Argument(
            help="A saved adapter (PEFT's format), of any method that changes matrices."
        ),
    ],
    out: OutOption,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="The rank of every site; fewer where an update has no more."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="Instead, the least rank at each site that holds this share, as in 0.95."
        ),
    ] = None,
    model: ModelOption = "smollm2",
    data: Annotated[
        str | None, typer.Option(help="Examples, as for train: the error in loss as well.")
    ] = None,
    max_length: Annotated[
        int, typer.Option(min=2, help="Longer rows are cut to this many tokens.")
    ] = 1024,
    overwrite: OverwriteOption = False,
    base: BaseOption = "auto",
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    allow_other_base: AllowOtherBaseOption = False,
    json: JsonOption = False,
) -> None:
    """Give an adapter another rank by singular value decomposition: no adapter of that rank lies
    nearer to it.

    The result is plain LoRA in PEFT's format, from whatever method. Error: the share of the
    update's (Frobenius) norm that is lost. `lorafold inspect` tells which rank would do.
    """
    from lorafold.data.rows import read_rows
    from lorafold.errors import LorafoldError
    from lorafold.inspecting.loss import losses_of
    from lorafold.inspecting.resize import resize
    from lorafold.models.sources import resolve_model

    if (rank is None) == (energy is None):
        raise LorafoldError("expected either --rank or --energy")
    if energy is not None and not 0 < energy <= 1:
        raise LorafoldError(f"--energy {energy}: expected a share above 0, at most 1")
    rows = None if data is None else read_rows(data)
    result = resize(
        resolve_model(model, revision),
        adapter,
        out,
        rank=rank,
        energy=energy,
        overwrite=overwrite,
        allow_other_base=allow_other_base,
        trust_remote_code=trust_remote_code,
    )
    found, text = result.as_json(), str(result)
    if rows is not None:
        loaded, tokenizer = load_adapted(
            model,
            [adapter, out],
            base,
            device,
            revision,
            trust_remote_code,
            allow_other_base,
            messages(),
        )
        found |= losses_of(loaded, tokenizer, rows, max_length)
        text += f"\n  loss {found['loss_before']:.4f} before, {found['loss_after']:.4f} after"
    emit(json, found, text)
