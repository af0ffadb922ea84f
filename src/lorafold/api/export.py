"""`lf.export`: adapters or a model for another engine, proved in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.api.arguments import Paths, as_console, as_path, as_paths, missing
from lorafold.errors import LorafoldError
from lorafold.exporting import run
from lorafold.exporting.run import target_of
from lorafold.opening import base_for
from lorafold.peft.saved import open_all

if TYPE_CHECKING:
    from rich.console import Console


def export(
    model: str | Path | None = None,
    adapters: Paths = (),
    out: str | Path | None = None,
    *,
    to: str,
    tensors: str | None = None,
    as_lora: int | None = None,
    prove: bool = True,
    prompts: str | Path | None = None,
    engine_python: str | Path | None = None,
    engine_url: str | None = None,
    into: str | None = None,
    storage: str = "auto",
    allow_other_base: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
    console: Console | None = None,
) -> run.Exported:
    """Write saved adapters, or a model, in the form of another engine, and compare what that engine
    computes with what lorafold does. The directory appears whole or not at all.

    Args:
        model: The base, as `lf.load_model` takes it; None takes the one that the adapters say they
            were trained on.
        adapters: One saved adapter or several, lowest first.
        out: The directory to write.
        to: The engine or format, a key of `lorafold.exporting.run.TARGETS`.
        tensors: The type of the tensors, where the target has several; None is its first.
        as_lora: Write the best LoRA of this rank in place of what the adapters change.
        prove: Ask the engine for its answers to the prompts, in fp32 from lorafold.
        prompts: A file of rows with prompts; None takes 32 built-in ones.
        engine_python: The Python of another environment, which has the engine.
        engine_url: The URL of vLLM's server, which is asked instead and reads `out`'s disk.
        into: The weights that a whole model has: trained (those that the adapters were trained on,
            dequantized) or original (the base's before quantization). None is trained.
        storage: How the base stored its weights in training; auto takes it from the records.
        allow_other_base: Accept adapters whose fingerprint names another base.
        overwrite: Replace `out` if it exists.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        device: Where lorafold computes its own answers; None takes the fastest that is available.
        console: A rich console for progress and notices; None is quiet.

    Raises LorafoldError, with nothing written, for a model, adapter or `out` that can't be used,
    for what the target can't say, and if the engine computes something else than lorafold.
    """
    if out is None:
        raise missing("out")
    target_of(to)  # before anything is opened
    as_console(console)
    place = as_path(out)
    python = None if engine_python is None else str(as_path(engine_python, "engine_python"))
    if engine_url is not None and not isinstance(engine_url, str):
        raise LorafoldError(f"engine_url: found {engine_url!r}, expected a URL")
    asked = None if prompts is None else as_path(prompts, "prompts")
    found = open_all(as_paths(adapters))
    base = base_for(
        model,
        found,
        console,
        storage=storage,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
    )
    wanted = run.Wanted(to, tensors, as_lora, prove, asked, python, engine_url, overwrite, into)
    return run.export(base, found, place, wanted, console)
