"""`lorafold recipe`: a recipe out of another tool's training configuration."""

from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.common import JsonOption, emit

EXAMPLES = (
    "lorafold recipe --from sft.yaml --out recipe.yaml",
    "lorafold recipe --from sft.py --kind unsloth",
    "lorafold recipe --from demo/adapter",
)


def command(
    source: Annotated[
        Path,
        typer.Option(
            "--from",
            help=(
                "The configuration: a YAML file of axolotl, LLaMA-Factory, TRL or mlx-lm, a"
                " script of Unsloth (.py, which is read and not executed), or PEFT's"
                " adapter_config.json or a directory with it."
            ),
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where the recipe goes, as YAML; without it, to stdout.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="axolotl, llamafactory, trl-sft, trl-dpo, trl-kto, trl-orpo, trl-cpo, trl-reward,"
            " trl-grpo, trl-rloo, mlx-lm, unsloth or peft; without it the file's keys tell which."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a recipe that is there.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Translate another tool's training configuration into a recipe for lorafold train --config.

    A report says of every field what was taken, what was taken differently and why, and what a
    recipe can't say, with the option of lorafold train that does it. What the file leaves out has
    that tool's default, which is written where it differs from lorafold's. The report goes to
    stderr, or with --json to stdout as an object.
    """
    from lorafold.translating.run import check_free, translate, write

    if out is not None:
        check_free(out, overwrite)
    translation = translate(source, kind)
    if out is not None:
        write(translation, out, overwrite)
    config = "recipe.yaml" if out is None else str(out)
    if not json:
        typer.echo(translation.report(config), err=True)
    text = translation.to_yaml(config).rstrip("\n") if out is None else f"recipe: {out}"
    emit(json, translation.as_json() | {"out": None if out is None else str(out)}, text)
