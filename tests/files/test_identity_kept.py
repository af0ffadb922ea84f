"""Cached results are reused for the same model, adapter, rows and code, and for no others."""

from __future__ import annotations

import ast
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save

import lorafold as lf
from adapter_files import configure, json_of
from lorafold import identity
from lorafold.comparing import measure
from lorafold.comparing.run import cell_digest
from lorafold.data import chat_template, row_store, tokenizing
from lorafold.data import rows as reading
from lorafold.data.examples import encode
from lorafold.data.rows import read_rows
from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST
from lorafold.fragility_study import run as undoing
from lorafold.fragility_study import task as fragile
from lorafold.identity import TRAINING, of_code
from lorafold.inspecting import intrinsic, spectra
from lorafold.models.tokenizer import load_tokenizer
from lorafold.peft.adapter_directory import open_all
from lorafold.resolve import Base
from lorafold.training import loop
from lorafold.training.inputs import RunRequest
from lorafold.training.run import train
from own_caches import shared

pytestmark = pytest.mark.usefixtures("unestimated")

ROWS = [{"prompt": f"Book {n}", "completion": f" {n} it is"} for n in range(4)]
PAIRS = [{"prompt": f"Book {n}", "chosen": f" {n}", "rejected": " no"} for n in range(4)]
RECIPE = lf.Recipe(
    steps=1, batch=4, rank=2, dropout=0.0, storage="fp32", max_length=64, warmup=0.0, save_every=1
)
DPO = RECIPE.model_copy(update={"objective": "dpo"})
EDITED = "model.layers.1.mlp.down_proj.weight"  # beside the values of the fingerprint
TARGETS = ["q_proj", "down_proj"]

STEP = loop.train_step


class GoesOn(Exception):
    """The first step of a run."""


def never(*_: Any) -> float:
    raise GoesOn


@dataclass
class World:
    """A model, an adapter on it, one over that, and rows; with all that was kept for them."""

    root: Path
    names: dict[str, set[str]] = field(default_factory=dict)
    rows: list[dict[str, str]] = field(default_factory=lambda: ROWS)
    pairs: list[dict[str, str]] = field(default_factory=lambda: PAIRS)
    recipe: lf.Recipe = field(default_factory=lambda: RECIPE)
    patch: pytest.MonkeyPatch = field(default_factory=pytest.MonkeyPatch)

    def __post_init__(self) -> None:
        self.model, self.below = self.root / "model", self.root / "below"

    # the things: each tells whether what was kept is given for what is there now

    def run(self) -> bool:
        """The run that was stopped."""
        with pytest.raises((GoesOn, LorafoldError)) as ended:
            self.train("run", self.recipe, self.rows, resume=True)
        return ended.type is GoesOn

    def reference(self) -> bool:
        """The log-probabilities of the reference."""
        recipe = self.recipe.model_copy(update={"objective": "dpo"})
        with pytest.raises(GoesOn):
            self.train("dpo", recipe, self.pairs, overwrite=True)
        return "read from the cache" in self.told

    def compare(self) -> bool:
        """The figures of a method."""
        base, rows = Base(self.model, device="cpu"), self.rows
        task = measure.ComparisonTask(base, rows, rows, "rows", self.recipe)
        return self.same("compare", {cell_digest(task, "lora")})

    def intrinsic(self) -> bool:
        """The losses of a search."""
        recipe, rows = self.recipe.model_copy(update={"steps": 3, "lr": 1e-2}), self.rows
        base, out = Base(self.model, device="cpu"), self.root / "search"
        asked = RunRequest(base, out, recipe, rows, "rows", eval_rows=rows)
        there = set(out.glob("*.json"))
        try:
            intrinsic.search(asked, 1, 1, 1.0, lambda point: None)
        except LorafoldError:
            return False
        return there == set(out.glob("*.json"))

    def fragility(self) -> bool:
        """The figures and the tuning of a run."""
        task = fragile.FragilityTask(
            Base(self.model, self.recipe.storage), fragile.stacks_of(open_all([self.below])),
            ROWS, ROWS, row_store.Rows.of(self.rows), "rows", ("No",), ("Sure",), (1,), (2,),
            (1e-3,), (0,), ("none",), recipe=self.recipe,
        )  # fmt: skip
        [run] = task.runs(task.stacks[0])
        cells = undoing.StudyFiles(task, self.root)
        files = [*cells.of_points(run).values(), cells.tuned_adapter(run)]
        return self.same("fragility", {*map(str, files)})

    def svd(self) -> bool:
        """The decompositions of the base with the adapter below."""
        before = set((self.root / "cache" / "svd").rglob(spectra.FILE))
        self.inspected()
        return set((self.root / "cache" / "svd").rglob(spectra.FILE)) == before

    def tokens(self) -> bool:
        """The tokens of large data."""
        encode(self.rows_of(), load_tokenizer(self.model), 64, self.console())
        return "tokens: caching about" not in self.told

    def parsed(self) -> bool:
        """The parsed rows of large data."""
        self.rows_of()
        return "of rows into the cache" not in self.told

    # what they need

    def inspected(self, model: Path | None = None) -> Any:
        given = {"over": self.below, "full": True, "allow_other_base": True}
        return lf.inspect(self.root / "top", model or self.model, **given)

    def same(self, name: str, found: set[str]) -> bool:
        return self.names.setdefault(name, found) == found

    def console(self) -> Console:
        self.out = io.StringIO()
        return Console(file=self.out, width=500)

    @property
    def told(self) -> str:
        return self.out.getvalue()

    def write(self) -> None:
        """The rows as a file of large data."""
        lines = [f"{json.dumps(row)}\n" for row in self.rows * 10]
        (self.root / "rows.jsonl").write_text("".join(lines))

    def rows_of(self) -> row_store.Rows:
        console = self.console()
        return read_rows(str(self.root / "rows.jsonl"), notice=console.print)

    def train(self, name: str, recipe: lf.Recipe, rows: Any, **more: Any) -> None:
        lf.train(
            recipe, data=rows, out=self.root / name, model=self.model, over=self.below,
            device="cpu", console=self.console(), **more,
        )  # fmt: skip


