"""The commands that have no function in `lf`: quickstart, recipe, cache, doctor, serve new-key."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from shutil import which
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Unpack

from lorafold.api.options import Device, HubOptions, OnlyModel, Option, Progress, verb
from lorafold.errors import LorafoldError
from lorafold.files.cache import KINDS

if TYPE_CHECKING:
    from lorafold.recipe.recipe import Recipe
    from lorafold.training.finish import Trained


class Result(NamedTuple):
    json: dict[str, Any]
    text: str

    def as_json(self) -> dict[str, Any]:
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
) -> Result:
    """Train the embedded 135M model on a task that it can't do, in minutes on a laptop, without
    network access.

    A request such as "book a table for four at Chez Luigi on Friday at 8pm" becomes strict JSON.
    The model is evaluated on held-out rows before and after training. The adapter (in PEFT format),
    a merged plain model and the adapter for llama.cpp (GGUF, tested there if it is installed) are
    written to OUT.

    Args:
        overwrite: Replace the results of an earlier run in OUT.

    Examples:
        lorafold quickstart --out demo
        lorafold quickstart --out demo --overwrite
        lorafold quickstart --out again --device cpu --json
    """
    from lorafold.api.arguments import console_or_quiet
    from lorafold.files.templates import render_text
    from lorafold.files.terminal import paragraph
    from lorafold.quickstart.run import MODEL, PROMPT
    from lorafold.quickstart.run import quickstart as run

    story = run(Path(out), console_or_quiet(console), overwrite=overwrite, device=device)
    figures = [line for figure in story.meaning() for line in paragraph(figure, "- ")]
    text = render_text(
        "cli/after_quickstart.jinja", figures=figures, run=this_command(), model=MODEL,
        prompt=quote(PROMPT), quoted=lambda *names: quote(str(Path(out, *names))),
    )  # fmt: skip
    return Result(asdict(story), text)


def this_command() -> str:
    """Returns the command that runs this lorafold in the current directory: lorafold if that is on
    the PATH, or else its path as typed, or else this Python with -m lorafold.
    """
    typed_path, on_path = Path(sys.argv[0]), which("lorafold")
    if typed_path.name != "lorafold" or not typed_path.is_file():
        return f"{quote(sys.executable)} -m lorafold"
    return "lorafold" if on_path and typed_path.samefile(on_path) else quote(str(typed_path))


def after_training(
    result: "Trained", recipe: "Recipe", over: Sequence[str | Path]
) -> Iterator[str]:
    from lorafold.objectives import OBJECTIVES
    from lorafold.peft.config import CONFIG
    from lorafold.recipe.recipe import FEW

    if recipe.steps is None and not recipe.stops and result.steps < FEW:
        yield (
            f"steps: {result.steps}, which may be too few; if the results are poor, run the same"
            " command with --epochs auto --overwrite"
        )
    if not OBJECTIVES[recipe.objective].head and Path(result.adapter, CONFIG).is_file():
        adapters = " ".join(quote(str(path)) for path in (*over, result.adapter))
        yield f"chat with the adapter: {this_command()} chat {adapters}; eval measures it"


@verb
def recipe(
    source: Annotated[str | Path, Option(flag="--from")],
    *,
    out: str | Path | None = None,
    kind: str | None = None,
    overwrite: bool = False,
) -> tuple[Any, Path | None]:
    """Convert another tool's training configuration to a recipe for lorafold train --config.

    A report lists the fields that were copied, the fields that were changed and why, and the fields
    that a recipe does not have, with the option of lorafold train to use instead. For fields that
    the file does not set, the tool's defaults are written if they differ from lorafold's.
    The report goes to stderr, or with --json to stdout.

    Args:
        source: The configuration: a YAML file of axolotl, LLaMA-Factory, TRL, torchtune, ms-swift
            or mlx-lm, a shell script (.sh) that starts one of them, an Unsloth script or notebook
            (.py or .ipynb, which are parsed but not executed), or PEFT's adapter_config.json or its
            directory.
        out: The file for the recipe, in YAML. Default: stdout.
        kind: axolotl, llamafactory, trl-sft, trl-dpo, trl-kto, trl-orpo, trl-cpo, trl-reward,
            trl-grpo, trl-rloo, mlx-lm, torchtune, ms-swift, unsloth or peft. Default: detected
            from the command of a shell script or the file's keys.
        overwrite: Replace an existing recipe.

    Examples:
        lorafold recipe --from sft.yaml --out recipe.yaml
        lorafold recipe --from sft.py --kind unsloth
        lorafold recipe --from demo/adapter
    """
    from lorafold.config_import.translate import check_free, translate, write

    path = None if out is None else Path(out)
    if path is not None:
        check_free(path, overwrite)
    translation = translate(Path(source), kind)
    if path is not None:
        write(translation, path, overwrite)
    return translation, path


@verb
def cache(
    kind: Annotated[Sequence[str], Option(f"Only this kind: {', '.join(KINDS)}.")] = (),
    *,
    clear: bool = False,
) -> Result:
    """List the contents of lorafold's cache, or clear it.

    The cache contains, for example, unpacked embedded models (models), checked and tokenized
    training data (rows, tokens) and decompositions of base weights (svd). Removed entries are
    recomputed when they are needed; entries in use by a run are kept. The environment variable
    LORAFOLD_CACHE sets the directory.

    Args:
        clear: Remove the listed entries.

    Examples:
        lorafold lab cache
        lorafold lab cache --kind tokens
        lorafold lab cache --kind tokens --clear
    """
    from datetime import datetime

    from lorafold.files.cache import clear as remove
    from lorafold.files.cache import entries
    from lorafold.files.paths import cache_directory
    from lorafold.files.templates import render_text

    if unknown := [name for name in kind if name not in KINDS]:
        raise LorafoldError(f"--kind {unknown[0]}: expected one of {', '.join(KINDS)}")
    cached = [entry for entry in entries() if entry.kind in (kind or KINDS)]
    in_use = remove(cached) if clear else []
    total = sum(entry.bytes for entry in cached if entry not in in_use)
    result = {"directory": str(cache_directory()), "bytes": total, "cleared": clear}
    text = render_text(
        "cli/cache.jinja", entries=cached, busy=in_use, time=datetime.fromtimestamp, **result
    )
    entries_json = [asdict(entry) | {"path": str(entry.path)} for entry in cached]
    return Result({**result, "entries": entries_json}, text)


@verb
def doctor(model: OnlyModel = "smollm2", **base_options: Unpack[HubOptions]) -> Any:
    """Check this machine and this installation: problems, slow settings, and the model's chat
    template.

    It compares package versions with the supported ranges and imports each package, measures fp32
    and bf16 matmuls for about a second, and checks memory, GPUs, the embedded model, caches and the
    environment of training processes. Of the model, only the tokenizer is read: the tokens that end
    a turn, the start of a prompt, and the text that the template adds or leaves out. Lines marked
    with ! describe a problem and its solution. Nothing is changed or downloaded. The exit code is 1
    if something that lorafold needs is missing or broken, else 0.

    Examples:
        lorafold doctor
        lorafold doctor --model demo/merged
        lorafold doctor --json
    """
    from lorafold.doctor.report import diagnose

    return diagnose(str(model), **base_options)


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
    """Create a key for a tenant.

    The key is printed once; the file stores only its hash. A running server reloads the file when
    it changes; delete an entry to revoke its key.

    Args:
        tenant: The owner of the key.
        adapters: The adapters and aliases that the key may use, as a glob such as 'acme-*'.
            Default: all.
        keys: The file of keys, which is created if it does not exist.
        expires: How long the key is valid: 30d, 12h, or the last day in UTC, such as 2026-12-31.
        no_base: The key may not use the base model itself.
        tokens_per_minute: The tenant's maximum number of tokens per minute, including prompts.
        tokens_per_day: The tenant's maximum number of tokens per day (UTC).

    Examples:
        lorafold serve new-key acme
        lorafold serve new-key acme --adapters "acme-*" --expires 30d
        lorafold serve new-key trial --no-base --tokens-per-day 100000
    """
    from lorafold.serving.keys import new_key as make
    from lorafold.serving.keys import parse_expiry

    limit_options = {"tokens_per_minute": tokens_per_minute, "tokens_per_day": tokens_per_day}
    limits = {name: most for name, most in limit_options.items() if most is not None}
    fields: dict[str, object] = {"limits": limits} if limits else {}
    fields |= {"base": False} if no_base else {}
    fields |= {"expires": parse_expiry(expires)} if expires is not None else {}
    key = make(keys, tenant, adapters or ["*"], **fields)
    return key, f"{tenant}: key added to {keys}, which stores only its hash; save the key"
