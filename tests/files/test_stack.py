"""Adapters on top of adapters: recorded, never moved, and asked for when loaded."""

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import lorafold as lf
from adapter_files import change, configure, tensors_of
from conftest import fast_only, lorafold
from engine_cases import alone, generated
from fresh_models import fresh_model
from lorafold.core.attach import selection_of
from lorafold.engine import Request as EngineRequest
from lorafold.errors import LorafoldError
from lorafold.models.loading import load_model
from lorafold.peft.adapter_directory import SavedAdapter, open_all
from lorafold.peft.provenance import parse_over
from lorafold.recipe.recipe import Recipe
from lorafold.resolve import Base
from lorafold.serving.directory import Directory
from lorafold.training import loop, run, setup
from lorafold.training.inputs import RunRequest
from lorafold.training_step.gradient_checkpointing import enable_gradient_checkpointing
from training_cases import ROWS, quiet, weights

pytestmark = pytest.mark.usefixtures("unestimated")

IDS = torch.arange(5, 29).view(2, 12)
TRAINED = {"steps": 4, "batch": 4, "storage": "fp32", "lr": 1e-2}


def request(model: Path, out: Path, over: tuple[Path, ...] = (), rows=ROWS, **fields) -> RunRequest:
    extra = {k: fields.pop(k) for k in ("resume", "overwrite", "init_adapter") if k in fields}
    recipe = Recipe(**TRAINED | fields)
    return RunRequest(Base(model, device="cpu"), out, recipe, rows, "rows", over=over, **extra)


def trained(model: Path, out: Path, over: tuple[Path, ...] = (), **fields) -> Path:
    run.train(request(model, out, over, **fields), quiet())
    return out


def stacked(model: Path, *adapters: Path):
    loaded = fresh_model(model)
    for n, path in enumerate(adapters):
        lf.load(loaded, path, f"a{n}")
    return loaded


@torch.no_grad()
def logits(model) -> torch.Tensor:  # (2, 12, vocabulary)
    return model(input_ids=IDS).logits


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.fixture(scope="module")
def base(tiny_model_dir) -> Path:
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def sft(base: Path, tmp_path_factory) -> Path:
    return trained(base, tmp_path_factory.mktemp("stack") / "sft")


@pytest.fixture(scope="module")
def dpo(base: Path, sft: Path) -> Path:
    """An adapter over `sft`."""
    return trained(base, sft.with_name("dpo"), (sft,), seed=1)


@pytest.fixture(scope="module")
def other(base: Path, sft: Path) -> Path:
    """An adapter that nothing lies over."""
    return trained(base, sft.with_name("other"), seed=2)


@pytest.fixture(scope="module")
def worded(base: Path, sft: Path) -> tuple[Path, Path]:
    """An adapter with new tokens, and one over it."""
    first = trained(base, sft.with_name("words"), new_tokens=["<a>", "<b>"])
    return first, trained(base, sft.with_name("over-words"), (first,))


METHODS = ("lora", "dora", "ia3", "loha")


def test_what_it_lies_over_stands_in_its_record_and_is_not_moved(base, sft: Path, tmp_path) -> None:
    before = files(sft)
    [below] = SavedAdapter.open(trained(base, tmp_path / "dpo", (sft,))).record["over"]
    assert files(sft) == before
    assert below["adapter"] == str(sft)
    assert len(below["sha256"]) == 64
    assert "over" not in SavedAdapter.open(sft).record


