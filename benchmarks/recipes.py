"""Configurations of other tools: the run that each makes there beside the run of its translation.

    python benchmarks/recipes.py [--python llamafactory=PATH] [--python axolotl=PATH]
    [--python mlx-lm=PATH] [--only 'trl-sft;axolotl'] [--steps 12] [--seeds 2]

The configurations are those of lib/recipe_cases.py, the base is the embedded model in fp32, on the
CPU. Each is run by its tool, in the environment whose interpreter --python names (this one, unless
it does), and by the command that `lorafold recipe --from` names, with the options that its report
asks for. What is not installed is skipped. An Unsloth script runs on transformers, PEFT and TRL,
which Unsloth patches. Held-out losses of both adapters are `lf.evaluate`'s.

Of both sides, ours first: the optimizer steps, the trained parameters, by how much of the peak the
rates are apart at most, labelled tokens a step, the first step's loss as it is reported, the mean
loss of the second half of the steps, and the loss of held-out rows, of pairs the margin of their
rewards, with half the range over the seeds. Losses of later steps are in nats a row, since tools
differ in what they label after a turn. Written to results/recipes.json.
"""

import argparse
import io
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from lib.recipe_cases import ALPACA_TEMPLATE, CASES, Case
from lib.recipe_rows import write
from lib.results import keep, markdown
from lib.short import parsed
from lib.work import same_work
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import lorafold as lf
from lorafold.cli import main as command
from lorafold.config_import.translate import translate
from lorafold.config_import.translate import write as write_recipe
from lorafold.models.sources import resolve_model
from lorafold.training import loop

NAMES = {
    "trl-sft": "TRL",
    "trl-dpo": "TRL",
    "unsloth": "Unsloth's script",
    "llamafactory": "LLaMA-Factory",
    "axolotl": "axolotl",
    "mlx-lm": "mlx-lm",
}
PACKAGES = {"mlx-lm": "mlx_lm", "trl-sft": "trl", "trl-dpo": "trl", "unsloth": "trl"}
CHILD = Path(__file__).parent / "lib" / "recipe_child.py"
WEIGHTS = "adapter_model.safetensors"


HOME = Path.cwd()


class Run(NamedTuple):
    """Of each step the loss, the rate of the first group and the labelled tokens; the number of
    trained parameters; the adapter's directory.
    """

    losses: list[float]
    rates: list[float]
    tokens: list[int]
    parameters: int
    adapter: Path


class Pair(NamedTuple):
    """The runs of one seed, their held-out losses, and the rows of an optimizer step of ours."""

    ours: Run
    theirs: Run
    held_out: tuple[float, ...]
    rows: int


