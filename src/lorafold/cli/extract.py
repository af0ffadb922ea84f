"""`lorafold extract`: an adapter out of a fully fine-tuned model and its base."""

from typing import Annotated

import typer

from lorafold.cli.common import JsonOption, OutOption, OverwriteOption, TrustRemoteCodeOption, emit


def command(
    tuned: Annotated[str, typer.Option(help="The fine-tuned model: a directory or a hub id.")],
    out: OutOption,
    rank: Annotated[int, typer.Option(min=1, help="The rank of every site.")],
    base: Annotated[
        str,
        typer.Option(
            help="The model that it was tuned from: smollm2 (embedded), a directory or a hub id."
        ),
    ] = "smollm2",
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    json: JsonOption = False,
) -> None:
    """Make a LoRA adapter of what fine-tuning did to a model: the best one of that rank, for every
    linear of the blocks.

    Works tensor by tensor, so that models larger than the memory will do. What else differs (norms,
    embeddings) is named and left out.
    """
    from lorafold.inspecting.resize import extract
    from lorafold.models.sources import resolve_model

    result = extract(
        resolve_model(base),
        resolve_model(tuned),
        out,
        rank=rank,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    emit(json, result.as_json(), str(result))
