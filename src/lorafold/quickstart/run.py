"""The steps of `lorafold quickstart`: evaluate, train, evaluate, inspect, merge, export.

They must work without network access and without a GPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table

from lorafold.adapter import load
from lorafold.errors import LorafoldError
from lorafold.evaluation import Evaluation, evaluate
from lorafold.exporting import run as exporting
from lorafold.files.atomic import check_out
from lorafold.files.templates import render_text
from lorafold.files.terminal import keeping_details, print_lines
from lorafold.inspecting.inspect import inspect
from lorafold.inspecting.report import page
from lorafold.kernels.registry import TRAINING, enable
from lorafold.merging.run import MergeOptions, merge
from lorafold.models.loading import load_model
from lorafold.models.quantizations import Storage, choose_storage
from lorafold.models.tokenizer import load_tokenizer
from lorafold.ops.arithmetic import widens
from lorafold.peft.adapter_directory import open_all
from lorafold.quickstart.task import rows
from lorafold.recipe.recipe import Recipe
from lorafold.resolve import Base
from lorafold.runtime.devices import choose_device, gpus
from lorafold.runtime.processor import processor_name, usable_cores
from lorafold.training.inputs import RunRequest
from lorafold.training.run import train

PROMPT = "book a table for two at Chez Mario on Sunday at 7pm"
MODEL = "smollm2"
TEST_ROWS = 200  # rows of the test split
EXPORT_ROWS = 8  # rows to verify in llama.cpp, which takes seconds for each
UNCOMPILED = "torch's own operations give the same results, but a step may take longer"
# fp32 on every machine, so that the results of commands with this recipe are comparable
RECIPE = Recipe(steps=100, batch=4, dropout=0.0, storage="fp32", max_length=256)


@dataclass(frozen=True)
class QuickstartResult:
    """The results of the quickstart. Exact match is a share of the held-out rows, `kl` is in nats
    per token, and `lost` is the share of the adapter's effect that is lost in llama.cpp, or None
    if that is not installed.
    """

    exact_match_before: float
    exact_match_after: float
    train_seconds: float
    seconds: float
    adapter: str
    merged: str
    adapter_bytes: int
    model_bytes: int
    kl: float | None
    exported: str
    lost: float | None
    base: str

    def meaning(self) -> list[str]:
        options = {"n": TEST_ROWS, "allowed": exporting.MAX_LOST}
        return render_text("quickstart/meaning.jinja", run=self, **options).splitlines()


def fastest(device: torch.device) -> Storage:
    """Returns bf16 or fp32, whichever has faster matmuls on this device; the model learns the task
    equally well in both.
    """
    best = choose_storage("auto", device)
    if not widens(best.dtype, device):
        return best
    return Storage(
        torch.float32, None, f"fp32: {best.reason.partition(': ')[2]}, but fp32 is faster"
    )


def quickstart(
    out: Path, console: Console, *, overwrite: bool = False, device: str | None = None
) -> QuickstartResult:
    """Runs all steps and writes `train.jsonl`, `test.jsonl`, `prompts.jsonl`, `adapter/`,
    `adapter.html`, `merged/` and `gguf/`.
    """
    start = time.perf_counter()
    if out.exists() and not overwrite:
        raise LorafoldError(
            f"{out} exists; pass --overwrite to replace the output of an earlier quickstart"
        )
    adapter, merged_to, exported_to = outputs = [out / p for p in ("adapter", "merged", "gguf")]
    for output in outputs:
        check_out(output, overwrite)
    torch_device = choose_device(device)
    out.mkdir(parents=True, exist_ok=True)
    storage = fastest(torch_device)
    dtype = "bf16" if storage.dtype is torch.bfloat16 else "fp32"

    print_lines(console, *describe_hardware(torch_device, storage))
    train_rows = rows("train", RECIPE.batch * (RECIPE.steps or 0), seed=0)
    test_rows = rows("test", TEST_ROWS, seed=0)
    prompts = [{"prompt": row["prompt"]} for row in test_rows[:EXPORT_ROWS]]
    for name, data in (("train", train_rows), ("test", test_rows), ("prompts", prompts)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))

    console.rule("1  before: the base without an adapter")
    before = measure(test_rows, None, storage, torch_device, console)
    console.rule("2  training: LoRA on every linear layer of the blocks")
    request = RunRequest(
        Base(MODEL, device=device),
        adapter,
        RECIPE.model_copy(update={"storage": dtype}),
        train_rows,
        str(out / "train.jsonl"),
        overwrite=overwrite,
    )
    with keeping_details():
        trained = train(request, console)
    console.rule("3  after: the same held-out rows")
    after = measure(test_rows, adapter, storage, torch_device, console)
    print_answers(before, after, console)
    console.rule("4  inspect: the changes made by the adapter")
    adapters = open_all([adapter])
    inspection = inspect(Base(MODEL), adapters)
    page(inspection, out / "adapter.html")
    print_lines(console, *inspection.advice, f"all figures: {out / 'adapter.html'}")
    console.rule("5  merge: a plain model without an adapter")
    merged = merge(Base(MODEL), adapters, merged_to, MergeOptions(overwrite=overwrite), console)
    print_lines(console, merged.summary())
    console.rule("6  export: the adapter for llama.cpp, verified there")
    options = exporting.ExportOptions("gguf", prompts=out / "prompts.jsonl", overwrite=overwrite)
    exported = exporting.export(Base(MODEL), adapters, exported_to, options, console)
    print_lines(console, exported.summary())

    adapter_bytes, model_bytes = (
        sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in (adapter, merged_to)
    )
    return QuickstartResult(
        before.exact_match or 0.0,
        after.exact_match or 0.0,
        trained.seconds,
        time.perf_counter() - start,
        str(adapter),
        str(merged_to),
        adapter_bytes,
        model_bytes,
        merged.kl,
        str(exported_to),
        None if exported.proof is None else exported.proof.share,
        dtype,
    )


def describe_hardware(device: torch.device, storage: Storage) -> Iterator[str]:
    if device.type != "cpu":
        [name] = [gpu.name for gpu in gpus() if gpu.device == str(device)] or [str(device)]
        yield f"computing on {device}: {name}"
        yield f"base: {storage.reason}"
        return
    threads, cores = torch.get_num_threads(), usable_cores()
    dtype = "fp32" if storage.dtype is torch.float32 else "bf16"
    yield (
        f"processor: {processor_name()}, {threads} {'thread' if threads == 1 else 'threads'} on"
        f" {cores} usable {'core' if cores == 1 else 'cores'}, matmuls in {dtype}"
    )
    yield f"base: {storage.reason}"
    reason = enable(TRAINING)
    yield f"C++ operations: {reason}; {UNCOMPILED}" if reason else "C++ operations: compiled"


def measure(
    test_rows: list[dict],
    adapter: Path | None,
    storage: Storage,
    device: torch.device,
    console: Console,
) -> Evaluation:
    model, tokenizer = load_model(MODEL, storage, device=device), load_tokenizer(MODEL)
    if adapter is not None:
        load(model, adapter)
    result = evaluate(model, tokenizer, test_rows, RECIPE.max_length, console=console)
    print_lines(console, result)
    return result


def print_answers(before: Evaluation, after: Evaluation, console: Console, shown: int = 5) -> None:
    columns = (Column(name, overflow="fold") for name in ("prompt", "before", "after"))
    table = Table(*columns, show_lines=True)
    for first, second in list(zip(before.rows, after.rows, strict=True))[:shown]:
        table.add_row(first.prompt, first.answer, second.answer)
    console.print(table)
