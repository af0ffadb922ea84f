"""A verb has the same options at every face: what the command takes, the function takes too, under
one name; and what reaches a base at one face reaches it at both.
"""

import inspect
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lorafold as lf
from adapter_cases import make_adapter
from conftest import refused
from lorafold.cli import _load, app
from lorafold.cli.groups import OLD_NAMES
from lorafold.opening import Base
from lorafold.recipe.recipe import Recipe

HUB = {"model", "revision", "trust_remote_code"}
COMPUTES = {*HUB, "device"}
LOADS = {*COMPUTES, "storage", "allow_other_base"}
# verb: its function, and which of a base's options it has; `train` has the storage in its recipe
VERBS = {
    "train": ("train", {*COMPUTES, "allow_other_base"}),
    "eval": ("evaluate", LOADS),
    "score": ("score", LOADS),
    "generate": ("generate", LOADS),
    "chat": ("chat", LOADS),
    "serve": ("serve", LOADS),
    "merge": ("merge", LOADS),
    "estimate": ("estimate", COMPUTES),
    "compose": ("compose", LOADS),
    "inspect": ("inspect", LOADS),
    "resize": ("resize", LOADS),
    "extract": ("extract", HUB),
    "intrinsic": ("intrinsic", COMPUTES),
    "compare": ("compare", COMPUTES),
    "fragility": ("fragility", LOADS),
}
# what the command alone has: how it prints, and what a call in Python does by other means
OF_COMMANDS = {"json", "html", "config", "sets", "help", "preview", "cheatsheet", "fail_under"}
BY_OTHER_MEANS = {"score": {"out", "overwrite"}}  # the scores have `write`
# options whose parameter stands in the plural, since a call takes a list where a command repeats
PLURAL = {
    "adapter": "adapters", "weight": "weights", "rank": "ranks", "lr": "rates",
    "defence": "defences", "against_adapter": "against", "refusal_prefix": "refusal",
    "compliance_prefix": "compliance", "prompt": "prompts", "positional": "adapters",
}  # fmt: skip
# of `serve`, which takes them as `settings`
SETTINGS = {"host", "port", "keys", "admin_key_file", "metrics_key_file", "json_logs"}
FIELDS = {*Base.__dataclass_fields__}


def options(verb: str) -> dict[str, list[str]]:
    """The names of a command's options, by parameter."""
    return {str(p.name): [*p.opts, *p.secondary_opts] for p in _load(verb).params}


def parameters(function: str) -> set[str]:
    return set(inspect.signature(getattr(lf, function)).parameters)


def test_every_verb_that_opens_a_model_is_in_the_table() -> None:
    from lorafold.cli import COMMANDS

    assert {v for v in COMMANDS if "model" in options(v)} == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_base_has_the_same_options_at_both_faces(verb: str) -> None:
    function, expected = VERBS[verb]
    from_recipe = {"storage"} if verb in ("train", "estimate", "intrinsic", "compare") else set()
    assert FIELDS & parameters(function) == expected
    assert FIELDS & options(verb).keys() == expected | from_recipe


@pytest.mark.parametrize("verb", VERBS)
def test_what_the_command_takes_the_function_takes_by_the_same_name(verb: str) -> None:
    taken = parameters(VERBS[verb][0])
    known = set(Recipe.model_fields) if "recipe" in taken else set()
    known |= SETTINGS if "settings" in taken else set()
    lost = {
        name
        for name in options(verb).keys() - OF_COMMANDS - BY_OTHER_MEANS.get(verb, set()) - known
        if name not in taken and PLURAL.get(name) not in taken
    }
    assert lost <= {"context", "adapter", "positional"}
    assert lost <= {"context"} or "adapter" in taken


@pytest.mark.parametrize("verb", VERBS)
def test_no_option_has_an_old_name(verb: str) -> None:
    assert not OLD_NAMES.keys() & {name for names in options(verb).values() for name in names}


def test_old_names_work_and_say_what_they_are_called_now(tiny_model_dir, tmp_path: Path) -> None:
    told = CliRunner().invoke(
        app, ["estimate", "--params", "7b", "--mode", "inference", "--seq", "8", "--base=int8"]
    )
    int8 = ("--storage", "int8")
    now = CliRunner().invoke(
        app,
        ["estimate", "--params", "7b", "--mode", "inference", "--max-length", "8", *int8],
    )
    assert told.exit_code == now.exit_code == 0
    assert told.stdout == now.stdout
    assert told.stderr.splitlines()[:2] == [
        "--seq is called --max-length now; lorafold 0.3 no longer takes --seq",
        "--base is called --storage now; lorafold 0.3 no longer takes --base",
    ]
    with pytest.warns(DeprecationWarning, match=r"max_length now; lorafold 0\.3"):
        old = lf.estimate(tiny_model_dir("llama"), "lora", length=16)
    assert old.total == lf.estimate(tiny_model_dir("llama"), "lora", max_length=16).total


def test_a_recipe_keeps_the_old_names_of_its_fields(tmp_path: Path) -> None:
    from lorafold.recipe.reading import load_recipe

    file = tmp_path / "recipe.yaml"
    file.write_text("base: int8\n")
    assert lf.Recipe(base="int8") == lf.Recipe(storage="int8") == load_recipe(file)
    assert load_recipe(file, ["base=fp32"]).storage == "fp32"
    assert load_recipe(file, storage="bf16").base == "bf16"
    with pytest.raises(Exception, match="base"):
        lf.Recipe(base="int8", storage="fp32")


def test_adapters_are_named_by_position_or_by_option_and_not_by_both(tmp_path: Path) -> None:
    asked = ["inspect", str(tmp_path / "one")]
    by_name = CliRunner().invoke(app, ["inspect", "--adapter", str(tmp_path / "one")])
    assert str(CliRunner().invoke(app, asked).exception) == str(by_name.exception)
    both = CliRunner().invoke(app, [*asked, "--adapter", str(tmp_path / "two")])
    assert "expected all adapters in one of the two ways" in str(both.exception)
    more = CliRunner().invoke(app, [*asked, str(tmp_path / "two")])
    assert "expected exactly one" in str(more.exception)
    none = CliRunner().invoke(app, ["merge", "--out", str(tmp_path / "out")])
    assert "ADAPTER: found none" in str(none.exception)


@pytest.mark.parametrize("verb", ["inspect", "resize", "compose"])
def test_a_word_that_is_unknown_is_refused_where_it_has_no_effect_too(
    verb: str, tiny_model_dir, tmp_path: Path
) -> None:
    base, adapter, more = tiny_model_dir("llama"), tmp_path / "a", ["--out", tmp_path / "out"]
    make_adapter(base, adapter)
    more += {"resize": ["--rank", "1"]}.get(verb, [])
    asked = [verb, adapter, "--model", base, *([] if verb == "inspect" else more)]
    for option, said in (("--storage", "storage foo: unknown"), ("--device", "found 'foo'")):
        assert said in refused(*map(str, [*asked, option, "foo"]))