THINGS = ("run", "reference", "compare", "intrinsic", "fragility", "svd", "parsed", "tokens")


@pytest.fixture(scope="module")
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model_dir, patched) -> World:
    """Everything is kept, for the things as they are."""
    made = World(tmp_path_factory.mktemp("world"))
    shared(made.root / "cache")
    patched.setenv("LORAFOLD_CACHE", str(made.root / "cache"))
    patched.setattr(tokenizing, "MAX_IN_MEMORY", 1000)
    patched.setattr(reading, "MAX_IN_MEMORY", 1000)
    made.write()
    shutil.copytree(tiny_model_dir("llama"), made.model)
    template = made.model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %B %Y') }}" + template.read_text())
    model = lf.load_model(made.model, storage="fp32")
    for name in ("below", "top"):
        adapter = lf.attach(model, lf.LoRA(rank=2, alpha=8), TARGETS, name=name)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        adapter.save(made.root / name)
    (made.below / MANIFEST).unlink()  # so that its files may be edited
    made.intrinsic()
    patched.setattr(loop, "train_step", never)
    with pytest.raises(GoesOn):
        made.train("run", RECIPE, ROWS)
    for thing in THINGS:
        getattr(made, thing)()
    return made


def put(file: Path, content: bytes) -> None:
    """Other content in another file, since models may have mapped the one before."""
    file.with_suffix(".new").write_bytes(content)
    file.with_suffix(".new").replace(file)


def weight(world: World) -> None:
    tensors = load_file(world.model / "model.safetensors")
    tensors[EDITED][3, 5] += 1
    put(world.model / "model.safetensors", save(tensors, {"format": "pt"}))


def configuration(world: World) -> None:
    configure(world.model, "config.json", rms_norm_eps=0.1)


def template(world: World) -> None:
    with (world.model / "chat_template.jinja").open("a") as file:
        file.write("{# another #}")


def scale(world: World) -> None:
    configure(world.below, lora_alpha=32)


def tensor(world: World) -> None:
    file = world.below / "adapter_model.safetensors"
    put(file, save({name: 3 * tensor for name, tensor in load_file(file).items()}))


