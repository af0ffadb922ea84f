"""`lorafold compare`: every method on your model and data."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lorafold.cli.alone import ComputingAlone
from lorafold.cli.cluster import Cluster
from lorafold.cli.columns import ColumnsOption, columns_of
from lorafold.cli.common import HeldOutOption, JsonOption, OptionalDataOption, emit, messages
from lorafold.cli.groups import grouped
from lorafold.cli.pages import WideOption, page_option
from lorafold.cli.recipe_options import RecipeFlags, of_recipe
from lorafold.cli.rewards import RewardAdapterOption, RewardOption, rewards_of
from lorafold.errors import LorafoldError
from lorafold.recipe.reading import parse_yaml
from lorafold.recipe.recipe import Recipe

VaryOption = Annotated[
    list[str] | None,
    typer.Option(
        "--vary",
        metavar="FIELD=VALUE,VALUE",
        help="A field of the recipe and the values to try, as in rank=8,32 or"
        " options.init=kaiming,gaussian; values are YAML, as in"
        " targets=all-linear,[q_proj,v_proj].",
    ),
]
EXAMPLES = (
    "lorafold compare --out compared",
    "lorafold compare --out two --methods lora,dora --data demo/train.jsonl",
    "lorafold compare --out rates --methods lora --vary lr=1e-4,4e-4 --seeds 3",
)


def varied(pairs: list[str] | None) -> dict[str, list[Any]]:
    """The values by their field. LorafoldError for what is no FIELD=VALUE,VALUE."""
    found: dict[str, list[Any]] = {}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        name = name.strip()
        if not name or not equals or name in found:
            raise LorafoldError(
                f"--vary {pair}: expected FIELD=VALUE,VALUE, each field once, as in rank=8,32"
            )
        found[name] = parse_yaml(f"[{text}]", f"--vary {pair}")
    return found


@of_recipe(Recipe.model_fields.keys() - {"method", "seed"})
class Flags(RecipeFlags):
    """The recipe of all runs."""


@grouped
def command(
    out: Annotated[
        Path,
        typer.Option(help="The directory of the figures. The same command continues after a stop."),
    ],
    flags: Flags,
    cluster: Cluster,
    computing: ComputingAlone,
    data: OptionalDataOption = None,
    eval_data: HeldOutOption = None,
    reward: RewardOption = None,
    reward_adapter: RewardAdapterOption = None,
    columns: ColumnsOption = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,NAME",
            help="The methods, as in lora,dora. Without it all that can learn the objective.",
        ),
    ] = None,
    vary: VaryOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each line; a verdict needs 3.")] = 1,
    html: Annotated[
        Path | None, page_option("Also write the table with plots as one HTML file.")
    ] = None,
    wide: WideOption = False,
    json: JsonOption = False,
) -> None:
    """Train every method on the same data with the same budget, and measure what the choice between
    them depends on.

    The table has the figures that decide: the held-out loss, how far it is from that of the base
    (which is the first line), forgetting on text outside the task, peak memory, seconds and trained
    parameters. Only --wide, --json and the page have adapter size, tokens/s, exact match, latency
    attached and merged relative to the base, whether the method can be merged (proved by folding),
    and whether it adds modules. A best method is named only where the rows, in pairs, and at least
    three seeds tell it from all others. Texts with labels need --objective classify. Unless the
    recipe sets a learning rate, each method has its own.

    --vary tries several values of a setting, as in --vary rank=8,32, and of several settings every
    combination. One half of the held-out rows chooses the best setting, and the other half gives
    its loss.

    Policies (--objective grpo, with --reward) draw as many completions each, and are compared by
    the reward of held-out prompts.
    """
    if (table := cluster.table(out)) is not None:
        return typer.echo(table)
    from lorafold.api.compare import compare
    from lorafold.comparing.report import deciding, page
    from lorafold.quickstart.story import RECIPE

    console = messages()
    found = compare(
        out,
        model=computing.model,
        data=data,
        eval_data=eval_data,
        rewards=rewards_of(reward, reward_adapter),
        columns=columns_of(columns),
        methods=[name.strip() for names in methods or () for name in names.split(",")],
        vary=varied(vary),
        seeds=seeds,
        recipe=flags.recipe(None if data else RECIPE),
        console=console,
        **computing.how,
    )
    if html:
        page(found.rows, f"Methods on {found.model}, {found.source}", html)
    emit(json, found.as_json(), str(found) if wide else deciding(found.rows))