def test_the_model_that_is_trained_asks_for_the_ones_below_by_name(base, sft, tmp_path) -> None:
    asked = setup.set_up(request(base, tmp_path / "dpo", (sft,)), quiet())
    model, adapter, _ = setup.load_adapted_model(asked, quiet())
    assert asked.request.over_names == ("over1",)
    assert selection_of(model).names == ("over1", "default")
    with lf.only(model, *asked.request.over_names):
        assert torch.equal(logits(model), logits(stacked(base, sft)))
    assert f"over: {sft} (" in repr(adapter)
    trains = {id(p) for p in adapter.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trains


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("below", "above"),
    fast_only(zip(METHODS, (*METHODS[1:], METHODS[0]), strict=True), product(METHODS, METHODS)),
)
def test_folding_a_stack_equals_calling_it(below: str, above: str, base, tmp_path: Path) -> None:
    first = trained(base, tmp_path / "first", method=below)
    second = trained(base, tmp_path / "second", (first,), method=above)
    model = stacked(base, first, second)
    called = logits(model)
    with lf.only(model, "a0"):
        assert not torch.allclose(called, logits(model), atol=1e-5)
    merged = tmp_path / "merged"
    lf.merge(base, [first, second], merged)
    torch.testing.assert_close(logits(load_model(merged, torch.float32)), called)


@pytest.mark.few(1)
def test_what_is_found_below_must_be_what_it_was_trained_over(base, sft, dpo, other: Path) -> None:
    for below in [(), (other,), (other, sft), (sft, other)]:
        model = stacked(base, *below)
        before = logits(model)
        with pytest.raises(LorafoldError) as error:
            lf.load(model, dpo, "dpo")
        told = str(error.value)
        assert f"{dpo}: trained on top of {sft} (" in told
        assert f"--adapter {sft} --adapter {dpo}" in told
        assert ("of the base alone" if not below else f"of {below[0]} (") in told
        assert torch.equal(logits(model), before)
    model = stacked(base, other)
    lf.load(model, dpo, "dpo", allow_other_base=True)


def test_a_file_that_changed_below_is_another_adapter(base, sft: Path, dpo: Path, tmp_path) -> None:
    copy = shutil.copytree(sft, tmp_path / "copy")
    (copy / "README.md").write_text("Another card.")
    (copy / "manifest.json").unlink()
    torch.testing.assert_close(logits(stacked(base, copy, dpo)), logits(stacked(base, sft, dpo)))
    key = next(iter(tensors_of(copy)))
    change(copy, lambda tensors: tensors[key].add_(1))
    with pytest.raises(LorafoldError, match="trained on top of"):
        stacked(base, copy, dpo)


def test_the_selection_and_not_the_order_of_attaching_decides(base, sft, dpo, other: Path) -> None:
    model = stacked(base, sft, other)
    with lf.only(model, "a0"):
        lf.load(model, dpo, "dpo")
        torch.testing.assert_close(logits(model), logits(stacked(base, sft, dpo)))


def test_in_memory_an_adapter_knows_those_that_were_active(base, sft: Path, tmp_path: Path) -> None:
    model = stacked(base, sft)
    new = lf.attach(model, lf.LoRA(rank=2), name="new")
    above = lf.attach(model, lf.LoRA(rank=2), name="above")
    first = above.save(tmp_path / "first")
    assert [entry["adapter"] for entry in SavedAdapter.open(first).record["over"]] == [str(sft)]
    new.save(tmp_path / "new")
    second = above.save(tmp_path / "second")
    over = [str(sft), str(tmp_path / "new")]
    assert [entry["adapter"] for entry in SavedAdapter.open(second).record["over"]] == over
    model = stacked(base, sft, tmp_path / "new")
    again = lf.load(model, second, "again").save(tmp_path / "again")
    assert SavedAdapter.open(again).record["over"] == SavedAdapter.open(second).record["over"]


def test_what_is_merged_is_part_of_the_base(base: Path, sft: Path, tmp_path: Path) -> None:
    model = fresh_model(base)
    below = lf.load(model, sft, "sft")
    above = lf.attach(model, lf.LoRA(rank=2), name="above")
    below.merge()
    assert "over" not in SavedAdapter.open(above.save(tmp_path / "above")).record


