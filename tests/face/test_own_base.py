"""Where no model is named, adapters are loaded on the base that their records name; it is found by
its name, beside the adapter, and by its fingerprint.
"""

import io
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console

import lorafold as lf
from adapter_cases import make_adapter
from conftest import lorafold, make_model_dir, refused
from fresh_models import fresh_model
from lorafold.api.serve import recorded_bases
from lorafold.cli import load_command
from lorafold.errors import LorafoldError
from lorafold.peft.adapter_directory import open_all
from lorafold.peft.provenance import RecordedBase
from lorafold.resolve import Base, base_for
from lorafold.serving.registry import STATE_FILE, ServerState
from serving_cases import running, saved

pytestmark = pytest.mark.usefixtures("unestimated")

ROWS = [{"prompt": f"Book a table for {n}", "completion": f'{{"people": {n}}}'} for n in range(4)]
VERBS = ("generate", "eval", "chat", "merge", "inspect", "compose", "resize", "serve", "score",
         "fragility", "train")  # fmt: skip
COMMIT = "0" * 40


@pytest.fixture
def place(tiny_model_dir, tmp_path: Path) -> Path:
    """A directory with the model `base` and the adapter `adapter` of it."""
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "base")
    make_adapter(tmp_path / "base", tmp_path / "adapter")
    return tmp_path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def named(adapter: Path, name: str | None, record: bool = True) -> Path:
    """The adapter, after it was given another name of its base, with its record or without."""
    config = adapter / "adapter_config.json"
    found = {**json.loads(config.read_text()), "base_model_name_or_path": name}
    config.write_text(json.dumps(found))
    (adapter / "manifest.json").unlink(missing_ok=True)
    if not record:
        (adapter / "lorafold.json").unlink()
    return adapter


