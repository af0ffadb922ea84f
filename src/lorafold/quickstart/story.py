"""`lorafold quickstart`: the embedded model can't do a task, an adapter learns it, and a merged
model does it without an adapter.

    before -> train -> after -> inspect -> merge       needs neither network nor GPU; writes
                                                       everything to one directory
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table

from lorafold.adapter import load
from lorafold.errors import LorafoldError
from lorafold.evaluation import Evaluation, evaluate
from lorafold.files.atomic import check_out
from lorafold.inspecting.report import page
from lorafold.inspecting.run import inspect
from lorafold.machine.devices import choose_device
from lorafold.merging.run import Wanted, merge
from lorafold.models.loading import load_model, load_tokenizer
from lorafold.models.storage import Storage, choose_storage
from lorafold.opening import Base
from lorafold.ops.arithmetic import widens
from lorafold.peft.saved import open_all
from lorafold.quickstart.task import rows
from lorafold.recipe.recipe import Recipe
from lorafold.training.request import Request
from lorafold.training.run import train

PROMPT = "book a table for two at Chez Mario on Sunday at 7pm"
MODEL = "smollm2"
UNSEEN = 200  # rows of the test split
# the base in fp32 on every machine, so that figures of commands that use this recipe are comparable
RECIPE = Recipe(steps=100, batch=4, dropout=0.0, storage="fp32", max_length=256)


@dataclass(frozen=True)
class Story:
    """The figures of the quickstart. Exact match is a share of the unseen rows, `kl` is that of the
    certificate in nats a token, and `base` is the storage of the base.
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
    base: str


def fastest(device: torch.device) -> Storage:
    """bf16 or fp32, whichever this device multiplies faster; the task is learned equally well with
    both.
    """
    best = choose_storage("auto", device)
    if not widens(best.dtype, device):
        return best
    has = best.why.partition(": ")[2]
    return Storage(torch.float32, None, f"fp32: {has}, and is faster in fp32")


def quickstart(
    out: Path, console: Console, *, overwrite: bool = False, device: str | None = None
) -> Story:
    """Run all steps and write `train.jsonl`, `test.jsonl`, `adapter/`, `adapter.html` and
    `merged/`.

    Args:
        overwrite: Replace what an earlier quickstart wrote to `out`.
        device: cpu, cuda, cuda:N or mps; None takes the fastest that is available.

    Raises LorafoldError if `out` exists and `overwrite` is off.
    """
    start = time.perf_counter()
    if out.exists() and not overwrite:
        raise LorafoldError(
            f"{out} exists; pass --overwrite to replace what an earlier quickstart wrote to it"
        )
    for part in ("adapter", "merged"):
        check_out(out / part, overwrite)
    where = choose_device(device)
    out.mkdir(parents=True, exist_ok=True)
    storage = fastest(where)
    base = "bf16" if storage.dtype is torch.bfloat16 else "fp32"
    console.print(f"base: {storage.why}", highlight=False, soft_wrap=True)
    train_rows, test_rows = (
        rows("train", RECIPE.batch * (RECIPE.steps or 0), seed=0),
        rows("test", UNSEEN, seed=0),
    )
    for name, data in (("train", train_rows), ("test", test_rows)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))

    console.rule("1  before: the base without an adapter")
    before = measure(test_rows, None, storage, where, console)
    console.rule("2  training: LoRA on every linear layer of the blocks")
    request = Request(
        Base(MODEL, device=device),
        out / "adapter",
        RECIPE.model_copy(update={"storage": base}),
        train_rows,
        str(out / "train.jsonl"),
        overwrite=overwrite,
    )
    trained = train(request, console)
    console.rule("3  after: the same unseen rows")
    after = measure(test_rows, out / "adapter", storage, where, console)
    side_by_side(before, after, console)
    console.rule("4  inspect: what the adapter changed")
    adapters = open_all([out / "adapter"])
    found = inspect(Base(MODEL), adapters)
    page(found, out / "adapter.html")
    for sentence in found["advice"]:
        console.print(sentence, highlight=False, markup=False)
    console.print(f"all figures: {out / 'adapter.html'}", highlight=False, markup=False)
    console.rule("5  merge: a plain model without an adapter")
    merged = merge(Base(MODEL), adapters, out / "merged", Wanted(overwrite=overwrite), console)
    console.print(merged.summary(), highlight=False)

    adapter_bytes, model_bytes = (
        sum(f.stat().st_size for f in (out / p).glob("*.safetensors"))
        for p in ("adapter", "merged")
    )
    sizes = (
        f"adapter {adapter_bytes / 1e6:.1f} MB, model {model_bytes / 1e6:.1f} MB:"
        f" {adapter_bytes / model_bytes:.1%}"
    )
    console.print(sizes, highlight=False)
    console.print(
        f"""Try next
  lorafold generate --model {out}/merged --system JSON --prompt "{PROMPT}"
  lorafold eval --model {MODEL} --adapter {out}/adapter --data {out}/test.jsonl
  lorafold train --model {MODEL} --data {out}/train.jsonl --out my-adapter --set rank=8
  lorafold train --data your.jsonl --out yours --preview""",
        highlight=False,
        markup=False,
    )
    return Story(
        before.exact_match or 0.0,
        after.exact_match or 0.0,
        trained.seconds,
        time.perf_counter() - start,
        str(out / "adapter"),
        str(out / "merged"),
        adapter_bytes,
        model_bytes,
        merged.kl,
        base,
    )


def measure(
    test_rows: list[dict],
    adapter: Path | None,
    storage: Storage,
    where: torch.device,
    console: Console,
) -> Evaluation:
    """Evaluate the embedded model.

    Args:
        adapter: A saved adapter to load on it, or None.
        storage: How the base stores its weights.
    """
    model, tokenizer = load_model(MODEL, storage, device=where), load_tokenizer(MODEL)
    if adapter is not None:
        load(model, adapter)
    result = evaluate(model, tokenizer, test_rows, RECIPE.max_length, console=console)
    console.print(str(result), highlight=False)
    return result


def side_by_side(before: Evaluation, after: Evaluation, console: Console, shown: int = 5) -> None:
    """Print completions before and after training as a table."""
    table = Table(
        *(Column(name, overflow="fold") for name in ("prompt", "before", "after")), show_lines=True
    )
    for first, second in list(zip(before.rows, after.rows, strict=True))[:shown]:
        table.add_row(first.prompt, first.answer, second.answer)
    console.print(table)


__all__ = ["RECIPE", "Story", "quickstart"]