def test_peft_reads_a_stack_of_lora(base: Path, sft: Path, dpo: Path) -> None:
    theirs = PeftModel.from_pretrained(fresh_model(base), sft, adapter_name="sft")
    theirs.load_adapter(dpo, "dpo")
    theirs.base_model.set_adapter(["sft", "dpo"])
    expected = logits(theirs.eval())
    torch.testing.assert_close(logits(stacked(base, sft, dpo)), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_peft_can_be_below(base: Path, sft: Path, tmp_path: Path) -> None:
    theirs = PeftModel.from_pretrained(fresh_model(base), sft)
    theirs.save_pretrained(tmp_path / "peft")
    over = trained(base, tmp_path / "over", (tmp_path / "peft",))
    assert len(SavedAdapter.open(over).record["over"]) == 1
    stacked(base, tmp_path / "peft", over)


@pytest.mark.slow
def test_a_run_that_crashed_over_a_stack_ends_like_one_that_did_not(
    base: Path, sft: Path, other: Path, tmp_path: Path, monkeypatch
) -> None:
    fields = {"steps": 8, "save_every": 2, "dropout": 0.2}
    straight = trained(base, tmp_path / "straight", (sft,), **fields)
    step = loop.train_step

    def crashing(job, rows, i):
        if i == 5:
            raise RuntimeError("crashed")
        return step(job, rows, i)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", crashing)
        with pytest.raises(RuntimeError, match="crashed"):
            trained(base, tmp_path / "stopped", (sft,), **fields)
    for over in ((other,), ()):
        with pytest.raises(LorafoldError, match="over: was"):
            trained(base, tmp_path / "stopped", over, resume=True, **fields)
    resumed = trained(base, tmp_path / "stopped", (sft,), resume=True, **fields)
    for path, tensor in weights(straight).items():
        assert torch.equal(tensor, weights(resumed)[path]), path


@pytest.mark.few(2)
@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "houlsby"])
def test_dropout_of_what_is_frozen_is_off(method: str, base: Path, tmp_path: Path) -> None:
    first = trained(base, tmp_path / "first", method=method, dropout=0.5)
    expected = logits(stacked(base, first))
    model = stacked(base, first)
    model.train()
    assert torch.equal(logits(model), expected)
    lf.attach(model, lf.LoRA(rank=2, dropout=0.0), name="new")
    assert torch.equal(logits(model.train()), expected)
    enable_gradient_checkpointing(model)
    assert torch.equal(logits(model.train()), expected)


def test_dropout_follows_what_is_made_trainable(base: Path, tmp_path: Path) -> None:
    first = trained(base, tmp_path / "first", dropout=0.5)
    model = fresh_model(base).train()
    adapter = lf.load(model, first)
    still = logits(model)
    assert torch.equal(logits(model), still)
    adapter.requires_grad_()
    assert not torch.equal(logits(model), logits(model))
    adapter.requires_grad_(False)
    assert torch.equal(logits(model), still)
    model.eval()
    adapter.requires_grad_()
    assert torch.equal(logits(model), still)


@pytest.mark.parametrize("where", ["", ".best", ".run", "inside", "around"])
@pytest.mark.parametrize("option", ["over", "init_adapter"])
def test_an_output_that_is_an_input_is_refused(where, option, base, sft, tmp_path) -> None:
    out = tmp_path / "out"
    given = {"": out, "inside": out / "in", "around": out.parent}.get(where, Path(f"{out}{where}"))
    if where != "around":
        shutil.copytree(sft, given)
    adapters = {"over": (given,)} if option == "over" else {"init_adapter": given}
    with pytest.raises(LorafoldError, match=f"--{option.replace('_', '-')} {given}; choose"):
        trained(base, out, overwrite=True, **adapters)