def vocabulary(world: World) -> None:
    ahead = json_of(world.model, "tokenizer.json")["pre_tokenizer"] | {"add_prefix_space": True}
    configure(world.model, "tokenizer.json", pre_tokenizer=ahead)


def row(world: World) -> None:
    for name in ("rows", "pairs"):
        first, *others = getattr(world, name)
        world.patch.setattr(world, name, [first | {"prompt": "Another book"}, *others])
    world.write()


def of_recipe(**changes: Any) -> Callable[[World], None]:
    def change(world: World) -> None:
        world.patch.setattr(world, "recipe", world.recipe.model_copy(update=changes))

    return change


class Tomorrow(date):
    @classmethod
    def today(cls) -> date:
        return date.today() + timedelta(days=1)


def day(world: World) -> None:
    world.patch.setattr(chat_template, "date", Tomorrow)


CHANGES: dict[str, tuple[Callable[[World], None] | None, set[str]]] = {
    # what is given all the same: nothing that it depends on is another
    "a weight": (weight, {"tokens", "parsed"}),
    "a configuration": (configuration, {"svd", "tokens", "parsed"}),
    "a chat template": (template, {"svd", "parsed"}),
    "a tokenizer": (vocabulary, {"svd", "parsed"}),
    "an alpha": (scale, {"compare", "intrinsic", "tokens", "parsed"}),
    "an adapter's tensor": (tensor, {"compare", "intrinsic", "tokens", "parsed"}),
    "a row": (row, {"svd"}),
    "a field of the recipe": (
        of_recipe(weight_decay=0.5), {"reference", "svd", "tokens", "parsed"}
    ),
    "a storage": (of_recipe(storage="bf16"), {"svd", "tokens", "parsed"}),
    # a run and a search go on with the day on which they began
    "a day": (day, {"run", "intrinsic", "svd", "parsed"}),
    "nothing": (None, set(THINGS)),
}  # fmt: skip
FIGURES = {"compare", "intrinsic", "fragility"}
NO_FILE = {"a field of the recipe", "a storage", "a day"}
FAST = {"an alpha", "a day", "nothing"}
SLOWLY = pytest.mark.slow


@pytest.mark.parametrize(
    "change", [pytest.param(name, marks=[SLOWLY] * (name not in FAST)) for name in CHANGES]
)
def test_what_was_kept_is_given_for_the_same_thing_alone(change: str, world: World) -> None:
    do, given = CHANGES[change]
    kept = [world.root / "rows.jsonl", *world.model.iterdir(), *world.below.iterdir()]
    before = {path: path.read_bytes() for path in kept}
    try:
        if do is not None:
            do(world)
            changed = [path for path in before if path.read_bytes() != before[path]]
            assert changed or change in NO_FILE
        found = {thing for thing in THINGS if getattr(world, thing)()}
        print(f"{change:<22} given: {', '.join(t for t in THINGS if t in found)}")
        assert found == given
    finally:
        world.patch.undo()
        for path, content in before.items():
            put(path, content)


