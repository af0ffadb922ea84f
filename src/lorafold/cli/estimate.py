"""`lorafold estimate`: memory by term, whether it fits a device, and what would fit."""

import re
from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.alone import Alone
from lorafold.cli.columns import ColumnsOption, columns_of
from lorafold.cli.common import JsonOption, emit, messages
from lorafold.cli.groups import grouped
from lorafold.cli.pages import page_option
from lorafold.cli.recipe_options import RecipeFlags, of_recipe
from lorafold.cli.rewards import RewardAdapterOption, RewardOption, rewards_of
from lorafold.errors import LorafoldError
from lorafold.recipe.fields import OF_MEMORY, OF_ROWS

UNITS = {
    "K": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
EPILOG = """Modes. inference; full (every weight in fp32, AdamW); lora (on a base in bf16); qlora
(on a base in 4 bits); or the name of any method of `lorafold train` (on a base in 4 bits).
--storage chooses another storage of the base.

For a GPU, the estimate is the memory that torch's allocator has allocated to tensors at the peak of
a step. It assumes that 16-bit matrices are multiplied as they are, so every machine gives the same
number. CUDA's context, the scratch memory of kernels and fragmentation are not counted, so leave a
tenth of the device free. No estimate has been compared with a GPU yet.

With --device cpu, the estimate is for this machine, whose CPU may be faster with copies of 16-bit
matrices in fp32. Of training, it is the resident memory of the whole process without the libraries
that it imports: the term "process" is added to the tensors. --measure runs two real steps and
compares tensors alone, as torch's allocator counts them."""
EXAMPLES = (
    "lorafold estimate --params 7b --mode lora --device-memory 24GB",
    "lorafold estimate --model smollm2 --mode full --batch 4 --max-length 512",
    "lorafold estimate --params 70b --gpus 8 --device-memory 80GB",
)


@of_recipe((OF_MEMORY | OF_ROWS) - {"method"}, config=False)
class Flags(RecipeFlags):
    """The fields of the recipe on which memory depends."""


@grouped
def command(
    source: Alone,
    flags: Flags,
    params: Annotated[
        str | None,
        typer.Option(help="Instead of a model, a Llama of this size: 7b, 13b, 33b, 65b or 70b."),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="inference, full, lora, qlora, or the name of a method.")
    ] = "qlora",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Training rows, as for train: the estimate is that of the largest micro-batch of a"
            " run on them, whatever the objective.",
        ),
    ] = None,
    reward: RewardOption = None,
    reward_adapter: RewardAdapterOption = None,
    columns: ColumnsOption = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows computed at a time. Training packs rows up to max_length tokens at a time."
            " Without it 1, and with --data 8 rows of a step.",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help=(
                "Tokens of a row. For inference those of prompt and completion together. Without it"
                " 1,024, or as many as the model has positions."
            ),
        ),
    ] = None,
    labelled: Annotated[
        int | None,
        typer.Option(
            min=1, hidden=True, help="Tokens of a batch that count in the loss. Without it all."
        ),
    ] = None,
    gpus: Annotated[
        int,
        typer.Option(
            min=1,
            help="Devices that train together; the estimate is that of each, with --batch rows.",
        ),
    ] = 1,
    strategy: Annotated[
        str, typer.Option(help="What each of --gpus holds: its part (fsdp), or all (ddp).")
    ] = "fsdp",
    tflops: Annotated[
        float,
        typer.Option(
            min=1,
            hidden=True,
            help="What a device computes, in TFLOP/s, to say which bandwidth --gpus need.",
        ),
    ] = 400,
    device_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="The memory of a device, as in 24GB, to say whether it fits and what would.",
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Also load the model and run two real steps, to check the estimate.",
        ),
    ] = False,
    html: Annotated[
        Path | None, page_option("Also write the terms as a chart, in one HTML file.")
    ] = None,
    cheatsheet: Annotated[
        bool,
        typer.Option(
            "--cheatsheet",
            help="Print common rules of thumb next to estimates, in Markdown, and stop.",
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help=(
                "cpu estimates for this machine's CPU; without it for a GPU of CUDA. --measure runs"
                " on this device: cpu, cuda, cuda:N or mps; without it on the fastest that this"
                " machine has."
            )
        ),
    ] = None,
    compute_capability: Annotated[
        str | None,
        typer.Option(
            metavar="X.Y",
            help="Of the GPU, such as 7.5 of a T4; 8.0 or newer is assumed, which has flash"
            " attention.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Estimate the memory of training or inference from a model's configuration alone, without its
    weights.

    With --data, and --objective and its options as for train, the estimate is that of a run on
    these rows: of preferences, of a classifier, or of a policy with what draws its completions.
    """
    if cheatsheet:
        from lorafold.memory.cheatsheet import markdown

        return typer.echo(markdown())
    memory = None if device_memory is None else size(device_memory)
    recipe = flags.recipe()
    from lorafold.api.estimate import estimate
    from lorafold.memory.report import page

    found = estimate(
        source.model,
        mode,
        params=params,
        data=data or None,
        rewards=rewards_of(reward, reward_adapter),
        columns=columns_of(columns),
        batch=batch,
        max_length=max_length,
        labelled=labelled,
        recipe=recipe,
        gpus=gpus,
        strategy=strategy,
        tflops=tflops,
        device_memory=memory,
        measure=measure,
        device=device,
        compute_capability=compute_capability,
        console=messages(),
        **source.how,
    )
    if html:
        rows = f"{found.setting.batch} x {found.setting.length} tokens"
        title = f"{mode} of {params or source.model}, {rows if data is None else 'on its rows'}"
        page(found.estimate, title, html, found.remarks(), memory)
    emit(json, found.as_json(), str(found))


def size(text: str) -> int:
    """The bytes of a size such as 24GB, 24GiB or 500MB. Raises LorafoldError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if found is None or found[2] not in UNITS:
        bare = f"; did you mean {text}GB?" if re.fullmatch(r"[\d.]+", text) else ""
        expected = "expected a size as in 24GB or 24GiB"
        raise LorafoldError(f"--device-memory: found {text}, {expected}{bare}")
    return int(float(found[1]) * UNITS[found[2]])
