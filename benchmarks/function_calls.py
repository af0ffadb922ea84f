"""Function calling learnt from scratch: the embedded model, which knows no tools, before and after
training on synthetic calls, measured by the exact match of the call on unseen rows.

    python benchmarks/function_calls.py [--rows 480] [--unseen 100] [--out DIR]

Rows have tools, and calls with text, numbers, dates and choices (`lib/function_tasks.py`); the chat
template is the built-in one with tools. The calls that the model says are parsed back through the
template. Prints JSON lines and a table, which is also written to results/function_calls.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from lib.function_tasks import rows
from lib.results import keep
from lib.short import parsed
from rich.console import Console

import lorafold as lf
from lorafold.data.messages import openai_tools
from lorafold.data.tool_calls import parse_calls
from lorafold.errors import LorafoldError
from lorafold.evaluation import Evaluation
from lorafold.models.sources import resolve_model
from lorafold.models.tokenizer import set_template, tokenizer_of

MODEL = "smollm2"


def shares(found: Evaluation, data: list[dict[str, Any]], tokenizer: Any) -> dict[str, Any]:
    """The shares of answers that are one call, of the right function, with the right arguments."""
    found_of = dict.fromkeys(("a call", "correct function", "correct arguments"), 0)
    for answer, row in zip(found.rows, data, strict=True):
        try:
            calls = parse_calls(answer.answer, tokenizer, openai_tools(row["tools"]))
        except LorafoldError:
            calls = []
        wanted = row["messages"][-1]["tool_calls"][0]["function"]
        found_of["a call"] += len(calls) == 1
        same = len(calls) == 1 and calls[0]["function"]["name"] == wanted["name"]
        found_of["correct function"] += same
        found_of["correct arguments"] += same and calls[0]["function"] == wanted
    return {name: count / len(data) for name, count in found_of.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--unseen", type=int, default=100)
    parser.add_argument("--out", type=Path)
    asked = parsed(parser, rows=8, unseen=4)
    out = asked.out or Path(tempfile.mkdtemp())
    start = time.perf_counter()
    train, test = rows("train", asked.rows, 0), rows("test", asked.unseen, 0)
    console = Console(stderr=True)

    base = lf.load_tokenizer(MODEL)
    set_template(base, "tools")
    bare = lf.load_model(MODEL, storage="auto")
    before = lf.evaluate(bare, test, tokenizer=base, console=console)
    del bare
    recipe = lf.Recipe(
        chat_template="tools", steps=asked.rows // 4, batch=4, dropout=0.0, storage="auto"
    )
    began = time.perf_counter()
    lf.train(recipe, data=train, model=MODEL, out=out / "adapter", console=console)
    seconds = time.perf_counter() - began
    tokenizer = tokenizer_of(resolve_model(MODEL), [out / "adapter"])
    after = lf.evaluate(MODEL, test, adapters=out / "adapter", console=console)
    found = [
        {"when": when, "exact match": e.exact_match or 0.0} | shares(e, test, tokenizer)
        for when, e in (("before", before), ("after", after))
    ]
    for figures in found:
        print(json.dumps(figures))
    for answer in after.rows[:3]:
        print(json.dumps({"asked": answer.prompt, "said": answer.answer, "exact": answer.exact}))
    run = {
        "rows": len(train), "unseen rows": len(test), "training seconds": seconds,
        "total seconds": time.perf_counter() - start,
    }  # fmt: skip
    print(json.dumps(run))
    keep("function_calls", found, [run], dtypes="the default")


if __name__ == "__main__":
    main()
