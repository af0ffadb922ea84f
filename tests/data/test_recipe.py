"""The recipe: precedence, options made of its fields, and errors that suggest our names."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer
from typer.testing import CliRunner

import lorafold as lf
from error_cases import refusal
from lorafold.api.options import RecipeOptions
from lorafold.cli import load_command
from lorafold.cli.commands import build_command
from lorafold.config_import import axolotl, llamafactory, mlx, trl
from lorafold.config_import.rules import ToolSettings
from lorafold.errors import LorafoldError
from lorafold.foreign_options import FOREIGN_OPTIONS, OWNERS, with_suggestions
from lorafold.methods import make_spec
from lorafold.recipe.fields import GROUPS, Fields
from lorafold.recipe.parsing import load_recipe
from lorafold.recipe.recipe import Recipe
from lorafold.training_step.param_groups import set_learning_rates


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
    assert "warmup_steps: found together with warmup" in refused(warmup=0.1, warmup_steps=5)
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
         "rank: found 'x', expected an integer; batch: found 0, expected greater than or equal"
         " to 1"),
        ({"accumulate": 3}, "accumulate: found 3, expected a divisor of batch, which is 8"),
    ],
)  # fmt: skip
def test_a_recipe_of_a_call_is_refused_in_one_line_too(fields, said):
    assert refusal(Recipe, **fields) == f"recipe: {said}"


def test_a_field_under_its_old_name_is_told_of_the_caller_s_line():
    with pytest.warns(DeprecationWarning, match="is now called storage") as told:
        Recipe(base="int8")
    assert [one.filename for one in told] == [__file__]


FOUND: list[Recipe] = []


def remember(recipe: Annotated[Recipe | None, RecipeOptions()] = None) -> None:
    """Remembers the recipe."""
    assert recipe is not None
    FOUND.append(recipe)


def run(call: Callable[[], None]) -> None:
    """Only calls."""
    call()


def asked(*arguments: str) -> Recipe:
    app = typer.Typer()
    app.command()(build_command(remember, run).function)
    done = CliRunner().invoke(app, arguments)
    if done.exception is not None:
        raise done.exception
    return FOUND.pop()


def test_every_field_has_an_option_with_help_in_a_panel() -> None:
    options = {p.name: p for p in load_command("train").params}
    assert options.keys() >= Recipe.model_fields.keys()
    for name, info in Recipe.model_fields.items():
        assert str(info.description) in options[name].help
        assert options[name].rich_help_panel.startswith("Recipe, ")
    assert next(iter(Recipe.model_fields)) in GROUPS
    assert GROUPS.keys() <= Recipe.model_fields.keys()


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ((), {}),
        (("--rank", "8", "--lr", "1e-4", "--epochs", "3"), {"rank": 8, "lr": 1e-4, "epochs": 3.0}),
        (("--targets", "all-linear"), {"targets": "all-linear"}),
        (("--targets", "mlp"), {"targets": "mlp"}),
        (("--targets", "q_proj"), {"targets": ("q_proj",)}),
        (("--targets", r".*\.q_proj"), {"targets": r".*\.q_proj"}),
        (("--targets", "q_proj", "--targets", "v_proj"), {"targets": ("q_proj", "v_proj")}),
        (("--options", "init=pissa"), {"options": {"init": "pissa"}}),
        (
            ("--rank-pattern", "0.q_proj=8", "--rank-pattern", "v_proj=4"),
            {"rank_pattern": {"0.q_proj": 8, "v_proj": 4}},
        ),
        (
            ("--template-kwargs", "enable_thinking=false", "--template-kwargs", "name=Ada"),
            {"template_kwargs": {"enable_thinking": False, "name": "Ada"}},
        ),
        (("--train-on", "last", "--mask-reasoning"), {"train_on": "last", "mask_reasoning": True}),
        (("--betas", "0.8", "0.95"), {"betas": (0.8, 0.95)}),
        (("--packing", "off"), {"packing": False}),
        (("--gradient-checkpointing", "on"), {"gradient_checkpointing": True}),
        (("--gradient-checkpointing", "auto"), {"gradient_checkpointing": "auto"}),
        (("--new-tokens", "<|a|>, <|b|>", "--new-tokens", "[c]"),
         {"new_tokens": ("<|a|>", "<|b|>", "[c]")}),
        (("--set", "rank=4", "--rank", "8"), {"rank": 8}),
        (("--set", "rank=4", "--storage", "bf16"), {"rank": 4, "storage": "bf16"}),
        (("--trackers", "tensorboard"), {"trackers": ("tensorboard",)}),
        (("--seed", "0"), {"seed": 0}),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_is_asked_is_set_and_nothing_else(arguments, fields) -> None:
    recipe = asked(*arguments)
    assert recipe == Recipe(**fields)
    assert recipe.model_fields_set == fields.keys()


def test_a_file_gives_way_to_pairs_and_these_to_options(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("rank: 2\nlr: 1e-5\nbatch: 4\n")
    found = asked("--config", str(file), "--set", "lr=1e-4", "--set", "rank=3", "--rank", "4")
    assert (found.rank, found.lr, found.batch) == (4, 1e-4, 4)


def test_what_is_wrong_names_the_option() -> None:
    with pytest.raises(Exception, match=r"rank: found 0 \(from --rank\), expected greater"):
        asked("--rank", "0")
    with pytest.raises(Exception, match=r"storage: found 'fp4' \(from --storage\), expected 'nf4'"):
        asked("--storage", "fp4")


TOOLS = trl.RULES | {
    "axolotl": axolotl.RULES, "llamafactory": llamafactory.RULES, "mlx": mlx.RULES
}  # fmt: skip
# a value of each name; of the others 2
VALUES = {
    "lr_scheduler_type": "cosine_with_restarts",
    "lr_scheduler": "linear",
    "optim": "adamw_bnb_8bit",
    "dtype": "float16",
    "torch_dtype": "auto",
    "target_modules": "q_proj,v_proj",
    "lora_target_modules": ["q_proj"],
    "lora_target": "all",
    "lora_modules_to_save": ["lm_head"],
    "additional_target": "lm_head",
    "report_to": ["wandb"],
    "val_set_size": 0.1,
    "val_size": 0.1,
    "test_split_size": 0.1,
    "warmup_ratio": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "lora_dropout": 0.0,  # which some turn off
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit", "bf16", "fp16", "use_dora", "use_rslora"), True
    ),
    **dict.fromkeys(("sample_packing", "neat_packing", "grad_checkpoint", "float16"), True),
    **dict.fromkeys(("bfloat16", "peft_use_dora", "peft_use_rslora"), True),
}
# a batch of completions, which depends on another key
OTHERWISE = {
    ("trl-grpo", "per_device_train_batch_size"),
    ("trl-rloo", "per_device_train_batch_size"),
}


def test_each_name_is_a_field_or_an_option_of_a_verb():
    known = {*Fields.model_fields, *OWNERS}
    assert {name for option in FOREIGN_OPTIONS.values() for name in option.fields} <= known


@pytest.mark.parametrize("tool", TOOLS)
def test_the_table_agrees_with_what_files_of_other_tools_become(tool):
    compared = 0
    rules = {rule.key: rule for rule in TOOLS[tool]}
    for key in rules.keys() & FOREIGN_OPTIONS.keys():
        value = VALUES.get(key, 2)
        settings = ToolSettings({key: value}, {k: rule.default for k, rule in rules.items()})
        try:
            outcome = rules[key].reader(value, settings)
        except lf.LorafoldError:  # it asks for another key beside it
            continue
        fields = outcome.fields if outcome else {}
        ours = FOREIGN_OPTIONS[key].read(value, {key: value})
        for name in fields.keys() & ours.keys():
            compared += (tool, key) not in OTHERWISE
            assert (tool, key) in OTHERWISE or fields[name] == ours[name], key
    assert compared > 5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learning_rate": 1e-4}, "use lr=0.0001, lr_b=0.0001 (the same learning"),
        ({"lora_r": "16"}, "use rank=16"),
        ({"num_train_epochs": 3}, "use epochs=3.0"),
        ({"load_in_4bit": True}, "use storage='nf4'"),
        ({"load_in_4bit": "perhaps"}, "use storage"),
        (
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
            "use batch=8 (micro-batch times gradient accumulation, for one process);"
            " gradient_accumulation_steps is not a field of a recipe: use accumulate=4",
        ),
        ({"model_name_or_path": "m"}, "use model='m' of lf.train"),
        ({"rnak": 8}, "did you mean rank?"),
    ],
)
def test_a_recipe_says_what_a_name_is_here_wherever_it_stands(tmp_path, given, said):
    with pytest.raises(lf.LorafoldError) as caught:
        lf.Recipe(**given)
    assert said in str(caught.value)
    with pytest.raises(lf.LorafoldError) as caught:
        load_recipe(None, [f"{name}={value}" for name, value in given.items()])
    assert said.split("'")[0].split(" is not")[0] in str(caught.value).replace(" (from --set)", "")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: lf.LoRA(r=8), "LoRA has no option r; use rank=8"),
        (
            lambda: lf.LoRA(8, lora_alpha=16),
            "LoRA has no option lora_alpha; use alpha=16.0",
        ),
        (lambda: lf.LoRA(use_rslora=True), "LoRA has no option use_rslora; did you mean rslora?"),
        (lambda: lf.VeRA(rnak=8), "VeRA has no option rnak; did you mean rank?"),
        (lambda: lf.IA3(colour=8), "IA3 has no option colour; options: "),
        (
            lambda: lf.LoRA(target_modules=["q_proj"]),
            "use targets=('q_proj',) of lf.attach or lf.Recipe",
        ),
        (lambda: make_spec("lora", r=8), "method lora has no option r; use rank=8"),
        (
            lambda: lf.attach(linear(), lf.LoRA(), target_modules=["0"]),
            "attach has no option target_modules; use targets=('0',)",
        ),
        (
            lambda: lf.attach(linear(), r=8),
            "attach has no option r; use rank=8 of lf.LoRA",
        ),
    ],
)
def test_specs_and_attach_say_what_a_name_is_here(call, said):
    with pytest.raises(lf.LorafoldError) as caught:
        call()
    assert said in str(caught.value)
    assert isinstance(caught.value, TypeError)


def linear():
    return torch.nn.Sequential(torch.nn.Linear(3, 3))


def test_what_is_advised_is_the_same_function():
    def grown(size: int, *, by: int = 1) -> int:
        """So much larger."""
        return size + by

    assert with_suggestions(grown)(2, by=3) == 5
    assert with_suggestions(grown).__doc__ == grown.__doc__
    with pytest.raises(TypeError):  # Python's own
        with_suggestions(grown)()
