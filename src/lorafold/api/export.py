"""`lf.export`: write adapters or a model for another engine, and verify them there."""

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
    as_lora: opt.OptionalCount = None,
    prove: Annotated[bool, opt.Option(flag="--proof/--no-proof")] = True,
    prompts: Annotated[str | Path | None, opt.Option(kind=str)] = None,
    engine_python: str | Path | None = None,
    engine_url: str | None = None,
    into: str | None = None,
    overwrite: opt.Overwrite = False,
    console: opt.Progress = None,
    **base_options: Unpack[opt.TrainedBaseOptions],
) -> "Exported":
    """Write adapters, or a whole model, for another engine, and verify them there.

    If the engine is installed, it completes 32 prompts, and its probabilities of all tokens are
    compared with lorafold's. This detects an engine that loads the files but ignores or misreads
    them. OUT/export.json contains the figures. The directory appears only when it is complete.

    Args:
        to: The engine or format: peft, gguf or llama.cpp (the adapter), gguf-model or ollama (the
            whole model), vllm, sglang or mlx.
        tensors: The tensor type in a GGUF file, such as F16 or Q8_0. Default: F32 for an adapter,
            F16 for a model.
        as_lora: Write the best LoRA of this rank instead of the adapters' own changes, and report
            the loss.
        prove: Run the engine (llama.cpp for ollama, none for sglang) and compare its results with
            lorafold's in fp32.
        prompts: Rows whose prompts are used for the comparison. Default: 32 built-in prompts.
        engine_python: The Python of another environment in which the engine is installed.
        engine_url: The URL of a vLLM server on this machine to compare with.
        into: For a whole model, the weights to merge into: trained (the weights that the adapters
            were trained on, dequantized) or original (before quantization). Default: trained.

    Raises LorafoldError, with nothing written, for a model, adapter or `out` that can't be used,
    for something that the target can't express, and if the engine's results differ from lorafold's.

    Examples:
        lorafold export demo/adapter --to peft --out for-peft
        lorafold export demo/adapter --to gguf --out for-llamacpp
        lorafold export demo/adapter --to ollama --tensors Q8_0 --out for-ollama
    """
    from lorafold.api.arguments import as_path, console_or_quiet, missing_argument
    from lorafold.api.model_arguments import resolve_base
    from lorafold.exporting import run

    if out is None:
        raise missing_argument("out")
    run.target_of(to)  # before anything is opened
    console, out_path = console_or_quiet(console), as_path(out)
    python = None if engine_python is None else str(as_path(engine_python, "engine_python"))
    if engine_url is not None and not isinstance(engine_url, str):
        raise LorafoldError(f"engine_url: found {engine_url!r}, expected a URL")
    rows = None if prompts is None else as_path(prompts, "prompts")
    base, saved = resolve_base(model, adapters, console, **base_options)
    export_options = run.ExportOptions(
        to, tensors, as_lora, prove, rows, python, engine_url, overwrite, into
    )
    return run.export(base, saved, out_path, export_options, console)
