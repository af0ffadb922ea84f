"""`lorafold estimate`: will it fit, and if not, what would make it fit."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from lorafold.cli.common import (
    JsonOption,
    ModelOption,
    RevisionOption,
    TrustRemoteCodeOption,
    emit,
    messages,
)
from lorafold.errors import LorafoldError
from lorafold.step.reading import load_recipe

UNITS = {
    "": 1,
    "K": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
EPILOG = """Modes: inference; full (every weight in fp32, AdamW); lora (over a base in bf16); qlora
(over a base in 4 bits); or any method of `lorafold train` by its word, over a base in 4 bits.
--base says otherwise.

Counted is what torch's allocator gives out at the peak of a step that multiplies 16-bit matrices
as they are, as accelerators do: the same number on every machine that asks. --device cpu and
--measure ask about this machine, whose CPU may be faster with copies of them in fp32. Else the step
is a CPU's; none was measured on a GPU yet. The process itself, kernels' scratch and gaps between
blocks come on top: leave a tenth of the device free."""


def command(
    model: ModelOption = "smollm2",
    params: Annotated[
        str | None,
        typer.Option(help="A Llama by its size instead of a model: 7b, 13b, 33b, 65b or 70b."),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="inference, full, lora, qlora, or a method's word.")
    ] = "qlora",
    batch: Annotated[
        int,
        typer.Option(
            min=1,
            help="Rows computed at a time. Training packs rows up to max_length tokens at a time.",
        ),
    ] = 1,
    seq: Annotated[
        int, typer.Option(min=2, help="Tokens of a row; for inference, prompt and answer together.")
    ] = 1024,
    base: Annotated[
        str | None, typer.Option(help="How the base's weights are held: nf4, int8, bf16 or fp32.")
    ] = None,
    labelled: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a batch that count in the loss; without it all."),
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw (fp32 state), adamw8bit or paged-adamw8bit.")
    ] = None,
    gradient_checkpointing: Annotated[str | None, typer.Option(help="on or off.")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="A recipe field of the method, as in --set rank=64."),
    ] = None,
    device_memory: Annotated[
        str | None, typer.Option(help="What there is, as in 24GB: the verdict, and what would fit.")
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Also load the model and run two real steps: measured beside estimated.",
        ),
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Also write a self-contained page with the stack by term.")
    ] = None,
    cheatsheet: Annotated[
        bool,
        typer.Option(
            "--cheatsheet",
            help="Print the usual rules of thumb beside estimates, in Markdown, and stop.",
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help=(
                "cpu: this machine's own. --measure runs on it, or on cuda, cuda:N or mps; without"
                " it on the fastest kind that is there."
            )
        ),
    ] = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    json: JsonOption = False,
) -> None:
    """Estimate the memory of training or inference from a model's configuration alone, without its
    weights.
    """
    if cheatsheet:
        from lorafold.memory.cheatsheet import markdown

        return typer.echo(markdown())
    memory = None if device_memory is None else size(device_memory)
    if measure and params is not None:
        raise LorafoldError(
            f"--measure: needs a model with weights, and --params {params} is a shape alone;"
            " expected --model"
        )
    recipe = load_recipe(
        None,
        sets or (),
        base=base,
        optimizer=optimizer,
        gradient_checkpointing=gradient_checkpointing,
    )
    from dataclasses import asdict, replace

    from lorafold.machine.devices import choose_device
    from lorafold.memory.advice import advise
    from lorafold.memory.measure import measure as measured
    from lorafold.memory.modes import llama, setting_of
    from lorafold.memory.report import about, bars, beside, page, verdict
    from lorafold.memory.terms import estimate
    from lorafold.models.configuration import configuration
    from lorafold.models.loading import load_model
    from lorafold.ops.arithmetic import widens

    asked = setting_of(mode, recipe, batch, seq, labelled)
    config = configuration(model, revision, trust_remote_code) if params is None else llama(params)
    on = choose_device(device) if measure else None
    here = (device if on is None else on.type) == "cpu"
    if here:
        asked = replace(asked, widened=widens(asked.base.dtype))
    found = estimate(config, asked)
    result: dict[str, Any] = {"total": found.total, **found.terms, "fits": None}
    said = [about(asked)] * here
    if memory is not None:
        with messages().status("looking for what fits: some twenty settings are traced"):
            advice = advise(config, asked, memory)
        result |= {
            f"largest_{k}" if k in ("batch", "length") else k: v for k, v in asdict(advice).items()
        }
        said += verdict(advice, asked)
    if on is not None:
        with messages().status("two real steps"):
            result["measured"] = measured(
                lambda: load_model(model, asked.base, on, revision, trust_remote_code), asked, on
            )
        said.append(beside(found, result["measured"]))
    if html:
        page(found, f"{mode} of {params or model}, {batch} x {seq} tokens", html, said, memory)
    emit(json, result, "\n".join([*bars(found), *said]))


def size(text: str) -> int:
    """Bytes of 24GB, 24GiB or 500MB. LorafoldError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if found is None or found[2] not in UNITS:
        raise LorafoldError(f"--device-memory {text}: expected a size, as in 24GB or 24GiB")
    return int(float(found[1]) * UNITS[found[2]])
