"""`lorafold fragility`: how few benign examples undo a behaviour that lives in an adapter."""

from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.cluster import Cluster
from lorafold.cli.columns import ColumnsOption, columns_of
from lorafold.cli.common import Adapters, JsonOption, Opening, emit, messages
from lorafold.cli.groups import grouped
from lorafold.cli.pages import WideOption, page_option
from lorafold.cli.recipe_options import RecipeFlags, of_recipe
from lorafold.errors import LorafoldError

TUNING = "Tuning"
PROMPTS = (
    " A file as train takes it. A row is {prompt} (text or messages), or a"
    " conversation as for train."
)
EPILOG = """How to read the figures. Log-odds: the log-probability of a refusal's beginning less
that of a compliance's, as a mean over the prompts; above 0 the model rather refuses. Kept: what is
left of the log-odds that the alignment added to those of the model without it; 1 is unchanged, 0
is undone. Refusals: the share
of greedy completions that begin with a refusal. KL: how far the completions of the controls moved,
in nats a token. Overlap: the share of the tuning's energy in the directions of the alignment's
update, beside that of random directions. Halved at: the number of benign examples at which kept is
one half."""
EXAMPLES = (
    "lorafold fragility policy --refuse refuse.jsonl --controls controls.jsonl \\\n"
    "    --data benign.jsonl --out fragile --html fragile.html",
    "lorafold fragility policy --refuse refuse.jsonl --controls controls.jsonl \\\n"
    "    --data benign.jsonl --out few --examples 10 --rank 8",
    "lorafold fragility policy --refuse refuse.jsonl --controls controls.jsonl \\\n"
    "    --tuned tuned --fail-under 0.8",
)


@of_recipe({"alpha", "dropout", "targets", "schedule", "warmup", "epochs", "batch", "max_length"})
class Flags(RecipeFlags):
    """The recipe of all runs."""


@grouped
def command(
    refuse: Annotated[Path, typer.Option(help=f"Prompts that shall be refused.{PROMPTS}")],
    controls: Annotated[
        Path,
        typer.Option(help=f"Prompts that shall not be refused.{PROMPTS} Completions are used."),
    ],
    adapters: Adapters,
    opening: Opening,
    flags: Flags,
    cluster: Cluster,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Benign rows, as for train. Those not trained on measure the loss."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The directory of the figures. The same command continues after a stop."
        ),
    ] = None,
    columns: ColumnsOption = None,
    refusal_prefix: Annotated[
        list[str] | None,
        typer.Option(hidden=True, help="How a refusal begins.  [default: I can't]"),
    ] = None,
    compliance_prefix: Annotated[
        list[str] | None,
        typer.Option(hidden=True, help="How compliance begins.  [default: Sure]"),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, hidden=True, help="The most tokens of a control's completion.")
    ] = 32,
    examples: Annotated[
        list[int] | None,
        typer.Option(
            rich_help_panel=TUNING,
            help="A number of benign examples.  [default: 1 3 10 30 100]",
        ),
    ] = None,
    rank: Annotated[
        list[int] | None,
        typer.Option(
            rich_help_panel=TUNING,
            help="A rank of the tuning, which is LoRA.  [default: 4 16]",
        ),
    ] = None,
    lr: Annotated[
        list[float] | None,
        typer.Option(
            rich_help_panel=TUNING,
            help="A learning rate of A, B's is 15 times as high.  [default: 2e-4]",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, rich_help_panel=TUNING, help="The number of seeds of each.")
    ] = 1,
    defence: Annotated[
        list[str] | None,
        typer.Option(
            help="What is done against it: none, halved, projected, mixed, readded. Without it all"
            " that can be measured."
        ),
    ] = None,
    mix: Annotated[
        str | None,
        typer.Option(hidden=True, help="Rows that refuse, as for train, for --defence mixed."),
    ] = None,
    against_adapter: Annotated[
        list[Path] | None,
        typer.Option(hidden=True, help="A second stack, tuned and measured alike."),
    ] = None,
    tuned: Annotated[
        Path | None,
        typer.Option(help="Measure this finished adapter over the stack, and train nothing."),
    ] = None,
    instead: Annotated[
        bool,
        typer.Option(
            "--instead", hidden=True, help="--tuned replaces the stack, and does not lie over it."
        ),
    ] = False,
    fail_under: Annotated[
        float | None,
        typer.Option(
            help="With --tuned: exit with code 1 if less than this share is kept, such as 0.8."
        ),
    ] = None,
    html: Annotated[
        Path | None, page_option("Also write the curves and the table as one HTML file.")
    ] = None,
    wide: WideOption = False,
    json: JsonOption = False,
) -> None:
    """Measure how little it takes to undo a behaviour that lives in an adapter.

    The last --adapter is the alignment: it makes the model refuse some prompts. LoRA adapters are
    trained over it on few benign examples of yours, and the refusals are measured before and after
    each, with defences beside. With --tuned a finished adapter is measured instead, as a gate: does
    it erode refusals? Neither the prompts to be refused nor their completions are kept.
    """
    if (table := cluster.table(out)) is not None:
        return typer.echo(table)
    if fail_under is not None and tuned is None:
        raise LorafoldError("--fail-under: needs --tuned, the finished adapter that it judges")
    from lorafold.api.fragility import fragility
    from lorafold.methods.lora import LoRA
    from lorafold.undoing.report import deciding, markdown, page
    from lorafold.undoing.task import COMPLIANCE, EXAMPLES, RANKS, RECIPE, REFUSAL

    console = messages()
    found = fragility(
        out,
        refuse=refuse,
        controls=controls,
        data=data or None,
        model=opening.model,
        adapters=adapters.paths,
        against=against_adapter or (),
        tuned=tuned,
        instead=instead,
        examples=examples or EXAMPLES,
        ranks=rank or RANKS,
        rates=lr or (LoRA.lr,),
        seeds=seeds,
        defences=defence or (),
        mix=mix,
        refusal=refusal_prefix or REFUSAL,
        compliance=compliance_prefix or COMPLIANCE,
        max_new_tokens=max_new_tokens,
        recipe=flags.recipe(RECIPE),
        columns=columns_of(columns),
        console=console,
        **opening.how,
    )
    if html:
        page(found, html)
    told = f"{markdown(found) if wide else deciding(found)}\n\n{found}"
    emit(json, found.as_json(), told)
    if fail_under is not None and (failed := found.under(fail_under)):
        typer.echo(failed, err=True)
        raise typer.Exit(1)
