"""The recipe: precedence, YAML and --set, and errors that name everything at once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from error_cases import refusal
from lorafold.errors import LorafoldError
from lorafold.recipe.parsing import load_recipe
from lorafold.recipe.recipe import Recipe
from lorafold.training_step.optim import set_learning_rates


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def refused(*args, **flags) -> str:
    return refusal(load_recipe, *args, **flags)


def test_file_then_set_then_flags_that_were_given(tmp_path):
    path = written(tmp_path, "rank: 4\nlr: 1e-3\nbatch: 2\nseed: 7\n")
    recipe = load_recipe(path, ["lr=3e-4", "batch=16"], batch=32, seed=None)
    assert (recipe.rank, recipe.lr, recipe.batch, recipe.seed) == (4, 3e-4, 32, 7)
    assert load_recipe() == Recipe()


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "3.e-4", "0.3e-3", "+3e-4", "0.0003", ".3e-3"])
def test_numbers_as_people_write_them(text):
    recipe = load_recipe(None, [f"lr={text}", f"options.x={text}"])
    assert recipe == Recipe(lr=3e-4, options={"x": 3e-4})


def test_dotted_keys_reach_into_mappings_and_add_to_the_file(tmp_path):
    path = written(tmp_path, "options: {init: kaiming}\nrank_pattern: {k_proj: 2}\n")
    pairs = ["options.init=gaussian", "rank_pattern.layers.0.q_proj=8", "alpha_pattern.v_proj=1e1"]
    recipe = load_recipe(path, pairs)
    assert recipe.options == {"init": "gaussian"}
    assert recipe.rank_pattern == {"k_proj": 2, "layers.0.q_proj": 8}
    assert recipe.alpha_pattern == {"v_proj": 10.0}


def test_lists_are_yaml():
    pairs = ["targets=[q_proj, v_proj]", "betas=[0.8, 0.95]", "trackers=[tensorboard]"]
    recipe = load_recipe(None, pairs)
    assert recipe.targets == ("q_proj", "v_proj")
    assert recipe.betas == (0.8, 0.95)
    assert recipe.trackers == ("tensorboard",)
    assert load_recipe(None, ["targets=all-linear"]).targets == "all-linear"


FULL = Recipe(
    rank=3, alpha=1 / 3, targets=("a", "b"), options={"init": "gaussian", "n": 1e-7},
    rank_pattern={"x.y": 2}, lr=3e-4, steps=5,
)  # fmt: skip


@pytest.mark.parametrize("recipe", [Recipe(), FULL, Recipe(warmup_steps=5)], ids=str)
def test_yaml_round_trips(tmp_path, recipe):
    assert load_recipe(written(tmp_path, recipe.to_yaml())) == recipe


def test_every_bad_field_at_once_with_its_source(tmp_path):
    path = written(tmp_path, "rank: 0\nlrr: 1\nrank_pattern: {q_proj: x}\n")
    message = refused(path, ["dropout=1.5", "packing=perhaps"], batch=-1)
    for part in [
        f"rank: found 0 (from {path}), expected greater than or equal to 1",
        f"lrr (from {path}) is not a field of a recipe: did you mean lr",
        f"rank_pattern.q_proj: found 'x' (from {path})",
        "dropout: found 1.5 (from --set), expected less than 1",
        "packing: found 'perhaps' (from --set), expected on or off",
        "batch: found -1 (from --batch)",
    ]:
        assert part in message


def test_choices_say_what_is_accepted():
    for name, wrong, words in (
        ("storage", "fp4", "'nf4', 'int8', 'fp8', 'int4', 'mxfp4', 'bf16', 'fp32' or 'auto'"),
        ("optimizer", "adamax", "'auto', 'adamw', 'adamw8bit' or 'paged-adamw8bit'"),
        ("gradient_checkpointing", "perhaps", "on or off"),
    ):
        said = f"{name}: found '{wrong}' (from --{name.replace('_', '-')}), expected {words}"
        assert said in refused(**{name: wrong})
    assert "expected a valid string or a valid tuple" in refused(None, ["targets=3"])


@pytest.mark.parametrize(
    ("word", "truth"), [("on", True), ("off", False), ("true", True), ("false", False)]
)
def test_on_and_off_are_words_on_the_command_line_and_truth_in_a_recipe(tmp_path, word, truth):
    file = written(tmp_path, f"gradient_checkpointing: {word}\n")
    for recipe in (
        load_recipe(gradient_checkpointing=word), load_recipe(file),
        load_recipe(None, [f"gradient_checkpointing={word}"]),
    ):  # fmt: skip
        assert recipe.gradient_checkpointing is truth


def test_unknown_without_a_near_name_lists_the_known():
    assert "expected one of method, rank" in refused(None, ["zzzzzz=1"])


def test_truth_is_no_number():
    assert "rank: found True (from --set)" in refused(None, ["rank=true"])
    assert load_recipe(None, ["packing=false"]).packing is False


@pytest.mark.parametrize("value", [".inf", ".nan", "0", "-1e-4"])
def test_learning_rates_are_finite_and_positive(value):
    assert "lr: found" in refused(None, [f"lr={value}"])


def test_micro_batches_divide_the_batch():
    assert "accumulate: found 3, expected a divisor of batch, which is 8" in refused(accumulate=3)
    assert Recipe(batch=8, accumulate=4).accumulate == 4


def test_a_warm_up_is_a_share_or_a_number_of_steps():
    assert "warmup_steps: found beside warmup" in refused(warmup=0.1, warmup_steps=5)
    group = {"params": [torch.zeros(1)], "lr": 0.0, "peak": 6.0}
    optimizer, rates = torch.optim.SGD([group]), []
    for step in range(8):
        set_learning_rates(optimizer, Recipe(warmup_steps=5, schedule="constant"), step, 8)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 6.0, 6.0]


@pytest.mark.parametrize(
    ("pair", "part"),
    [
        ("rank", "expected key=value"),
        ("=3", "expected key=value"),
        ("lr.x=1", "lr has no entries"),
        ("rank=[1", "not YAML"),
    ],
)
def test_bad_pairs(pair, part):
    message = refused(None, [pair])
    assert f"--set {pair}: " in message
    assert part in message


def test_bad_files(tmp_path):
    assert "No such file" in refused(tmp_path / "none.yaml")
    assert "found a list" in refused(written(tmp_path, "- rank\n"))
    assert "not YAML at line 3, column" in refused(written(tmp_path, "rank: 4\nlr: [1\nx: }\n"))
    assert load_recipe(written(tmp_path, "# nothing yet\n")) == Recipe()


def test_frozen_and_described():
    with pytest.raises(LorafoldError, match=r"^recipe: rank: .* as in lf\.Recipe\(rank=3\)$"):
        Recipe().rank = 3
    assert all(field.description for field in Recipe.model_fields.values())


@pytest.mark.parametrize(
    ("recipe", "rows", "total", "interval"),
    [
        (Recipe(), 100, 100, 10),
        (Recipe(epochs=1), 100, 13, 2),
        (Recipe(epochs=0.01), 100, 1, 1),
        (Recipe(steps=40), 3, 40, 4),
        (Recipe(steps=40, save_every=7), 3, 40, 7),
    ],
)
def test_length_of_a_run(recipe, rows, total, interval):
    assert recipe.total_steps(rows) == total
    assert recipe.checkpoint_interval(total) == interval


def test_the_module_imports_no_torch():
    heavy = "{'torch', 'transformers'} & {*sys.modules}"
    code = f"import sys, lorafold.recipe.recipe; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rnak": 8}, "rnak is not a field of a recipe: did you mean rank?"),
        ({"rank": "x", "batch": 0},
         "rank: found 'x', expected a whole number; batch: found 0, expected greater than or equal"
         " to 1"),
        ({"accumulate": 3}, "accumulate: found 3, expected a divisor of batch, which is 8"),
    ],
)  # fmt: skip
def test_a_recipe_of_a_call_is_refused_in_one_line_too(fields, said):
    assert refusal(Recipe, **fields) == f"recipe: {said}"


def test_a_field_under_its_old_name_is_told_of_the_caller_s_line():
    with pytest.warns(DeprecationWarning, match="storage now") as told:
        Recipe(base="int8")
    assert [one.filename for one in told] == [__file__]
