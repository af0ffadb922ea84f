"""A verb is declared once, and the command is made of it."""

import inspect
import re
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, TypedDict, Unpack

import pytest
import torch
from typer.testing import CliRunner

import lorafold as lf
from adapter_cases import make_adapter
from command_cases import rows_file, words
from conftest import lorafold, refused, unestimating
from lorafold.api.options import (
    DeclaredOption,
    Docs,
    Option,
    Progress,
    RecipeOptions,
    declared_options,
)
from lorafold.cli import COMMANDS, app, commands, function_of, load_command
from lorafold.cli.command_handlers import RUNNERS
from lorafold.cli.command_line import OLD_NAMES
from lorafold.cli.recipe_options import fields_in
from lorafold.errors import LorafoldError
from lorafold.inspecting.resize import resize
from lorafold.peft.adapter_directory import open_all
from lorafold.resolve import Base
from source_size import limit

NEW_KEY = "serve new-key"
NAMES = [*COMMANDS, NEW_KEY]
# which of a base's parameters a verb has; `train` and studies have the storage in their recipe
HUB = {"model", "revision", "trust_remote_code"}
COMPUTES = {*HUB, "device"}
LOADS = {*COMPUTES, "storage", "allow_other_base"}
BASES = {
    **dict.fromkeys(
        ("eval", "score", "generate", "chat", "serve", "merge", "export", "compose", "inspect",
         "resize", "fragility"), LOADS,
    ),
    **dict.fromkeys(("estimate", "extract", "doctor"), HUB),
    **dict.fromkeys(("intrinsic", "compare"), COMPUTES),
    "train": {*COMPUTES, "allow_other_base"},
}  # fmt: skip
# options that are not called as the parameter: one of a list, an opposite, a keyword of Python
CALLED = {
    "adapter": "--adapter", "adapters": "--adapter", "weights": "--weight", "rewards": "--reward",
    "prompts": "--prompt", "prove": "--proof", "source": "--from", "open_page": "--open",
    "tenant": "TENANT",
}  # fmt: skip
CLI = Path(commands.__file__).parent


def options(verb: str) -> dict[str, list[str]]:
    return {str(p.name): [*p.opts, *p.secondary_opts] for p in command_of(verb).params}


def command_of(name: str) -> Any:
    first, *below = name.split()
    return load_command(first).commands[below[0]] if below else load_command(first)


def declarations(name: str) -> list[tuple[str, DeclaredOption]]:
    """What a command declares, each with the place: its verb and what runs it."""
    runner = RUNNERS.get(name, commands.print_result)
    found = [("verb", one) for one in declared_options(function_of(name))]
    of_runner = (one for one in declared_options(runner) if one.default is not Parameter.empty)
    found += [("runner", one) for one in of_runner]
    return [(place, one) for place, one in found if not getattr(one.option, "python_only", False)]


def test_every_verb_that_opens_a_model_is_in_the_table() -> None:
    assert {v for v in COMMANDS if "model" in options(v)} == set(BASES)


@pytest.mark.parametrize("verb", BASES)
def test_a_verb_has_the_parameters_of_a_base_that_bear_on_it(verb: str) -> None:
    fields = {*Base.__dataclass_fields__}
    own = {"device"} if verb == "estimate" else set()  # says more there
    found = {one.name for place, one in declarations(verb) if place == "verb"}
    assert fields & found == BASES[verb] | own


@pytest.mark.parametrize("name", NAMES)
def test_an_option_is_declared_once(name: str) -> None:
    places = declarations(name)
    assert len({one.name for _, one in places}) == len(places)
    recipes = [one for _, one in places if isinstance(one.option, RecipeOptions)]
    plain = {one.name: one for _, one in places if one not in recipes}
    expected = set[str]()
    for n, one in plain.items():
        option = one.option
        assert isinstance(option, Option)
        assert one.help, n
        flag = option.flag.split("/")[0] or ("--adapter" if option.saved else "")
        assert flag in ("", CALLED.get(n)), n
        second = (option.second_flag or ())[:1]
        expected |= {flag or f"--{n.replace('_', '-')}", *second} - {"TENANT"}
    for one in recipes:
        assert isinstance(one.option, RecipeOptions)
        expected |= {f"--{n.replace('_', '-')}" for n in ("set", *fields_in(one.option))}
        expected |= {"--config"} if one.option.config else set()
    params = [p for p in command_of(name).params if p.param_type_name == "option"]
    assert {p.opts[-1] for p in params} - {"--help", "--help-all"} == expected
    more = {p.opts[0]: p.opts[1:] for p in params if len(p.opts) > 1}
    assert {*more} - {"--quantization", "--help"} == set()


def test_the_text_of_an_option_stands_once() -> None:
    """Nothing but the builder declares an option to Typer."""
    texts: dict[tuple[str, str], set[int]] = {}
    for name in NAMES:
        for _, one in declarations(name):
            if not isinstance(one.option, RecipeOptions):
                shared = id(one.option.help) if one.option.help else hash(name)
                texts.setdefault((one.name, one.help), set()).add(shared)
    twice = {key: places for key, places in texts.items() if len(places) > 1}
    assert len(twice) <= limit("options_declared_twice"), twice
    declaring = {
        p.name for p in CLI.glob("*.py") if re.search(r"typer\.(Option|Argument)\(", p.read_text())
    }
    of_help = {"help.py", "__init__.py"}  # --help-all, --version
    assert declaring - of_help == {"parameters.py"}