@pytest.mark.parametrize(
    ("file", "others"),
    [
        pytest.param("ops/elementwise.py", {*FIGURES, "reference"}, marks=SLOWLY),
        ("data/render.py", {*FIGURES, "reference", "parsed", "tokens"}),
        pytest.param("inspecting/updates.py", {"intrinsic", "fragility", "svd"}, marks=SLOWLY),
        pytest.param("comparing/measure.py", {"compare"}, marks=SLOWLY),
        pytest.param("fragility_study/measure.py", {"fragility"}, marks=SLOWLY),
    ],
)
def test_a_line_of_code_makes_anew_what_it_makes_and_no_run_is_refused(
    file: str, others: set[str], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = shutil.ignore_patterns("__pycache__")
    root = shutil.copytree(identity.ROOT, tmp_path / "lorafold", ignore=compiled)
    with (root / file).open("a") as source:
        source.write("\n# another line\n")
    monkeypatch.setattr(identity, "ROOT", root)
    of_code.cache_clear()
    try:
        assert {thing for thing in THINGS if not getattr(world, thing)()} == others
    finally:
        monkeypatch.undo()
        of_code.cache_clear()


@pytest.mark.slow
def test_another_revision_is_another_model(world: World, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    own, commits = tmp_path / "models--owner--name", {"main": "a" * 40, "other": "b" * 40}
    (own / "refs").mkdir(parents=True)
    for name, commit in commits.items():
        (own / "refs" / name).write_text(commit)
        shutil.copytree(world.model, own / "snapshots" / commit)
    configure(own / "snapshots" / commits["other"], "config.json", rms_norm_eps=0.1)
    asked = RunRequest(Base("owner/name", device="cpu"), world.root / "hub", RECIPE, ROWS, "rows")
    with pytest.raises(GoesOn):
        train(asked, Console(quiet=True))
    other = replace(asked.base, revision="other")
    with pytest.raises(LorafoldError, match="model: the files of owner/name have changed"):
        train(replace(asked, base=other, resume=True), Console(quiet=True))
    with pytest.raises(GoesOn):
        train(replace(asked, resume=True), Console(quiet=True))


def test_a_search_of_an_earlier_version_is_refused(world: World) -> None:
    file = world.root / "search" / "search.json"
    content = file.read_text()
    file.write_text(json.dumps({k: v for k, v in json.loads(content).items() if k != "files"}))
    try:
        with pytest.raises(LorafoldError, match="found a search of an earlier lorafold"):
            intrinsic.check_search(file.parent, {})
    finally:
        file.write_text(content)


def test_a_preference_begins_at_log_2_over_another_scale(world: World, tmp_path: Path) -> None:
    content = (world.below / "adapter_config.json").read_bytes()
    try:
        for alpha, name in ((8, "one"), (32, "two")):
            configure(world.below, lora_alpha=alpha)
            where = {"model": world.model, "over": world.below, "device": "cpu"}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop, "train_step", STEP)
                found = lf.train(DPO, data=PAIRS, out=tmp_path / name, **where)
            assert found.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    finally:
        (world.below / "adapter_config.json").write_bytes(content)


def test_figures_of_an_edited_base_are_its_own(world: World, tmp_path: Path, monkeypatch) -> None:
    """Its fingerprint is that of the base before."""
    shutil.copytree(world.model, tmp_path / "model")
    edit = World(tmp_path)
    weight(edit)

    def top() -> dict[str, float]:
        sites = world.inspected(edit.model).as_json()["sites"]
        return {path: site["top_projection"] for path, site in sites.items()}

    kept = top()
    monkeypatch.setenv("LORAFOLD_CACHE", str(tmp_path / "cache"))
    assert kept == pytest.approx(top(), rel=1e-6)


def test_an_adapter_on_an_edited_base_is_told(world: World, tmp_path: Path, caplog) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", STEP)
        lf.train(RECIPE, data=ROWS, out=tmp_path / "it", model=world.model, device="cpu")
    shutil.copytree(world.model, tmp_path / "model")
    for model in (world.model, tmp_path / "model"):  # a copy by another name
        lf.load(lf.load_model(model, storage="fp32"), tmp_path / "it")
    told = "differ from those in training"
    assert told not in caplog.text
    weight(World(tmp_path))
    lf.load(lf.load_model(tmp_path / "model", storage="fp32"), tmp_path / "it")
    assert caplog.text.count(told) == 1


def rooms_of(files: list[Path]) -> set[str]:
    """The packages and modules of lorafold from which files import."""
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lorafold."):
                found.add(str(node.module).split(".")[1])
    return found


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("rooms", "besides"),
    [
        (TRAINING, set()),
        ((*TRAINING, "comparing", "merging"), set()),
        ((*TRAINING, "inspecting"), set()),
        ((*TRAINING, *fragile.CODE_PACKAGES), {"comparing"}),  # how cells of a table are written
        (tokenizing.CODE_PATHS, {"runtime", "models"}),  # how processes and files are opened
    ],
)
def test_the_code_of_a_thing_is_all_that_it_imports(rooms: tuple[str, ...], besides) -> None:
    files = [file for room in rooms for file in (identity.ROOT / room).rglob("*.py")]
    everywhere = {"foreign_options", "errors", "files", "identity"}
    assert rooms_of(files) - set(rooms) - everywhere == besides
