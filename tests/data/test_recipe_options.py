"""Every field of the recipe is an option, made from `Recipe` itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from lorafold.api.options import RecipeOptions
from lorafold.cli import _load
from lorafold.cli.commands import built
from lorafold.recipe.fields import GROUPS
from lorafold.recipe.recipe import Recipe

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
    app.command()(built(remember, run).function)
    done = CliRunner().invoke(app, arguments)
    if done.exception is not None:
        raise done.exception
    return FOUND.pop()


def test_every_field_has_an_option_with_help_in_a_panel() -> None:
    options = {p.name: p for p in _load("train").params}
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
        (("--train-on", "last", "--mask-reasoning"),
         {"train_on": "last", "mask_reasoning": True}),
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
