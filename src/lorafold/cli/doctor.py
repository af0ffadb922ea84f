"""`lorafold doctor`: what this machine and this installation are."""

import typer

from lorafold.cli.common import JsonOption, emit


def command(json: JsonOption = False) -> None:
    """What this machine and this installation are, what is wrong, and what would be slow here.

    It reads versions against the ranges that lorafold declares and imports each package, measures
    fp32 and bf16 products for about a second, and looks at memory, GPUs, the embedded model,
    caches and the environment of processes that train. A line marked with ! says what is wrong,
    and what to do. Nothing is changed or downloaded. The exit code is 1 where something that
    lorafold needs is missing or broken, else 0.
    """
    from lorafold.diagnosis.report import diagnose

    report = diagnose()
    emit(json, report.as_json(), str(report))
    if report.broken:
        raise typer.Exit(1)
