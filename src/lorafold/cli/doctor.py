"""`lorafold doctor`: what this machine and this installation are, and what a chat template does."""

import typer

from lorafold.cli.alone import Alone
from lorafold.cli.common import JsonOption, emit
from lorafold.cli.groups import grouped

EXAMPLES = (
    "lorafold doctor",
    "lorafold doctor --model demo/merged",
    "lorafold doctor --json",
)


@grouped
def command(source: Alone, json: JsonOption = False) -> None:
    """What this machine and this installation are, what is wrong, what would be slow here, and
    what the model's chat template does.

    It reads versions against the ranges that lorafold declares and imports each package, measures
    fp32 and bf16 products for about a second, and looks at memory, GPUs, the embedded model,
    caches and the environment of processes that train. Of the model it reads the tokenizer alone:
    what ends a turn, what the prompt opens, what the template writes by itself and what it leaves
    out. A line marked with ! says what is wrong, and what to do. Nothing is changed or downloaded.
    The exit code is 1 where something that lorafold needs is missing or broken, else 0.
    """
    from lorafold.diagnosis.report import diagnose

    report = diagnose(source.model, **source.how)
    emit(json, report.as_json(), str(report))
    if report.broken:
        raise typer.Exit(1)