def fp32_model(folder: Path) -> Path:
    """The embedded model as a directory whose files are in fp32."""
    source = Path(resolve_model("smollm2").path)
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "manifest.json":
            shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    tensors = load_file(source / "model.safetensors")
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    save_file(floats, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def is_installed(python: str, tool: str) -> bool:
    """Whether the interpreter has the tool."""
    package = PACKAGES.get(tool, tool)
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def theirs(case: Case, file: Path, out: Path, python: str) -> Run:
    """The run that the tool itself makes."""
    record = out.with_suffix(".json")
    settings = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "AXOLOTL_DO_NOT_TRACK": "1"}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | settings
    found = subprocess.run(
        [python, str(CHILD), case.tool, str(file), str(record)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if found.returncode:
        sys.exit(f"{case.tool} failed on {file}:\n{found.stdout[-2000:]}")
    adapter = from_mlx(out) if case.tool == "mlx-lm" else out
    return Run(**json.loads(record.read_text()), adapter=adapter)


def from_mlx(out: Path) -> Path:
    """The adapter that mlx-lm wrote in PEFT's form: `lora_a` (in, r) is A's transpose, `lora_b`
    (r, out) B's, and its scale is alpha / r.
    """
    config = json.loads((out / "adapter_config.json").read_text())
    parts = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
    tensors, modules = {}, set()
    with safe_open(out / "adapters.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            module, part = name.rsplit(".", 1)
            tensor = file.get_tensor(name)
            tensor = tensor.t().contiguous() if tensor.ndim == 2 else tensor
            tensors[f"base_model.model.{module}.{parts[part]}"] = tensor
            modules.add(module)
    given = config["lora_parameters"]
    converted = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": given["rank"],
        "lora_alpha": given["scale"] * given["rank"],
        "use_dora": config["fine_tune_type"] == "dora",
        "target_modules": sorted(modules),
    }
    folder = out.with_suffix(".peft")
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(converted))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def ours(case: Case, file: Path, out: Path, seed: int) -> Run:
    """The run of the command that the translation names."""
    translation = translate(file, case.tool)
    recipe = out.with_suffix(".yaml")
    write_recipe(translation, recipe)
    argv = shlex.split(translation.command(str(recipe)))[1:]
    for option, value in zip(case.told[::2], case.told[1::2], strict=True):
        if option in argv and option != "--set":
            argv[argv.index(option) + 1] = value
        else:
            argv += [option, value]
    argv[argv.index("--out") + 1] = str(out)
    found: dict[str, Any] = {"losses": [], "rates": [], "tokens": [], "parameters": 0}
    step = loop.train_step

    def noted(job: Any, examples: Any, at: int) -> tuple[float, float]:
        found["tokens"].append(sum(map(job.loss.count, examples)))
        loss, norm = step(job, examples, at)
        found["losses"].append(loss)
        return loss, norm

    def before(optimizer: Any, args: Any, kwargs: Any) -> None:
        groups = optimizer.param_groups
        found["rates"].append(groups[0]["lr"])
        found["parameters"] = sum(p.numel() for g in groups for p in g["params"])

    given = sys.argv
    loop.train_step, sys.argv = noted, ["lorafold", *argv, "--set", f"seed={seed}"]
    hook = register_optimizer_step_pre_hook(before)
    try:
        with redirect_stdout(io.StringIO()):
            command()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        hook.remove()
        loop.train_step, sys.argv = step, given
    return Run(**found, adapter=out)


def held_out(run: Run, like: Path, model: Path, rows: Path) -> float:
    """The loss of held-out rows, in nats a labelled token, or of pairs the reward's margin.

    Args:
        like: lorafold's adapter, whose chat template is that of both sides.
    """
    folder = run.adapter.with_suffix(".measured")
    folder.mkdir()
    for name in ("adapter_config.json", WEIGHTS):
        shutil.copy(run.adapter / name, folder)
    if (like / "chat_template.jinja").exists():
        shutil.copy(like / "chat_template.jinja", folder)
    found: Any = lf.evaluate(
        str(model), str(rows), adapters=[folder], completions=False, storage="fp32", device="cpu",
        allow_other_base=True,
    )  # fmt: skip
    return float(found.loss if found.preference is None else found.preference.reward_margin)


def of_a_row(case: Case, run: Run, labelled: float) -> list[float]:
    """The loss of each step, in nats a row; of preferences it is one already.

    Args:
        labelled: The tokens of a row that this side labels.
    """
    return [loss * (1 if case.held_out == "pairs" else labelled) for loss in run.losses]


def told(values: Sequence[float]) -> str:
    """The mean, with half the range where there are several."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.3f}"


def both(ours: object, theirs: object) -> str:
    """What is so on both sides, once where it is the same."""
    return str(ours) if ours == theirs else f"{ours} / {theirs}"


def figures(name: str, case: Case, runs: Sequence[Pair]) -> dict[str, object]:
    """The columns that people read, ours before theirs."""
    first, other = runs[0].ours, runs[0].theirs
    rows = runs[0].rows
    same_work(
        {side: {"steps": len(run.losses)} for side, run in (("ours", first), ("theirs", other))}
    )
    labelled = sum(map(sum, (r.ours.tokens for r in runs))) / (rows * len(runs) * len(first.losses))
    half = len(first.losses) // 2
    curves = [
        [
            statistics.fmean(of_a_row(case, run, labelled + more)[half:])
            for run in (getattr(pair, side) for pair in runs)
        ]
        for side, more in (("ours", 0), ("theirs", case.more))
    ]
    gap = max(abs(a - b) for a, b in zip(first.rates, other.rates, strict=False))
    tokens = [sum(run.tokens) / len(run.losses) for run in (first, other)]
    return {
        "tool": NAMES[case.tool],
        "configuration": name,
        "steps": both(len(first.losses), len(other.losses)),
        "parameters": both(f"{first.parameters:,}", f"{other.parameters:,}"),
        "difference of the rates": f"{gap / max(first.rates):.0%}",
        "tokens per step": "" if case.held_out == "pairs" else both(*(f"{t:.0f}" for t in tokens)),
        "first loss": both(*(f"{run.losses[0]:.3f}" for run in (first, other))),
        "loss per row": " / ".join(map(told, curves)),
        "held-out": " / ".join(told([p.held_out[i] for p in runs]) for i in (0, 1)),
    }


def runs_in(record: Path | None) -> dict[str, Pair]:
    """The runs that a record has, by configuration, steps and seed."""
    if record is None or not record.exists():
        return {}
    lines = map(json.loads, record.read_text().splitlines())
    return {
        key: Pair(Run(**mine), Run(**other), tuple(held), rows)
        for key, mine, other, held, rows in lines
    }


def compare(
    name: str, case: Case, python: str, model: Path, folder: Path, steps: int, seeds: int,
    record: Path | None,
) -> dict[str, object]:  # fmt: skip
    """Run a configuration on both sides, once a seed, in a folder of its own."""
    done = runs_in(record)
    runs = []
    for seed in range(1, seeds + 1):
        key = f"{name}, {steps} steps, seed {seed}"
        if key in done:
            runs.append(done[key])
            continue
        at = folder / f"{list(CASES).index(name)}-{seed}"
        write(at)
        os.chdir(at)
        Path("alpaca.jinja").write_text(ALPACA_TEMPLATE)
        given = {
            "MODEL": model, "STEPS": steps, "MICRO": steps * case.micro, "SEED": seed,
            "OUT": at / "theirs",
        }  # fmt: skip
        text = case.text
        for word, value in given.items():
            text = text.replace(word, str(value))
        file = Path("train.py" if case.tool == "unsloth" else "train.yaml")
        file.write_text(text)
        other = theirs(case, file, at / "theirs", python)
        mine = ours(case, file, at / "ours", seed)
        rows = at / case.held_out / "valid.jsonl"
        held = tuple(held_out(run, mine.adapter, model, rows) for run in (mine, other))
        batch = json.loads((mine.adapter / "lorafold.json").read_text())["recipe"]["batch"]
        runs.append(Pair(mine, other, held, batch))
        line = json.dumps([key, mine._asdict(), other._asdict(), held, batch], default=str)
        print(line, flush=True)
        if record is not None:
            with record.open("a") as kept:
                kept.write(f"{line}\n")
    return figures(name, case, runs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", action="append", default=[], metavar="TOOL=PATH")
    parser.add_argument("--only", help="tools and configurations, with ; between them")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--record", type=Path, help="a file that keeps runs")
    asked = parsed(parser, only="turns, all-linear, linear, decay", steps=2, seeds=1)
    pythons = dict(given.split("=", 1) for given in asked.python)
    only = asked.only.split(";") if asked.only else list(NAMES)
    os.environ["LORAFOLD_TUNE"] = "off"  # a command would restart this process
    table = []
    with tempfile.TemporaryDirectory() as folder:
        model = fp32_model(Path(folder) / "model")
        for name, case in CASES.items():
            python = str(Path(pythons.get(case.tool, sys.executable)).absolute())
            if not any(one in (case.tool, name) for one in only):
                continue
            if not is_installed(python, case.tool):
                print(f"{NAMES[case.tool]}: {name}: skipped, as {python} does not have the tool")
                continue
            table.append(
                compare(
                    name, case, python, model, Path(folder), asked.steps, asked.seeds,
                    asked.record and HOME / asked.record,
                )
            )  # fmt: skip
            print(markdown(table), flush=True)
    os.chdir(HOME)
    keep("recipes", table, dtypes="fp32")


if __name__ == "__main__":
    main()