def test_what_training_over_refuses(base: Path, sft: Path, dpo: Path, tmp_path: Path) -> None:
    out, none = tmp_path / "out", tmp_path / "none"
    for over, fields, said in (
        ((dpo,), {}, f"^{dpo}: trained on top of {sft} .* --over {sft}"),
        ((), {"init_adapter": dpo}, f"^{dpo}: trained on top of .* top of the base alone"),
        ((sft,), {"method": "full"}, "full trains the base's own weights"),
        ((none,), {}, f"^{none}: found no adapter_config.json"),
    ):
        with pytest.raises(LorafoldError, match=said):
            trained(base, out, over, **fields)
    assert not out.exists()


def test_an_adapter_over_others_is_trained_further(base, sft: Path, dpo: Path, tmp_path) -> None:
    trained(base, tmp_path / "more", (sft,), steps=2, init_adapter=dpo)
    more, first = SavedAdapter.open(tmp_path / "more"), SavedAdapter.open(dpo)
    assert more.record["over"] == first.record["over"]
    assert not torch.equal(*(next(iter(weights(p).values())) for p in (dpo, tmp_path / "more")))


@pytest.mark.slow
def test_a_quantized_base_is_that_of_the_ones_below(tiny_model_dir, tmp_path: Path) -> None:
    base = tiny_model_dir("llama-wide")
    first = trained(base, tmp_path / "first", storage="nf4")
    asked = request(base, tmp_path / "second", (first,), method="dora")
    given = asked.recipe.model_dump(exclude_unset=True)
    del given["storage"]
    run.train(replace(asked, recipe=Recipe(**given)), quiet())
    assert SavedAdapter.open(tmp_path / "second").record["recipe"]["storage"] == "nf4"
    merged = lf.merge(base, [first, tmp_path / "second"], tmp_path / "merged", device="cpu")
    assert str(merged.into) == "the nf4 weights that the adapter was trained on, dequantized"
    assert merged.gap.max_logit_gap < 0.05
    assert merged.gap.argmax_agreement > 0.95


def test_new_tokens_below_are_known_above(base: Path, worded, tmp_path: Path) -> None:
    first, second = worded
    assert not SavedAdapter.open(second).own_tokenizer
    model = stacked(base, first, second)
    assert logits(model).shape[-1] == SavedAdapter.open(first).record["vocabulary"]
    lf.merge(base, [first, second], tmp_path / "merged")
    merged = load_model(tmp_path / "merged", torch.float32)
    torch.testing.assert_close(logits(merged), logits(model))


@pytest.mark.slow
def test_new_tokens_above_new_tokens(base: Path, tmp_path: Path) -> None:
    first = trained(base, tmp_path / "first", new_tokens=["<a>"])
    second = trained(base, tmp_path / "second", (first,), new_tokens=["<a>", "<b>"])
    tokenizer = Base(base).tokenizer(open_all([first, second]))
    size = SavedAdapter.open(second).record["vocabulary"]
    assert set(tokenizer.convert_tokens_to_ids(["<a>", "<b>"])) == {size - 2, size - 1}
    assert logits(stacked(base, first, second)).shape[-1] == size


def test_a_classifier_below_gives_its_classes_and_head(base: Path, tmp_path: Path) -> None:
    rows = [{"text": f"Row {n}", "label": "even" if n % 2 == 0 else "odd"} for n in range(8)]
    below = trained(base, tmp_path / "a", rows=rows, objective="classify", steps=2)
    above = trained(base, tmp_path / "b", (below,), rows=rows[:4], objective="classify", steps=2)
    first, second = open_all([below, above])
    assert second.classes == first.classes
    assert lf.evaluate(base, rows, adapters=[below, above], storage="fp32") is not None


