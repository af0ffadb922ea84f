"""What a policy forgets that is trained over a skill: SFT, then GRPO over it on another task.

    python benchmarks/policy_skill.py [--out skilled] [--steps 16] [--betas 0 0.05] [--held-out 200]

The skill is the quickstart's: a request becomes one JSON object. The policy learns the lists of
`policy_task.py` over that adapter, without a KL to it and with one. Measured on 200 unseen requests
and on held-out prompts: the share of greedy objects that are right, and of lists. The files of the
supervised adapter are compared byte by byte. What was trained stays in --out, and is not trained
again. Prints a table, which is also written to results/policy_skill.md.
"""

import argparse
from pathlib import Path

from alignment import digest, learn
from lib.results import keep
from policy_task import lists

import lorafold as lf
from lorafold.evaluation import wilson
from lorafold.quickstart.story import RECIPE
from lorafold.quickstart.task import rows


def share(right: float, n: int) -> str:
    low, high = wilson(round(right * n), n)
    return f"{right:.1%} ({low:.1%} to {high:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("skilled"))
    asked = parser.parse_args()
    asked.out.mkdir(exist_ok=True)
    test, sft = rows("test", 200, 0), asked.out / "sft"
    learn(RECIPE, rows("train", RECIPE.batch * RECIPE.steps, 0), sft)
    named, judge = lists(str(asked.out), asked.held_out)
    prompts, unseen = (str(asked.out / f"{name}.jsonl") for name in ("train", "test"))
    before, table = digest(sft), []

    def skill(*stack: Path) -> str:
        return share(lf.evaluate("smollm2", test, adapters=stack).exact_match, len(test))

    table.append({"": "SFT", "objects right": skill(sft)})
    for beta in asked.betas:
        out = asked.out / f"policy-{beta:g}"
        options = {"group": 8, "max_new_tokens": 16, "rewards": named}
        recipe = lf.Recipe(
            objective="grpo", storage="fp32", batch=8, steps=asked.steps, eval_every=asked.steps,
            lr=1e-4, lr_b=1.5e-3, beta=beta or None, objective_options=options,
        )  # fmt: skip
        learn(recipe, prompts, out, over=sft, eval_data=unseen)
        found = lf.history(out)
        first, *_, last = found.held_out[judge]
        table[0]["lists right"] = share(first, asked.held_out)
        row = {"": f"SFT + GRPO, beta {beta:g}", "objects right": skill(sft, out)}
        row |= {"lists right": share(last, asked.held_out)}
        if beta:
            row["KL on its prompts"] = found.steps["KL"][-1]
        table.append(row)
    keep("policy_skill", table, [{"the SFT adapter's bytes moved": digest(sft) != before}])


if __name__ == "__main__":
    main()
