"""The commands that are no verbs of Python: the first run, recipes of other tools, what is wrong
with an installation, and keys of a server.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, NamedTuple, Unpack

from lorafold.api.options import Device, Hub, OnlyModel, Option, Progress, verb


class Told(NamedTuple):
    """A result: its JSON, and its text for people."""

    json: dict[str, Any]
    text: str

    def as_json(self) -> dict[str, Any]:
        """Its JSON."""
        return self.json

    def __str__(self) -> str:
        return self.text


@verb
def quickstart(
    out: Annotated[str | Path, Option("The directory for data, adapter and merged model.")] = Path(
        "quickstart"
    ),
    *,
    overwrite: bool = False,
    console: Progress = None,
    device: Device = None,
) -> Told:
    """Train the embedded model, of 135M parameters, on a task that it can't do: in minutes on a
    laptop, without network.

    A request such as "book a table for four at Chez Luigi on Friday at 8pm" becomes strict JSON.
    The model is evaluated on unseen rows before and after, and the adapter (in PEFT's format), a
    merged plain model and the adapter for llama.cpp (GGUF), proved there, are written to OUT.

    Args:
        overwrite: Replace what an earlier run wrote to OUT.

    Examples:
        lorafold quickstart --out demo
        lorafold quickstart --out demo --overwrite
        lorafold quickstart --out again --device cpu --json
    """
    from lorafold.api.arguments import or_quiet
    from lorafold.files.terminal import paragraph
    from lorafold.quickstart.story import quickstart as told

    story = told(Path(out), or_quiet(console), overwrite=overwrite, device=device)
    figures = [line for figure in story.meaning() for line in paragraph(figure, "- ")]
    return Told(asdict(story), "\n".join([*figures, "", *_next(Path(out))]))


def _next(out: Path) -> Iterator[str]:
    """What to do next: commands that can be pasted as they stand, one a line."""
    from lorafold.cli.next_commands import this_command
    from lorafold.quickstart.story import MODEL, PROMPT

    run, adapter = this_command(), quote(str(out / "adapter"))
    merged, train, test = (
        quote(str(out / name)) for name in ("merged", "train.jsonl", "test.jsonl")
    )
    mine = quote(str(out / "mine"))
    yield "Ask the merged model, measure the adapter, see what training sees, train again:"
    yield f"{run} generate --model {merged} --system JSON --prompt {quote(PROMPT)}"
    yield f"{run} eval --model {MODEL} --adapter {adapter} --data {test}"
    yield f"{run} train --model {MODEL} --data {train} --out {mine} --preview"
    yield f"{run} train --model {MODEL} --data {train} --out {mine} --rank 8 --steps 20"
    yield 'Ask it for "a table for four at Chez Luigi on Friday at 8pm", beside the base:'
    yield f"{run} serve --model {MODEL} --adapters {quote(str(out))} --open"


@verb
def recipe(
    source: Annotated[str | Path, Option(flag="--from")],
    *,
    out: str | Path | None = None,
    kind: str | None = None,
    overwrite: bool = False,
) -> tuple[Any, Path | None]:
    """Translate another tool's training configuration into a recipe for lorafold train --config.

    A report says of every field what was taken, what was taken differently and why, and what a
    recipe can't say, with the option of lorafold train that does it. What the file leaves out has
    that tool's default, which is written where it differs from lorafold's. The report goes to
    stderr, or with --json to stdout as an object.

    Args:
        source: The configuration: a YAML file of axolotl, LLaMA-Factory, TRL or mlx-lm, a script of
            Unsloth (.py, which is read and not executed), or PEFT's adapter_config.json or a
            directory with it.
        out: Where the recipe goes, as YAML; without it, to stdout.
        kind: axolotl, llamafactory, trl-sft, trl-dpo, trl-kto, trl-orpo, trl-cpo, trl-reward,
            trl-grpo, trl-rloo, mlx-lm, unsloth or peft; without it the file's keys tell which.
        overwrite: Replace a recipe that is there.

    Examples:
        lorafold recipe --from sft.yaml --out recipe.yaml
        lorafold recipe --from sft.py --kind unsloth
        lorafold recipe --from demo/adapter
    """
    from lorafold.config_import.run import check_free, translate, write

    place = None if out is None else Path(out)
    if place is not None:
        check_free(place, overwrite)
    translation = translate(Path(source), kind)
    if place is not None:
        write(translation, place, overwrite)
    return translation, place


@verb
def doctor(model: OnlyModel = "smollm2", **opening: Unpack[Hub]) -> Any:
    """What this machine and this installation are, what is wrong, what would be slow here, and
    what the model's chat template does.

    It reads versions against the ranges that lorafold declares and imports each package, measures
    fp32 and bf16 products for about a second, and looks at memory, GPUs, the embedded model,
    caches and the environment of processes that train. Of the model it reads the tokenizer alone:
    what ends a turn, what the prompt opens, what the template writes by itself and what it leaves
    out. A line marked with ! says what is wrong, and what to do. Nothing is changed or downloaded.
    The exit code is 1 where something that lorafold needs is missing or broken, else 0.

    Examples:
        lorafold doctor
        lorafold doctor --model demo/merged
        lorafold doctor --json
    """
    from lorafold.doctor.report import diagnose

    return diagnose(str(model), **opening)


@verb
def new_key(
    tenant: Annotated[str, Option(flag="TENANT")],
    *,
    adapters: Annotated[Sequence[str], Option(kind=list[str])] = (),
    keys: Path = Path("keys.json"),
    expires: str | None = None,
    no_base: bool = False,
    tokens_per_minute: Annotated[int | None, Option(min=1)] = None,
    tokens_per_day: Annotated[int | None, Option(min=1)] = None,
) -> tuple[str, str]:
    """Make a key for a tenant.

    It is printed once, and the file keeps its hash. A running server reads the file again when it
    changes; delete an entry to revoke its key.

    Args:
        tenant: Whose key it is.
        adapters: The adapters and aliases that the key may use, as a glob such as 'acme-*'.
            Default: all.
        keys: The file of keys, which is made if there is none.
        expires: How long it holds: 30d, 12h, or the last day by UTC as 2026-12-31.
        no_base: The key may not use the base itself.
        tokens_per_minute: The most tokens of the tenant in a minute, of prompts too.
        tokens_per_day: The most tokens of the tenant on a day, by UTC.

    Examples:
        lorafold serve new-key acme
        lorafold serve new-key acme --adapters "acme-*" --expires 30d
        lorafold serve new-key trial --no-base --tokens-per-day 100000
    """
    from lorafold.serving.keys import new_key as make
    from lorafold.serving.keys import until

    given = {"tokens_per_minute": tokens_per_minute, "tokens_per_day": tokens_per_day}
    limits = {name: most for name, most in given.items() if most is not None}
    more: dict[str, object] = {"limits": limits} if limits else {}
    more |= {"base": False} if no_base else {}
    more |= {"expires": until(expires)} if expires is not None else {}
    made = make(keys, tenant, adapters or ["*"], **more)
    return made, f"{tenant}: written to {keys}; the key itself is kept nowhere"