def test_the_engine_serves_a_stack_under_one_name(base, sft: Path, dpo: Path, tmp_path) -> None:
    lora = EngineRequest("0", (5, 6, 7, 8), max_new_tokens=8, adapter="dpo")
    expected = generated(stacked(base, sft, dpo), lora)
    assert expected != generated(stacked(base, dpo_alone(dpo, tmp_path)), lora)
    model = fresh_model(base)
    assert alone(model, lora, {"dpo": dpo}) == expected
    # also where both were moved together, but not where the one below is missing
    moved = shutil.copytree(dpo, tmp_path / "dpo")
    [below] = SavedAdapter.open(moved).record["over"]
    configure(moved, "lorafold.json", over=[below | {"adapter": "gone/sft"}])
    with pytest.raises(LorafoldError, match=f"top of gone/sft .* in {tmp_path / 'sft'}; copy"):
        alone(model, lora, {"dpo": moved})
    shutil.copytree(sft, tmp_path / "sft")
    assert alone(model, lora, {"dpo": moved}) == expected


def dpo_alone(dpo: Path, tmp_path: Path) -> Path:
    """The adapter without the record that says what it lies over."""
    copy = shutil.copytree(dpo, tmp_path / "alone")
    (copy / "manifest.json").unlink()
    (copy / "lorafold.json").unlink()
    return copy


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["dora", "ia3", "loha"])
def test_the_engine_serves_stacks_of_any_methods(method: str, base, sft: Path, tmp_path) -> None:
    below = shutil.copytree(sft, tmp_path / "below")
    over = trained(base, tmp_path / "over", (below,), method=method)
    asked = EngineRequest("0", (5, 6, 7, 8), max_new_tokens=8, adapter="over")
    expected = generated(stacked(base, below, over), asked)
    assert alone(fresh_model(base), asked, {"over": over}) == expected


def test_the_engine_refuses_rows_of_tokens_in_a_stack(base: Path, worded) -> None:
    asked = EngineRequest("0", (5, 6), max_new_tokens=2, adapter="second")
    with pytest.raises(LorafoldError, match=r"trainable tokens; merge the adapters"):
        alone(fresh_model(base), asked, {"second": worded[1]})


def test_composing_a_whole_stack_gives_what_the_stack_computes(base, sft, dpo, tmp_path) -> None:
    lf.compose([sft, dpo], tmp_path / "both", model=base, how="linear", weights=[1, 1])
    both = tmp_path / "both"
    assert "over" not in SavedAdapter.open(both).record
    torch.testing.assert_close(logits(stacked(base, both)), logits(stacked(base, sft, dpo)))
    with pytest.raises(LorafoldError, match=f"--adapter {sft} --adapter {dpo}"):
        lf.compose([dpo], tmp_path / "alone", model=base)
    assert not (tmp_path / "alone").exists()


def test_composing_measures_each_over_what_it_lies_over(base, sft, dpo: Path, tmp_path) -> None:
    made = lf.compose(
        [sft, dpo], tmp_path / "both", model=base, how="linear", weights=[1, 1],
        data={"task": ROWS[:4]}, completions=False, storage="fp32", device="cpu",
    )  # fmt: skip
    found = made.interference.tasks["task"]
    assert found["dpo"].loss == pytest.approx(found["linear"].loss, rel=1e-4)
    assert found["sft"].loss != pytest.approx(found["linear"].loss, rel=1e-3)


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_inspecting_takes_what_is_below_as_the_base(method: str, base, sft: Path, tmp_path) -> None:
    over = trained(base, tmp_path / "over", (sft,), method=method)
    merged = tmp_path / "merged"
    lf.merge(base, sft, merged)
    found = lf.inspect(over, base, over=sft, against=sft, full=True)
    alone = lf.inspect(over, merged, allow_other_base=True, full=True)
    assert found.over == [str(sft)]
    assert found.whole.norm == pytest.approx(alone.whole.norm, rel=1e-4)
    assert found.whole.relative_norm == pytest.approx(alone.whole.relative_norm, rel=1e-4)
    assert found.against.adapter == str(sft)
    for path, site in found.sites.items():
        assert site.base.norm == pytest.approx(alone.sites[path].base.norm, rel=1e-4)
    with pytest.raises(LorafoldError, match="trained on top of"):
        lf.inspect(over, base)


