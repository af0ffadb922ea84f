"""`lf.export`: adapters or a model for another engine, proved in it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

from lorafold.api import options as opt
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from lorafold.exporting.run import Exported


@opt.verb
def export(
    model: opt.Model = None,
    adapters: opt.Adapters = (),
    out: opt.OutLast = None,
    *,
    to: str,
    tensors: str | None = None,
    as_lora: Annotated[int | None, opt.Option(min=1)] = None,
    prove: Annotated[bool, opt.Option(flag="--proof/--no-proof")] = True,
    prompts: Annotated[str | Path | None, opt.Option(kind=str)] = None,
    engine_python: str | Path | None = None,
    engine_url: str | None = None,
    into: str | None = None,
    overwrite: opt.Overwrite = False,
    console: opt.Progress = None,
    **opening: Unpack[opt.AsTrained],
) -> "Exported":
    """Write adapters, or a model, for another engine, and prove them there.

    The engine itself answers 32 prompts, and its probabilities of all tokens are compared with
    lorafold's: an engine that loads the files and ignores them, or reads them in another way, is
    found. OUT/export.json has the figures. The directory appears whole or not at all.

    Args:
        to: The engine or format: peft, gguf or llama.cpp (the adapter), gguf-model or ollama (the
            whole model), vllm, sglang or mlx.
        tensors: The type of the tensors, where there are several. Default: its first.
        as_lora: Write the best LoRA of this rank in place of what the adapters change, and say what
            that loses.
        prove: Ask the engine itself, and compare its answers with lorafold's in fp32.
        prompts: Rows with prompts to compare on. Default: 32 built-in ones.
        engine_python: The Python of another environment, which has the engine.
        engine_url: The URL of vLLM's server on this machine, which proves instead.
        into: The weights that a whole model has: trained (those that the adapters were trained on,
            dequantized) or original (the base's before quantization). Default: trained.

    Raises LorafoldError, with nothing written, for a model, adapter or `out` that can't be used,
    for what the target can't say, and if the engine computes something else than lorafold.

    Examples:
        lorafold export demo/adapter --to peft --out for-peft
        lorafold export demo/adapter --to gguf --out for-llamacpp
        lorafold export demo/adapter --to ollama --tensors Q8_0 --out for-ollama
    """
    from lorafold.api.arguments import as_console, as_path, as_paths, missing
    from lorafold.exporting import run
    from lorafold.exporting.run import target_of
    from lorafold.peft.saved import open_all
    from lorafold.resolve import base_for

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
    base = base_for(model, found, console, **opening)
    wanted = run.ExportOptions(
        to, tensors, as_lora, prove, asked, python, engine_url, overwrite, into
    )
    return run.export(base, found, place, wanted, console)
