"""A verb has the same options at every face: what the command takes, the function takes too, under
one name; and what reaches a base at one face reaches it at both.
"""

import inspect
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lorafold as lf
from adapter_cases import make_adapter
from conftest import lorafold, refused, unestimating
from lorafold.cli import _load, app
from lorafold.cli.reading import OLD_NAMES
from lorafold.errors import LorafoldError
from lorafold.inspecting.resize import resize
from lorafold.opening import Base
from lorafold.peft.saved import open_all
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
    "export": ("export", {*COMPUTES, "allow_other_base", "storage"}),
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
OF_COMMANDS = {
    "json", "html", "plot", "wide", "config", "sets", "help", "help_all", "preview", "cheatsheet",
    "fail_under",
}  # fmt: skip
WORKERS = {"on", "workers"}  # a script is started several times
BY_OTHER_MEANS = {
    "score": {"out", "overwrite"},  # the scores have `write`
    "train": {"reward_adapter"},  # rewards="adapter:DIR"
    "compare": {"reward_adapter", *WORKERS},
    "intrinsic": WORKERS,
    "fragility": WORKERS,
    "estimate": {"reward_adapter"},
}
# options whose parameter stands in the plural, since a call takes a list where a command repeats
PLURAL = {
    "adapter": "adapters", "weight": "weights", "rank": "ranks", "lr": "rates",
    "defence": "defences", "against_adapter": "against", "refusal_prefix": "refusal",
    "compliance_prefix": "compliance", "prompt": "prompts", "positional": "adapters",
    "reward": "rewards",
}  # fmt: skip
# of `serve`, which takes them as `settings`
SETTINGS = {
    "host", "port", "keys", "admin_key_file", "metrics_key_file", "json_logs",
    "allow_control_tokens",
}  # fmt: skip
FIELDS = {*Base.__dataclass_fields__}


def options(verb: str) -> dict[str, list[str]]:
    """The names of a command's options, by parameter."""
    return {str(p.name): [*p.opts, *p.secondary_opts] for p in _load(verb).params}


def parameters(function: str) -> set[str]:
    return set(inspect.signature(getattr(lf, function)).parameters)


def test_every_verb_that_opens_a_model_is_in_the_table() -> None:
    from lorafold.cli import COMMANDS

    # doctor reads a tokenizer alone, and has no function
    assert {v for v in COMMANDS if "model" in options(v)} - {"doctor"} == set(VERBS)


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
    asked = ["estimate", "--model", str(tiny_model_dir("llama")), "--mode", "inference"]
    told = CliRunner().invoke(app, [*asked, "--seq", "8", "--base=int8"])
    now = CliRunner().invoke(app, [*asked, "--max-length", "8", "--storage", "int8"])
    assert told.exit_code == now.exit_code == 0
    assert told.stdout == now.stdout
    assert told.stderr.splitlines()[:2] == [
        "--seq is called --max-length now; lorafold 0.3 no longer takes --seq",
        "--base is called --storage now; lorafold 0.3 no longer takes --base",
    ]
    with pytest.warns(DeprecationWarning, match=r"max_length now; lorafold 0\.3"):
        old = lf.estimate(tiny_model_dir("llama"), "lora", length=16)
    assert old.total == lf.estimate(tiny_model_dir("llama"), "lora", max_length=16).total


def test_a_recipe_keeps_the_old_names_of_its_fields(tmp_path: Path, caplog) -> None:
    from lorafold.recipe.reading import load_recipe

    file = tmp_path / "recipe.yaml"
    file.write_text("base: int8\n")
    with pytest.warns(DeprecationWarning, match=r"base is called storage now; lorafold 0\.3"):
        assert lf.Recipe(base="int8") == lf.Recipe(storage="int8") == load_recipe(file)
    assert load_recipe(file, ["base=fp32"]).storage == "fp32"
    assert "--set base is called --set storage now; lorafold 0.3" in caplog.text
    assert load_recipe(file, storage="bf16").base == "bf16"
    with pytest.raises(LorafoldError, match="base: found it beside storage"):
        lf.Recipe(base="int8", storage="fp32")
    file.write_text("base: int8\nstorage: fp32\n")
    with pytest.raises(LorafoldError, match=r"recipe\.yaml: base: found it beside storage"):
        load_recipe(file)
    with pytest.raises(LorafoldError, match="--set base: found it beside --set storage"):
        load_recipe(None, ["base=fp32", "storage=fp32"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("estimate", "--base", "nf4", "--storage=fp32"), "--base: found it beside --storage"),
        (("estimate", "--seq=8", "--max-length", "9"), "--seq: found it beside --max-length"),
        (("eval", "--answers", "--no-completions"), "--answers: found it beside --no-completions"),
    ],
)
def test_an_option_is_given_under_one_of_its_names(given: tuple[str, ...], said: str) -> None:
    assert said in str(CliRunner().invoke(app, [*given]).exception)


def test_lengths_are_given_under_one_name() -> None:
    with pytest.raises(LorafoldError, match="length: found it beside max_length"):
        lf.estimate(length=8, max_length=9)


def test_a_value_may_read_like_the_old_name_of_an_option(tmp_path: Path) -> None:
    asked = ["generate", "--prompt", "--base", "--model", str(tmp_path / "absent")]
    done = CliRunner().invoke(app, [*asked, "--seed", "1"])
    assert "is called" not in done.stderr
    assert "no such file" in str(done.exception)


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


def test_paths_may_begin_with_a_tilde_at_both_faces(
    tiny_model_dir, tmp_path: Path, monkeypatch
) -> None:
    base = tiny_model_dir("llama")
    make_adapter(base, tmp_path / "ad")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "recipe.yaml").write_text("steps: 1\nbatch: 1\nstorage: fp32\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = ["--data=~/rows.jsonl", "--out=~/one", "--config=~/recipe.yaml", "--over=~/ad"]
    done = lorafold("train", *asked, "--model", str(base), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lf.compose(["~/ad"], "~/two", model=base)
    merged = ["--adapter=~/ad", "--adapter", "~/one", "--probe=~/rows.jsonl", "--out=~/three"]
    done = lorafold("merge", *merged, "--model", str(base), "--device", "cpu")
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
    base, rows = tiny_model_dir("llama"), tmp_path / "rows.jsonl"
    make_adapter(base, tmp_path / "a")
    rows.write_text('{"question": "a", "answer": "b"}\n')
    asked = ["resize", tmp_path / "a", "--model", base, "--out", tmp_path / "out", "--data", rows]
    named = ["--columns", "prompt=question,completion=answer", "--rank", "1", "--device", "cpu"]
    done = lorafold(*map(str, [*asked, *named]))
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
    """A reward model."""
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