def test_what_would_be_declared_twice_is_found() -> None:
    class Two(TypedDict, total=False):
        rank: Annotated[int, Option("The rank.")]

    def twice(rank: int = 1, *, console: Progress = None, **more: Unpack[Two]) -> None:
        """Has it twice."""

    assert [one.name for one in declared_options(twice)].count("rank") == 2


@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_of_a_parameter_reaches_the_reader_of_python(name: str) -> None:
    entries = Docs.of(function_of(name)).args
    declared = [one for _, one in declarations(name) if one.help]
    told = {one.group[0] if one.group else one.name for one in declared}
    assert told & {n for n in inspect.signature(function_of(name)).parameters} <= entries.keys()


@pytest.mark.parametrize("verb", NAMES)
def test_no_option_has_an_old_name(verb: str) -> None:
    assert not OLD_NAMES.keys() & {name for names in options(verb).values() for name in names}


def test_old_names_work_and_say_what_they_are_called_now(tiny_model_dir, tmp_path: Path) -> None:
    asked = ["estimate", "--model", str(tiny_model_dir("llama")), "--mode", "inference"]
    told = CliRunner().invoke(app, [*asked, "--seq", "8", "--base=int8"])
    now = CliRunner().invoke(app, [*asked, "--max-length", "8", "--storage", "int8"])
    assert told.exit_code == now.exit_code == 0
    assert told.stdout == now.stdout
    assert told.stderr.splitlines()[:2] == [
        "--seq is now called --max-length; lorafold 0.3 will no longer accept --seq",
        "--base is now called --quantization; lorafold 0.3 will no longer accept --base",
    ]
    with pytest.warns(DeprecationWarning, match=r"max_length; lorafold 0\.3"):
        old = lf.estimate(tiny_model_dir("llama"), "lora", length=16)
    assert old.total == lf.estimate(tiny_model_dir("llama"), "lora", max_length=16).total


def test_a_recipe_keeps_the_old_names_of_its_fields(tmp_path: Path, caplog) -> None:
    from lorafold.recipe.parsing import load_recipe

    file = tmp_path / "recipe.yaml"
    file.write_text("base: int8\n")
    with pytest.warns(DeprecationWarning, match=r"base is now called storage; lorafold 0\.3"):
        assert lf.Recipe(base="int8") == lf.Recipe(storage="int8") == load_recipe(file)
    assert load_recipe(file, ["base=fp32"]).storage == "fp32"
    assert "--set base is now called --set storage; lorafold 0.3" in caplog.text
    assert load_recipe(file, storage="bf16").base == "bf16"
    with pytest.raises(LorafoldError, match="base: has the same meaning as storage"):
        lf.Recipe(base="int8", storage="fp32")
    file.write_text("base: int8\nstorage: fp32\n")
    with pytest.raises(LorafoldError, match=r"recipe\.yaml: base: has the same meaning as storage"):
        load_recipe(file)
    with pytest.raises(LorafoldError, match="--set base: has the same meaning as --set storage"):
        load_recipe(None, ["base=fp32", "storage=fp32"])


def test_quantization_is_another_name_for_storage(tiny_model_dir, tmp_path: Path) -> None:
    from lorafold.recipe.parsing import load_recipe

    model, file = tiny_model_dir("llama"), tmp_path / "recipe.yaml"
    asked = ["estimate", "--model", str(model), "--mode", "inference"]
    alias = CliRunner().invoke(app, [*asked, "--quantization", "int8"])
    assert alias.stdout == CliRunner().invoke(app, [*asked, "--storage", "int8"]).stdout
    assert "quantization" not in alias.stderr
    file.write_text("quantization: int8\n")
    expected = lf.Recipe(storage="int8")
    assert lf.Recipe(quantization="int8") == expected == load_recipe(file)  # type: ignore[call-arg]
    assert load_recipe(None, ["quantization=int8"]) == expected
    assert lf.load_model(model, quantization="fp32").dtype == torch.float32
    with pytest.raises(LorafoldError, match="storage foo: unknown"):
        lf.generate(model, "a", quantization="foo")  # type: ignore[call-arg]
    with pytest.raises(LorafoldError, match="quantization: has the same meaning as storage"):
        lf.generate(model, "a", quantization="fp32", storage="fp32")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("estimate", "--quantization=nf4", "--storage=fp32"), "--quantization: found nf4"),
        (("estimate", "--base", "nf4", "--storage=fp32"), "base: has the same meaning as --sto"),
        (("estimate", "--mode", "nf4", "--method=fp32"), "--method: has the same meaning"),
        (("estimate", "--seq=8", "--max-length", "9"), "--seq: has the same meaning as --max-"),
        (("eval", "--answers", "--no-completions"), "the same meaning as --no-completions"),
    ],
)
def test_an_option_is_given_under_one_of_its_names(given: tuple[str, ...], said: str) -> None:
    assert said in str(CliRunner().invoke(app, [*given]).exception)


