"""`lorafold compose`: one adapter from many, and what they do to each other."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafold.cli.common import (
    BaseOption,
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
from lorafold.cli.loaded import AllowOtherBaseOption, load_adapted

if TYPE_CHECKING:
    from lorafold.data.rows import Row

EPILOG = """Ways to compose: linear (weighted average, exact); task-arithmetic (weighted sum, exact;
a negative weight takes a task away); svd (the average, cut to the largest rank); ties (keep each
matrix's largest fifth, elect signs, mean of those who agree); dare, dare-ties (drop a random half
and rescale, then average, or elect); magnitude (keep the largest fifth, average); lorahub (search
the weights on examples, without gradients); mixture (frozen adapters under gates that are trained:
--gates global, layer or token).

All but mixture give one LoRA. linear and task-arithmetic lay the factors end to end, so their rank
is the sum of the adapters'; --rank cuts it. The others make dense updates that an SVD brings back
to a rank: the error says how much was lost."""


class Gates(StrEnum):
    shared = "global"  # a keyword of Python's
    layer = "layer"
    token = "token"


def command(
    adapter: Annotated[
        list[Path],
        typer.Option(
            help="A saved adapter of additive updates (LoRA, VeRA, LoHa ...); repeat the option."
        ),
    ],
    out: OutOption,
    model: ModelOption = "smollm2",
    how: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "The way, see below; repeat it to compare several, each in OUT/WAY. Default:"
                " linear."
            )
        ),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(help="One for each adapter, in their order; without it the way's own."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Cut to this rank, at every site; without it the way's own."),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the entries that ties, dare and magnitude keep.")
    ] = None,
    gates: Annotated[
        Gates,
        typer.Option(
            help="What a mixture's gates depend on: nothing, the layer, or the token too."
        ),
    ] = Gates.shared,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Examples of a task, to measure interference on; repeat the option for each task."
        ),
    ] = None,
    examples: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "What lorahub and mixture learn from, a file for each task; without it half of the"
                " rows of each --data."
            )
        ),
    ] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="How many weights lorahub tries.")] = 40,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A recipe field for a mixture's training, as in --set steps=40."
        ),
    ] = None,
    answers: Annotated[
        bool, typer.Option(help="Generate answers for the exact match, or not.")
    ] = True,
    base: BaseOption = "auto",
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    allow_other_base: AllowOtherBaseOption = False,
    json: JsonOption = False,
) -> None:
    """Make one adapter from several, in the space of their weight updates, and measure what they do
    to each other.

    Ranks, target modules and methods may differ. With --data the base, each adapter alone and each
    composition are evaluated on every task, and the geometry of the updates (cosine, shared
    subspaces, sign conflict) says where the tasks collide.
    """
    from lorafold.composing.job import Request
    from lorafold.composing.mixture import RECIPE
    from lorafold.composing.run import compose
    from lorafold.step.reading import load_recipe

    console = messages()
    request = Request(
        model,
        tuple(adapter),
        tuple(how or ["linear"]),
        out,
        weights=tuple(weight or ()),
        rank=rank,
        density=density,
        seed=seed,
        tasks=rows_by_name(data),
        examples=rows_by_name(examples),
        recipe=load_recipe(None, sets or (), defaults=RECIPE),
        gates=gates.value,
        evaluations=evaluations,
        answers=answers,
        base=base,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
        overwrite=overwrite,
    )
    result = compose(
        request,
        lambda: load_adapted(
            model, adapter, base, device, revision, trust_remote_code, allow_other_base, console
        ),
        console,
    )
    emit(json, result.as_json(), str(result))


def rows_by_name(sources: list[str] | None) -> "dict[str, list[Row]]":
    """The rows of each file, by its short name."""
    from lorafold.composing.updates import names
    from lorafold.data.rows import read_rows

    return dict(zip(names(sources or []), map(read_rows, sources or []), strict=True))