def test_the_loss_along_an_update_starts_at_what_is_below(base: Path, sft: Path, dpo: Path) -> None:
    found = lf.inspect(dpo, base, over=sft, data=ROWS[:4], storage="fp32", device="cpu")
    loss = dict(found.paths.scaling)
    for t, adapters in ((0.0, [sft]), (1.0, [sft, dpo])):
        measured = lf.evaluate(
            base, ROWS[:4], adapters=adapters, completions=False, storage="fp32", device="cpu"
        )
        assert loss[t] == pytest.approx(measured.loss, rel=1e-4)
    with pytest.raises(LorafoldError, match="over, against, data"):
        lf.inspect(dpo, base, over=sft, against=sft, data=ROWS[:4])


@pytest.mark.estimated
def test_commands_end_to_end(base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data, model = ("--data", str(rows)), ("--model", str(base))
    a, b, c = (str(tmp_path / name) for name in "abc")
    recipe = (*data, *model, "--steps", "2", "--batch", "4", "--storage", "fp32", "--device", "cpu")
    stack = ("--adapter", a, "--adapter", b)
    assert lorafold("train", *recipe, "--out", a).returncode == 0
    done = lorafold("train", *recipe, "--over", a, "--out", b, "--verbose")
    assert done.returncode == 0
    assert f"over: {a} (" in "".join(done.stderr.splitlines())
    measured = lorafold("eval", *data, *model, *stack, "--json")
    assert measured.returncode == 0
    refused = lorafold("eval", *data, *model, "--adapter", b)
    assert refused.returncode == 2
    assert f"--adapter {a} --adapter {b}" in " ".join(refused.stderr.split())
    assert lorafold("merge", *model, *stack, "--out", c, "--device", "cpu").returncode == 0
    assert lorafold("inspect", b, *model, "--over", a, "--against", a, "--json").returncode == 0
    small = tmp_path / "small"
    asked = ("--over", a, "--rank", "16", "--out", str(small), "--json")
    resized = lorafold("resize", b, *model, *data, *asked)
    assert resized.returncode == 0
    figures = json.loads(resized.stdout.splitlines()[-1])
    assert figures["loss_after"] == pytest.approx(figures["loss_before"], rel=1e-3)
    assert SavedAdapter.open(small).record["over"] == SavedAdapter.open(b).record["over"]
    assert lorafold("train", *recipe, "--over", a, "--out", b, "--preview").returncode == 0
    assert lorafold("train", *recipe, "--over", a, "--out", a, "--overwrite").returncode == 2


def test_a_server_reads_what_is_below_from_its_own_directory_only(base, sft, dpo, tmp_path) -> None:
    adapters = tmp_path / "adapters"
    shutil.copytree(dpo, adapters / "dpo")
    (origin,) = parse_over(SavedAdapter.open(dpo).record)

    def below() -> Path:
        return Directory(adapters).base_adapter_path(origin, adapters / "dpo")

    with pytest.raises(LorafoldError, match="the directory of adapters has no adapter sft"):
        below()
    shutil.copytree(sft, tmp_path / "sft")
    (adapters / "sft").symlink_to(tmp_path / "sft")
    with pytest.raises(LorafoldError, match="leads outside"):
        below()
    (adapters / "sft").unlink()
    shutil.copytree(sft, adapters / "sft")
    assert below() == adapters / "sft"


def test_what_is_active_on_the_model_of_an_engine_is_below(base, sft, dpo, other: Path) -> None:
    asked = EngineRequest("0", (5, 6, 7, 8), max_new_tokens=8, adapter="dpo")
    expected = generated(stacked(base, sft, dpo), asked)
    assert alone(stacked(base, sft), asked, {"dpo": dpo}) == expected
    with pytest.raises(LorafoldError, match=f"loaded on top of {other} "):
        alone(stacked(base, other), asked, {"dpo": dpo})