def in_hub(model: Path, hub: Path, repo: str) -> Path:
    """The snapshot of a model that was put into the hub's cache."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    shutil.copytree(model, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


def found(*adapters: Path) -> tuple[Base, str]:
    """The base of adapters, and the line that says which it is."""
    told = io.StringIO()
    base = base_for(None, open_all(adapters), Console(file=told, width=1000))
    return base, told.getvalue()


CALLS: dict[str, Callable[[Path, Console], object]] = {
    "evaluate": lambda at, console: lf.evaluate(
        data=ROWS, adapters=at / "adapter", completions=False, console=console),
    "generate": lambda at, console: lf.generate(
        None, "Book", adapters=at / "adapter", max_new_tokens=2, console=console),
    "chat": lambda at, console: lf.chat(adapters=at / "adapter", console=console),
    "merge": lambda at, console: lf.merge(
        adapters=at / "adapter", out=at / "out", certificate=False, console=console),
    "inspect": lambda at, console: lf.inspect(at / "adapter", console=console),
    "compose": lambda at, console: lf.compose([at / "adapter"] * 2, at / "out", console=console),
    "resize": lambda at, console: lf.resize(at / "adapter", at / "out", rank=1, console=console),
    "train": lambda at, console: lf.train(
        lf.Recipe(steps=1, batch=2, storage="fp32"), data=ROWS, out=at / "out",
        over=at / "adapter", console=console),
}  # fmt: skip


@pytest.mark.parametrize("verb", CALLS)
def test_every_verb_takes_the_adapters_own_base_and_says_so(verb: str, place: Path) -> None:
    told = io.StringIO()
    CALLS[verb](place, Console(file=told, width=1000))
    assert f"base: {place / 'base'}, from the adapter's record\n" in told.getvalue()


@pytest.mark.parametrize(("name", "record", "said"), [
    ("someone/llama", False, "adapter_config.json names someone/llama (no"),
    ("base", False, ""), (None, False, ""), ("someone/llama", True, ""),
])  # fmt: skip
def test_a_given_base_that_cannot_be_compared_is_said(place, monkeypatch, name, record, said):
    monkeypatch.chdir(place)
    one = named(place / "adapter", name, record)
    other = named(shutil.copytree(one, place / "other"), "base")  # the last is not all
    adapters, told = open_all([one, other]), io.StringIO()
    assert base_for("base", adapters, Console(file=told, width=1000)).name == "base"
    assert told.getvalue().startswith(f"base: base; {said}" if said else "")
    assert bool(told.getvalue()) == bool(said)


def test_commands_do_too(place: Path) -> None:
    done = lorafold("generate", str(place / "adapter"), "--prompt", "Book", "--max-new-tokens=2")
    assert done.returncode == 0
    assert f"base: {place / 'base'}, from the adapter's record\n" in done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_what_the_default_is(verb: str) -> None:
    option = next(p for p in load_command(verb).params if p.name == "model")
    assert option.default is None
    assert "the adapter's own base" in option.help


def test_an_adapter_is_loaded_with_its_base(place: Path) -> None:
    adapter = lf.load(path=place / "adapter")
    assert adapter.model.name_or_path == str(place / "base")
    with pytest.raises(LorafoldError, match="path: missing; this argument"):
        lf.load()


def test_what_has_no_record_says_it_in_its_configuration(place: Path) -> None:
    base, told = found(named(place / "adapter", str(place / "base"), record=False))
    assert base.source.path == place / "base"
    assert told == f"base: {place / 'base'}, from the adapter's adapter_config.json\n"


@pytest.mark.parametrize("name", ["base", "models/base", "/gone/base", "../base"])
def test_a_base_is_found_by_a_relative_name_and_beside_the_adapter(name: str, place, hub) -> None:
    at = place / "adapter"
    for record in (True, False):
        base, told = found(named(at, name, record))
        assert base.source.path.resolve() == place / "base"
        assert f"names {name}\n" in told


def test_a_base_that_was_renamed_is_found_by_its_fingerprint(place: Path, hub: Path) -> None:
    adapter, other = place / "adapter", place / "elsewhere" / "deep"
    shutil.copytree(place / "base", place / "a", dirs_exist_ok=True)
    make_model_dir("qwen2", place / "a")  # an older one under a name that comes first
    (place / "base").rename(place / "renamed")
    base, told = found(adapter)
    assert base.source.path == place / "renamed"
    told_ = f"found by its fingerprint; the adapter's record names {place / 'base'}\n"
    assert told == f"base: {place / 'renamed'}, {told_}"
    other.mkdir(parents=True)
    adapter.rename(other / "adapter")  # it lies where the record says that it did
    assert found(other / "adapter")[0].source.path == place / "renamed"


def test_a_model_of_that_name_with_other_weights_is_taken_if_no_other_fits(place, hub) -> None:
    shutil.rmtree(place / "base")
    make_model_dir("qwen2", place / "base")
    assert found(place / "adapter")[0].source.path == place / "base"
    with pytest.raises(LorafoldError, match="the adapter was trained on another base"):
        lf.load(path=place / "adapter")
    in_hub(make_model_dir("llama", place / "sub" / "right"), hub, "acme/tiny")
    assert found(place / "adapter")[0].name == "acme/tiny"


def test_a_base_of_the_hub_is_taken_from_its_cache(place: Path, hub: Path) -> None:
    snapshot = in_hub(place / "base", hub, "acme/tiny")
    shutil.rmtree(place / "base")
    for record in (True, False):
        base, told = found(named(place / "adapter", "acme/tiny", record))
        assert (base.name, base.source.path) == ("acme/tiny", snapshot)
        assert re.fullmatch(r"base: acme/tiny, from the adapter's \S+\n", told)


def test_a_base_is_found_in_the_hubs_cache_by_its_fingerprint(place: Path, hub: Path) -> None:
    snapshot = in_hub(place / "base", hub, "acme/tiny")
    shutil.rmtree(place / "base")
    base, told = found(place / "adapter")
    assert (base.name, base.source.path) == ("acme/tiny", snapshot)
    assert "acme/tiny, found by its fingerprint" in told


def test_among_fifty_models_it_is_found_within_two_seconds(place: Path, hub: Path) -> None:
    other = make_model_dir("qwen2", place / "sub" / "other")  # the same shapes, other values
    for number in range(49):
        in_hub(other, hub, f"acme/a{number:02}")
    in_hub(place / "base", hub, "acme/z")
    shutil.rmtree(place / "base")
    adapters, start = open_all([place / "adapter"]), time.perf_counter()
    assert base_for(None, adapters).name == "acme/z"
    assert time.perf_counter() - start < 2


def test_what_is_not_found_says_where_it_was_looked_for(place: Path, hub: Path) -> None:
    shutil.rmtree(place / "base")
    said = refused("inspect", str(place / "adapter"))
    assert "was found neither at its path, next to the adapter in " in said
    assert said.endswith("; pass --model PATH (in Python: model)\n")
    named(place / "adapter", "acme/tiny")
    said = refused("inspect", str(place / "adapter"))
    assert "its base acme/tiny was found neither at its path" in said
    assert "HF_HUB_OFFLINE is set" in said
    for record in (True, False):
        named(place / "adapter", None, record)
        with pytest.raises(LorafoldError, match=r"pass --model PATH \(in Python: model\)"):
            found(place / "adapter")


def test_adapters_of_different_bases_are_refused_with_both_named(place, tiny_model_dir) -> None:
    theirs = make_adapter(tiny_model_dir("qwen2"), place / "theirs")
    with pytest.raises(LorafoldError) as error:
        lf.compose([place / "adapter", theirs], place / "out")
    said = str(error.value)
    assert said.startswith("adapters of different bases: ")
    assert all(part in said for part in ("base, and ", "qwen2", "--model"))
    assert len(said) <= 300
    named(theirs, "acme/other", record=False)
    with pytest.raises(LorafoldError, match=r"adapters of different bases: .* on acme/other"):
        found(theirs, place / "adapter")
    same = make_adapter(place / "base", place / "same")
    assert found(named(same, "/another/name"), place / "adapter")[0].source.path == place / "base"


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_model_that_is_another_is_refused_with_both_named(
    kind: str, place: Path, tiny_model_dir
) -> None:
    model = str(tiny_model_dir(kind))
    said = refused("inspect", str(place / "adapter"), "--model", model)
    assert "the adapter was trained on another base: " in said
    assert f"{str(place / 'base')[-10:]}, not " in said
    assert f"{model[-10:]} (" in said
    assert "--allow-other-base" in said
    assert len(said) <= 300
    named(place / "adapter", str(place / "base"), record=False)
    if kind == "gpt2":
        done = lorafold("inspect", str(place / "adapter"), "--model", model)
        base, error = done.stderr.splitlines()
        assert (done.returncode, base.startswith("base: "), error[:7]) == (2, True, "error: ")
        assert "; the base in the adapter's adapter_config.json is " in error


def test_without_adapters_it_is_the_embedded_model(place: Path) -> None:
    assert base_for(None, []).name == "smollm2"
    base, told = found(named(place / "adapter", "smollm2", record=False))
    assert base.name == "smollm2"
    assert told == "base: smollm2, from the adapter's adapter_config.json\n"


def test_a_server_takes_that_of_its_directory(place: Path) -> None:
    folder = place / "adapters"
    folder.mkdir()
    assert recorded_bases(folder) == []
    make_adapter(place / "base", folder / "a")
    (make_adapter(place / "base", folder / "b") / "adapter_config.json").write_text("{")
    assert base_for(None, recorded_bases(folder)).source.path == place / "base"
    assert RecordedBase.read(folder / "a") == open_all([folder / "a"])[0].own_base
    shutil.rmtree(folder / "a")
    with pytest.raises(LorafoldError, match="the base model is unknown"):
        recorded_bases(folder)


def test_a_server_stores_its_base_as_most_adapters_had_it(place: Path) -> None:
    for name, storage in {"a": "fp32", "b": "nf4", "c": "nf4"}.items():
        model = lf.load_model(place / "base", storage=storage)
        lf.attach(model, lf.LoRA(rank=2)).save(place / "adapters" / name)
    own = recorded_bases(place / "adapters")
    assert base_for(None, own).stored_as_trained(own).storage == "nf4"


def test_adapters_that_come_later_decide_no_server_s_base(place: Path, tiny_model_dir) -> None:
    folder = place / "adapters"
    folder.mkdir()
    make_adapter(place / "base", folder / "z")
    assert base_for(None, recorded_bases(folder)).source.path == place / "base"
    make_adapter(tiny_model_dir("qwen2"), folder / "a")
    with pytest.raises(LorafoldError, match="adapters of different bases"):
        base_for(None, recorded_bases(folder))
    named(make_adapter(place / "base", folder / "x"), "/another/name")  # which leads nowhere
    make_adapter(place / "base", folder / "y")
    large = shutil.copytree(folder / "z", folder / "large") / "adapter_config.json"
    large.write_text(large.read_text() + " " * (8 << 20))
    with pytest.raises(LorafoldError, match="expected at most 8,388,608 bytes"):
        RecordedBase.read(folder / "large")
    own = recorded_bases(folder)
    assert base_for(None, own).source.path == place / "base"
    (folder / STATE_FILE).write_text(ServerState(base=own[0]).model_dump_json())
    for name in ("b", "c", "d"):
        shutil.copytree(folder / "a", folder / name)
    told = io.StringIO()
    own = recorded_bases(folder, None, Console(file=told, width=60))
    assert base_for(None, own).source.path == place / "base"
    said = f"using the base model of the last start ({folder / STATE_FILE})"
    assert told.getvalue() == f"no --model: {said}\n"
    shutil.copytree(place, place.parent / "moved")  # found beside it again
    shutil.rmtree(place)
    folder = place.parent / "moved" / "adapters"
    (folder.parent / "base").rename(folder / "base")
    assert base_for(None, recorded_bases(folder)).source.path == folder / "base"


REFUSED = "the adapter was trained on another base"


@pytest.fixture
def other(tiny_model_dir, tmp_path: Path) -> Path:
    """A base of the same form with other weights, beside the tokenizer."""
    base = tiny_model_dir("llama")
    model = fresh_model(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(tmp_path / "other")
    for file in base.glob("*token*"):
        shutil.copy(file, tmp_path / "other")
    return tmp_path / "other"


@pytest.mark.parametrize("given", ["over", "init_adapter"])
def test_a_run_takes_one_where_it_is_told_to(
    given: str, other: Path, tiny_model_dir, tmp_path: Path
) -> None:
    theirs = saved(other, {"a": lf.LoRA(rank=2)}, tmp_path / "adapters") / "a"
    recipe = lf.Recipe(steps=1, batch=2, storage="fp32")
    asked = {"model": tiny_model_dir("llama"), "data": ROWS, "device": "cpu", given: theirs}
    with pytest.raises(LorafoldError, match=REFUSED):
        lf.train(recipe, out=tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()
    trained = lf.train(recipe, out=tmp_path / "out", allow_other_base=True, **asked)
    assert Path(trained.adapter, "adapter_model.safetensors").is_file()


def test_what_is_loaded_on_another_base_is_told_and_what_is_made_of_it_keeps_its_own(
    other: Path, tiny_model_dir, tmp_path: Path, caplog
) -> None:
    base = tiny_model_dir("llama")
    theirs = saved(other, {"a": lf.LoRA(rank=2), "d": lf.DoRA(lf.LoRA(rank=2))}, tmp_path / "two")
    lora, dora = theirs / "a", theirs / "d"
    asked = {"model": base, "allow_other_base": True}
    lf.resize(lora, tmp_path / "small", rank=1, **asked)
    assert f"adapter {lora} was trained on another base (" in caplog.text
    assert "; loaded anyway (--allow-other-base)" in caplog.text
    lf.compose([lora, lora], tmp_path / "sum", **asked)
    for made in ("small", "sum"):  # are for the base that the adapter was trained on
        lf.load(fresh_model(other), tmp_path / made)
        with pytest.raises(LorafoldError, match=REFUSED):
            lf.load(fresh_model(base), tmp_path / made)
    lf.resize(dora, tmp_path / "of-both", rank=1, **asked)
    recipe = lf.Recipe(steps=1, batch=2, storage="fp32")
    how = {"data": ROWS, "device": "cpu", "init_adapter": lora}
    lf.train(recipe, out=tmp_path / "further", **asked, **how)
    lf.merge(base, [lora], tmp_path / "merged", allow_other_base=True, certificate=False)
    for made in ("of-both/lorafold.json", "further/lorafold.json", "merged/merge.json"):
        record = json.loads((tmp_path / made).read_text())
        assert "was trained on another base" in str(record["other_base"])


def test_a_server_takes_one_where_it_is_told_to(other: Path, tiny_model_dir, tmp_path) -> None:
    folder = saved(other, {"theirs": lf.LoRA(rank=2)}, tmp_path / "adapters")
    base = tiny_model_dir("llama")
    with running(base, folder) as server:
        assert server.complete("theirs", "Hello").status in (404, 409, 503)
        assert REFUSED in server.parts.registry.rejected["theirs"]
    # what was found out before holds for that answer alone
    with running(base, folder, allow_other_base=True) as server:
        assert server.text("theirs", "Hello")
        note = server.parts.registry.adapters["theirs"].note
        assert "was trained on another base" in note
