"""Who forgets more, LoRA or full fine-tuning, and what does the answer owe to the learning rate?

    python benchmarks/forgetting.py [--out forgetting] [--rates 2e-5 6e-5 1.3e-4 4e-4] [--steps 100]

The quickstart's task on the embedded model in fp32, 4 rows a step, seed 0, `lorafold train`'s own
loop: LoRA with its own two rates, full fine-tuning with each of RATES. Along a run, at `--points`,
held-out loss (the first 40 unseen rows) and forgetting: KL(base || tuned) on probe texts outside
the task, nats per token. At the end, loss and exact match on all 100 unseen rows.

Runs of equal steps differ in how much they learned, so forgetting is also given where a run first
reaches a held-out loss L between two points i and i + 1, on the line through both in log loss:

    kl(L) = kl_i + (kl_{i+1} - kl_i) (log l_i - log L) / (log l_i - log l_{i+1})
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from math import log
from pathlib import Path

import torch
from lib.results import keep
from lib.short import parsed
from lib.work import same_work, watched
from rich.console import Console
from torch import nn

import lorafold as lf
from lorafold.comparing.measure import forgetting
from lorafold.core.contexts import evaluating
from lorafold.data.examples import probe_ids
from lorafold.evaluation import evaluate, held_out_loss
from lorafold.models.loading import load_model
from lorafold.quickstart.run import RECIPE
from lorafold.quickstart.task import rows
from lorafold.recipe.resolve_settings import spec_of, with_method
from lorafold.resolve import Base
from lorafold.runtime.memory import KEEP_FREED, malloc_policy
from lorafold.training.inputs import RunRequest
from lorafold.training.loop import fit
from lorafold.training.progress_display import Display
from lorafold.training.run import make_plan
from lorafold.training.setup import set_up
from lorafold.training_step.fused_modules import fused

WATCHED, UNSEEN = 40, 100  # held-out rows along a run, and at its end
QUIET = Console(quiet=True)


class Kept(nn.Module):
    """A model that computes each text once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.outputs = model, {}

    def forward(self, ids: torch.Tensor) -> object:
        text = tuple(ids[0].tolist())
        if text not in self.outputs:
            self.outputs[text] = self.model(ids, use_cache=False)
        return self.outputs[text]


class Watch(Display):
    """Shows nothing; `look` is called after every step."""

    def __init__(self, steps: int, look: Callable[[int], None]) -> None:
        super().__init__(QUIET, steps)
        self.look = look

    def step(
        self, step: int, loss: float, rate: float, figures: Mapping[str, float], lr: float
    ) -> None:
        self.look(step)


def trained(
    method: str, rate: float | None, steps: int, points: Sequence[int], rows_: int, base: Kept
) -> dict:
    """One run: its points, and what the model is worth at the end."""
    changes = {"steps": steps, "lr": rate, "save_every": steps}
    recipe, path = with_method(RECIPE, method).model_copy(update=changes), []
    train_rows, unseen = rows("train", recipe.batch * steps, 0), rows("test", rows_, 0)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        out = Path(folder, "adapter")
        request = RunRequest(
            Base("smollm2"), out, recipe, train_rows, "", eval_rows=unseen[:WATCHED]
        )
        setup = set_up(request, QUIET)
        objective, tokenizer, held_out = setup.objective, setup.tokenizer, setup.held_out
        model = setup.request.base.load()
        torch.manual_seed(recipe.seed)
        adapter = lf.attach(model, spec_of(recipe))

        def look(step: int) -> None:
            if step in points:
                with evaluating(model):
                    kl, _ = forgetting(base, model, probe_ids(tokenizer, None))
                found = held_out_loss(loss, held_out.examples)
                path.append({"step": step, "loss": found, "kl": kl})
                print(json.dumps({"method": method, "rate": rate} | path[-1]), flush=True)

        stack.enter_context(malloc_policy(KEEP_FREED))
        stack.enter_context(fused(model))
        loss = stack.enter_context(objective.loss(model, tokenizer, recipe.packing, QUIET))
        run = make_plan(setup, adapter, loss, setup.feed, None, QUIET)
        work = stack.enter_context(watched())
        fit(*run, Watch(steps, look))
    found = evaluate(model, tokenizer, unseen, recipe.max_length)
    return {"path": path, "loss": found.loss, "exact": found.exact_match, "work": work}


def at(path: list[dict[str, float]], loss: float) -> str:
    """Forgetting where the run first reaches this held-out loss, and between which steps."""
    for a, b in pairwise(path):
        if a["loss"] > loss >= b["loss"]:
            share = (log(a["loss"]) - log(loss)) / (log(a["loss"]) - log(b["loss"]))
            kl = a["kl"] + share * (b["kl"] - a["kl"])
            return f"{kl:.3f} (steps {a['step']}-{b['step']})"
    return "before" if path[0]["loss"] <= loss else "not reached"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("forgetting"), help="goes on here")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-5, 6e-5, 1.3e-4, 4e-4])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--unseen", type=int, default=UNSEEN, help="rows at the end")
    parser.add_argument("--points", type=int, nargs="+", default=[10, 20, 30, 45, 70, 100])
    parser.add_argument("--losses", type=float, nargs="+", default=[0.02, 0.01, 0.005])
    asked = parsed(parser, steps=2, points=[1, 2], rates=[6e-5], unseen=4)
    asked.out.mkdir(parents=True, exist_ok=True)
    base, table, paths, work = Kept(load_model("smollm2", torch.float32).eval()), [], [], {}
    for method, rate in [("lora", None), *(("full", rate) for rate in asked.rates)]:
        name = f"{method} {rate:g}" if rate else f"{method} 2e-4, 3e-3"
        file = asked.out / f"{method}-{rate}-{asked.steps}.json"
        if not file.exists():
            found = trained(method, rate, asked.steps, asked.points, asked.unseen, base)
            file.write_text(json.dumps(found))
        run = json.loads(file.read_text())
        print(json.dumps({"run": name} | run), flush=True)
        path, work[name] = run["path"], run["work"]
        same_work(work)
        row = {"run": name, "loss": f"{run['loss']:.4f}", "exact": f"{run['exact']:.0%}"}
        row[f"KL, step {path[-1]['step']}"] = f"{path[-1]['kl']:.3f}"
        table.append(row | {f"KL at loss {loss:g}": at(path, loss) for loss in asked.losses})
        along = {f"step {p['step']}": f"{p['loss']:.4f}, {p['kl']:.3f}" for p in path}
        paths.append({"loss, KL": name} | along)
    keep("forgetting", table, paths, dtypes="fp32")


if __name__ == "__main__":
    main()