def test_lengths_are_given_under_one_name() -> None:
    with pytest.raises(LorafoldError, match="length: has the same meaning as max_length"):
        lf.estimate(length=8, max_length=9)


def test_a_value_may_read_like_the_old_name_of_an_option(tmp_path: Path) -> None:
    asked = ["generate", "--prompt", "--base", "--model", str(tmp_path / "absent")]
    done = CliRunner().invoke(app, [*asked, "--seed", "1"])
    assert "is now called" not in done.stderr
    assert "no such file" in str(done.exception)


def test_adapters_are_named_by_position_or_by_option_and_not_by_both(tmp_path: Path) -> None:
    asked = ["inspect", str(tmp_path / "one")]
    by_name = CliRunner().invoke(app, ["inspect", "--adapter", str(tmp_path / "one")])
    assert str(CliRunner().invoke(app, asked).exception) == str(by_name.exception)
    both = CliRunner().invoke(app, [*asked, "--adapter", str(tmp_path / "two")])
    assert "either by position or with --adapter" in str(both.exception)
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


def test_paths_may_begin_with_a_tilde_at_both_faces(tiny_model_dir, tmp_path, monkeypatch) -> None:
    base = tiny_model_dir("llama")
    make_adapter(base, tmp_path / "ad")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "recipe.yaml").write_text("steps: 1\nbatch: 1\nstorage: fp32\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = ["--data=~/rows.jsonl", "--out=~/one", "--config=~/recipe.yaml", "--over=~/ad"]
    done = lorafold("train", *asked, "--model", str(base), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lf.compose(["~/ad"], "~/two", model=base)
    merged = {"adapter": ["~/ad", "~/one"], "probe": "~/rows.jsonl", "out": "~/three"}
    done = lorafold(*words("merge", **merged, model=base, device="cpu"))
    assert done.returncode == 0, done.stderr
    lf.load(lf.load_model(base), "~/two").save("~/four")
    assert {"one", "two", "three", "four"} <= {path.name for path in tmp_path.iterdir()}


def test_a_recipe_is_a_recipe_at_every_verb(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    said = r"recipe: found dict, expected an lf\.Recipe"
    with pytest.raises(LorafoldError, match=said):
        lf.train({"rank": 2}, data=rows, out=tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(LorafoldError, match=said):
        lf.estimate(recipe={"rank": 2})  # type: ignore[arg-type]
    with pytest.raises(LorafoldError, match=said):
        lf.compare(tmp_path / "out", recipe={"rank": 2})  # type: ignore[arg-type]


def test_resize_reads_columns_and_refuses_in_one_wording(tiny_model_dir, tmp_path: Path) -> None:
    base = tiny_model_dir("llama")
    make_adapter(base, tmp_path / "a")
    data = rows_file(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}])
    named = {"columns": "prompt=question,completion=answer", "rank": 1, "device": "cpu"}
    given = {"model": base, "out": tmp_path / "out", "data": data}
    done = lorafold(*words("resize", tmp_path / "a", **given, **named))
    assert "loss " in done.stdout, done.stderr
    with pytest.raises(LorafoldError, match="--energy: found 2, expected a share above 0"):
        resize(Base(base), open_all([tmp_path / "a"]), tmp_path / "b", energy=2)


def test_generate_counts_tokens(tiny_model_dir) -> None:
    asked = ["generate", "--model", str(tiny_model_dir("llama")), "--prompt", "Hi"]
    for n in (2, 3):
        done = lorafold(*asked, "--max-new-tokens", str(n), "--device", "cpu", "--storage", "fp32")
        assert f"\n{n} tokens, " in done.stderr


def test_the_kinds_of_the_cache_are_listed() -> None:
    from lorafold.files.cache import KINDS

    told = " ".join(CliRunner().invoke(app, ["cache", "--help"]).stdout.split())
    assert f"Only this kind: {', '.join(KINDS)}." in told


@pytest.fixture(scope="module")
def judge(tiny_model_dir, tmp_path_factory) -> Path:
    path, base = tmp_path_factory.mktemp("judge") / "judge", tiny_model_dir("llama")
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    recipe = lf.Recipe(objective="reward", steps=1, batch=2, storage="fp32")
    with unestimating():
        lf.train(recipe, data=pairs, out=path, model=base, device="cpu")
    return path


@pytest.mark.parametrize("verb", ["inspect", "resize", "train"])
def test_a_reward_model_is_called_one_by_every_verb(
    verb: str, judge: Path, tiny_model_dir, tmp_path: Path
) -> None:
    base, rows = tiny_model_dir("llama"), tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    out = ["--out", tmp_path / "out", "--model", base]
    asked = {
        "inspect": [judge, "--model", base],
        "resize": [judge, "--rank", "1", *out],
        "train": ["--over", judge, "--data", rows, "--storage", "fp32", *out],
    }[verb]
    said = refused(verb, *map(str, asked))
    assert "found a reward model, expected an adapter of a language model" in said
