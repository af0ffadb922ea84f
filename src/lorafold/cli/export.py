"""`lorafold export`: adapters or a model for another engine, proved in it."""

from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.common import (
    Adapters,
    AllowOtherOption,
    Computing,
    JsonOption,
    Output,
    TrainedStorageOption,
    emit,
    messages,
)
from lorafold.cli.groups import grouped

EXAMPLES = (
    "lorafold export demo/adapter --to peft --out for-peft",
    "lorafold export demo/adapter --to gguf --out for-llamacpp",
    "lorafold export demo/adapter --to ollama --tensors Q8_0 --out for-ollama",
)


@grouped
def command(
    adapters: Adapters,
    output: Output,
    computing: Computing,
    to: Annotated[
        str,
        typer.Option(
            help="The engine or format: peft, gguf or llama.cpp (the adapter), gguf-model or ollama"
            " (the whole model), vllm, sglang or mlx."
        ),
    ],
    tensors: Annotated[
        str | None,
        typer.Option(help="The type of the tensors, where there are several. Default: its first."),
    ] = None,
    as_lora: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Write the best LoRA of this rank in place of what the adapters change, and say"
            " what that loses.",
        ),
    ] = None,
    prove: Annotated[
        bool,
        typer.Option(
            "--proof/--no-proof",
            help="Ask the engine itself, and compare its answers with lorafold's in fp32.",
        ),
    ] = True,
    prompts: Annotated[
        str | None,
        typer.Option(help="Rows with prompts to compare on. Without it 32 built-in ones."),
    ] = None,
    engine_python: Annotated[
        Path | None,
        typer.Option(help="The Python of another environment, which has the engine."),
    ] = None,
    engine_url: Annotated[
        str | None,
        typer.Option(help="The URL of vLLM's server on this machine, which proves instead."),
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(
            help="The weights that a whole model has: trained (those that the adapters were trained"
            " on, dequantized) or original (the base's before quantization). Without it trained."
        ),
    ] = None,
    storage: TrainedStorageOption = "auto",
    allow_other_base: AllowOtherOption = False,
    json: JsonOption = False,
) -> None:
    """Write adapters, or a model, for another engine, and prove them there.

    The engine itself answers 32 prompts, and its probabilities of all tokens are compared with
    lorafold's: an engine that loads the files and ignores them, or reads them in another way, is
    found. OUT/export.json has the figures.
    """
    from lorafold.api.export import export

    result = export(
        computing.model,
        adapters.paths,
        output.out,
        to=to,
        tensors=tensors,
        as_lora=as_lora,
        prove=prove,
        prompts=prompts,
        engine_python=engine_python,
        engine_url=engine_url,
        into=into,
        storage=storage,
        allow_other_base=allow_other_base,
        overwrite=output.overwrite,
        console=messages(),
        **computing.how,
    )
    emit(json, result.as_json(), result.summary())
