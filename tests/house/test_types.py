"""A user's script is checked by a type checker as users have it: `mypy --strict`, no plugin."""

import os
import subprocess
import sys
from pathlib import Path

import lorafold

SRC = Path(lorafold.__file__).parents[1]
# lorafold's dependencies are not followed, which would take a minute and a half, so their part of
# the public surface is `Any` here. The errors of lorafold's own files are those of `make lint`.
CONFIG = """\
[mypy]
strict = True
follow_imports = silent
disable_error_code = import-untyped
[mypy-torch.*,transformers.*,rich.*,numpy.*,accelerate.*,huggingface_hub.*]
follow_imports = skip
"""
SCRIPT = '''
from pathlib import Path

import lorafold as lf
from lorafold.evaluation import Evaluation, RewardEvaluation

rows = [{"prompt": f"{a} plus one is", "completion": f" {a + 1}"} for a in range(90)]


def right(prompt: str, completion: str) -> float:
    return float(completion.strip() == "4")


def main(out: Path) -> str:
    print(lf.__version__)
    recipe = lf.Recipe(rank=8, steps=20, targets="all-linear", betas=(0.9, 0.99))
    trained = lf.train(recipe, model="smollm2", data=rows[:70], out=out / "adapter")
    losses: list[float] = trained.losses
    print(trained.train_loss, losses[0], trained.adapter, recipe.to_yaml())
    measured = lf.evaluate("smollm2", rows[70:], adapters=out / "adapter")
    if isinstance(measured, Evaluation):
        print(measured.loss, measured.perplexity, [row.exact for row in measured.rows])
    worth = lf.evaluate("smollm2", rows[70:], rewards=right)
    if isinstance(worth, RewardEvaluation):
        print(worth.reward, worth.rewards["right"].interval)
    merged = lf.merge("smollm2", out / "adapter", out=out / "merged")
    print(merged.summary(), merged.kl)
    print(lf.history(out / "adapter").losses, lf.inspect(out / "adapter").advice)
    print(lf.compare(out / "study", methods=["lora", "dora"]).as_json()["rows"])
    print(lf.estimate("smollm2", "lora").total, lf.compose(["a", "b"], out / "c").out)
    print(lf.resize(out / "adapter", out / "small", rank=2).error, lf.intrinsic(out / "d").points)
    print(lf.score("smollm2", rows, adapters="judge").n)
    print([point.kept for point in lf.fragility(probes=lf.Probes(rows, rows)).points])

    model, tokenizer = lf.load_model("smollm2", storage="nf4"), lf.load_tokenizer("smollm2")
    spec = lf.LoRA(rank=16, alpha=32, dropout=0.05)
    adapter = lf.attach(model, spec, targets="all-linear", name="mine")
    with lf.only(model):
        bare: str = lf.generate(model, "Who?", tokenizer=tokenizer)
    several: list[str] = lf.generate(model, ["Who?", "When?"], tokenizer=tokenizer)
    adapter.save(out / "saved", overwrite=True)
    adapter.detach()
    lf.load(model, out / "saved", trainable=True).merge()
    return "\\n".join([bare, *several])
'''


def test_a_user_s_script_passes_and_its_mistakes_do_not(tmp_path: Path) -> None:
    (tmp_path / "mypy.ini").write_text(CONFIG)
    (tmp_path / "right.py").write_text(SCRIPT)
    wrong = SCRIPT.replace("Recipe(rank=8", "Recipe(rnak=8").replace(".points", ".point")
    (tmp_path / "wrong.py").write_text(wrong)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "right.py", "wrong.py"],
        cwd=tmp_path, env={**os.environ, "MYPYPATH": str(SRC)}, capture_output=True, text=True,
    )  # fmt: skip
    said = done.stdout.splitlines()
    assert [line for line in said if not line.startswith("wrong.py:")][:-1] == [], done.stderr
    assert 'Unexpected keyword argument "rnak" for "Recipe"' in done.stdout
    assert '"Fragility" has no attribute "point"' in done.stdout
    assert said[-1] == "Found 3 errors in 1 file (checked 2 source files)"
