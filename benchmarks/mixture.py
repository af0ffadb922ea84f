"""A mixture of experts of 214M parameters through the commands: trained on NF4, evaluated, merged,
generated with.

    python benchmarks/mixture.py [--steps 100] [--rows 100]

The embedded model upcycled to two experts a block (`lib/mixtures.py`), the quickstart's task, the
recipe's defaults with the quickstart's rate. Exact match is on unseen rows: of the base, of the
adapter on NF4, and of the merged model in bf16. Bytes are those of the experts in memory. Prints a
table, which is also written to results/mixture.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from lib.results import keep
from lib.short import parsed

import lorafold as lf
from lib.mixtures import upcycled
from lorafold.core.expert_matrices import expert_parameters
from lorafold.quickstart.task import rows


def command(*arguments: object) -> dict:
    """The JSON object that a command prints last."""
    done = subprocess.run(
        [sys.executable, "-m", "lorafold", *map(str, arguments), "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def experts_bytes(model: object) -> int:
    """The bytes of the experts' matrices, with their constants."""
    found = 0
    for module in model.modules():  # type: ignore[attr-defined]
        for name in expert_parameters(module):
            own = module._parameters[name]
            state = getattr(own, "quant_state", None)
            extra = [] if state is None else [state.absmax, state.state2.absmax]
            found += own.nbytes + sum(t.nbytes for t in extra)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=100, help="unseen rows that are measured")
    asked = parsed(parser, steps=1, rows=2)
    with TemporaryDirectory() as folder:
        base, adapter, merged = (Path(folder, n) for n in ("base", "adapter", "merged"))
        upcycled(base)
        files = {}
        for split, n in (("train", 4 * asked.steps), ("test", asked.rows)):
            files[split] = Path(folder, f"{split}.jsonl")
            files[split].write_text("".join(json.dumps(r) + "\n" for r in rows(split, n, seed=0)))
        plain, four = (experts_bytes(lf.load_model(base, storage=s)) for s in ("bf16", "nf4"))
        before = command("eval", "--model", base, "--storage", "nf4", "--data", files["test"])
        options = ("--storage", "nf4", "--steps", asked.steps, "--batch", 4, "--dropout", 0.05)
        trained = command(
            "train", "--model", base, "--data", files["train"], "--out", adapter, *options
        )
        command("merge", "--model", base, "--adapter", adapter, "--out", merged)
        over = ("--adapter", adapter, "--data", files["test"])
        with_adapter = command("eval", "--model", base, *over)
        after = command("eval", "--model", merged, "--data", files["test"])
        prompt = rows("test", 1, seed=0)[0]
        said = command("generate", "--model", merged, "--prompt", prompt["prompt"])
        print(json.dumps({"trained": trained, "said": said}, indent=1))
        keep(
            "mixture",
            [
                {
                    "experts in NF4 relative to bf16": f"{four / plain:.3f}",
                    "exact match, base": f"{before['exact_match']:.1%}",
                    "adapter on NF4": f"{with_adapter['exact_match']:.1%}",
                    "merged, bf16": f"{after['exact_match']:.1%}",
                }
            ],
            dtypes="experts in NF4",
        )


if __name__ == "__main__":
    main()
