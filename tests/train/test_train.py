"""Training end to end on tiny models: resumption, interruption, and errors."""

import io
import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PreTrainedModel

import lorafold as lf
from fresh_models import fresh_model
from lorafold.errors import LorafoldError
from lorafold.models.loading import load_model
from lorafold.models.tokenizer import load_tokenizer
from lorafold.runtime.processes import SINGLE_PROCESS
from lorafold.training.checkpoint import RunDirectory
from lorafold.training.run import train
from lorafold.training_step.data_parallel import Replicated
from process_cases import same_bytes
from training_cases import (
    ROWS,
    beginning,
    command,
    killed,
    quiet,
    request,
    stopping,
    train_until_killed,
    trained,
    weights,
)

pytestmark = pytest.mark.usefixtures("unestimated")


@pytest.fixture
def llama(tiny_model_dir) -> Path:
    return tiny_model_dir("llama")


@pytest.mark.estimated
@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "gpt2"])
def test_the_same_request_trains_every_family(kind: str, tiny_model_dir, tmp_path: Path) -> None:
    result = trained(tiny_model_dir(kind), tmp_path / "a", steps=12, lr=1e-2, lr_b=5e-2)
    # a random frozen head starts at ln V = 5.7 and can leave it only slowly
    assert result.losses[-1] < result.losses[0] - 0.15
    assert json.loads((tmp_path / "a" / "lorafold.json").read_text())["losses"] == result.losses
    assert not (tmp_path / "a.run").exists()
    model = fresh_model(tiny_model_dir(kind))
    lf.load(model, tmp_path / "a")


PLAIN = {"packing": True, "dropout": 0.3}
ROLES = {"dropout": 0.0, "lr": 1e-2, "new_tokens": ("<|user|>", "<|assistant|>")}
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("llama", PLAIN),
        *(pytest.param(kind, ROLES, marks=pytest.mark.slow) for kind in ("gemma", "qwen2")),
    ],
    ids=["plain", "tokens-gemma", "tokens-qwen2"],
)
def test_padded_packed_and_accumulated_losses_agree(kind, given, tiny_model_dir, tmp_path) -> None:
    if given is ROLES:
        (tmp_path / "chat.jinja").write_text(TEMPLATE)
        given = {**ROLES, "chat_template": str(tmp_path / "chat.jinja")}
    ways = {
        "packed": {}, "padded": {"packing": False}, "accumulated": {"accumulate": 4},
        "checkpointed": {"gradient_checkpointing": True},
    }  # fmt: skip
    losses = {
        name: trained(tiny_model_dir(kind), tmp_path / name, **{**given, **fields}).losses
        for name, fields in ways.items()
    }
    for name in ways:
        assert losses[name] == pytest.approx(losses["packed"], rel=1e-4), name


def test_what_rows_begin_with_is_said_and_changes_no_loss(llama, tmp_path: Path) -> None:
    """In one micro-batch, in several, checkpointed, and killed and resumed as it began."""
    model, told = llama, Console(file=io.StringIO(), width=200)
    ways = {
        "apart": {"packing": True},
        "once": {},
        "accumulated": {"accumulate": 2},
        "checkpointed": {"gradient_checkpointing": True},
    }
    losses = {
        name: train(request(model, tmp_path / name, dropout=0.0, **fields), told).losses
        for name, fields in ways.items()
    }
    for name in ways:
        assert losses[name] == pytest.approx(losses["apart"], rel=1e-5), name
    said = re.findall(r"packing: (\d+)% of the tokens repeat a prefix", told.file.getvalue())
    assert len(said) == 3
    assert all(int(share) >= 10 for share in said)


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_resuming_gives_the_bytes_of_a_run_that_never_stopped(full: bool, llama, tmp_path) -> None:
    fields = {"steps": 20, "save_every": 5}
    if full:
        fields |= {"method": "full", "storage": "bf16", "seed": 3}
    told = Console(file=io.StringIO(), width=200)
    straight = train(request(llama, tmp_path / "straight", **fields), told)
    killed(train_until_killed, llama, tmp_path / "killed", fields)
    assert not (tmp_path / "killed").exists()
    resumed = trained(llama, tmp_path / "killed", resume=True, **fields)
    assert resumed.losses == straight.losses
    assert same_bytes(tmp_path / "killed", tmp_path / "straight")
    size = f"{8 * straight.trainable_parameters / 1e3:.1f} kB"
    line = f"optimizer: adamw with fp32 state, {size} (16-bit weights are trained)"
    said = f"{line}; updates rounded stochastically, seed 3\n" in told.file.getvalue()
    assert said == full


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_stop_is_asked_for_and_the_run_goes_on_later(number: int, llama, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    process = beginning(
        command, tmp_path / "told", "train", "--model", str(llama),
        "--data", str(data), "--out", str(tmp_path / "a"), "--set", "steps=4000",
        "--set", "save_every=100000", "--storage", "fp32", "--device", "cpu",
    )  # fmt: skip
    while not (tmp_path / "a.run").exists():
        assert process.is_alive()
        time.sleep(0.1)
    time.sleep(0.5)
    os.kill(process.pid, number)
    process.join(60)
    err = (tmp_path / "told").read_text()
    assert process.exitcode == 128 + number
    assert "Traceback" not in err
    step = int(re.search(r"stopped after step (\d+)", err).group(1))
    assert (tmp_path / "a.run" / f"step-{step:06d}" / "state.json").is_file()
    assert not (tmp_path / "a").exists()


def test_a_run_ended_before_its_first_checkpoint_starts_anew(llama, tmp_path, monkeypatch) -> None:
    """Its method chooses the entries that it trains again: no checkpoint has them."""
    fields = {"method": "fish", "steps": 2, "lr": 1e-2}
    whole = trained(llama, tmp_path / "whole", **fields)

    with stopping(0), pytest.raises(KeyboardInterrupt):
        trained(llama, tmp_path / "a", **fields)
    assert not RunDirectory(tmp_path / "a").checkpoints()
    again = request(llama, tmp_path / "a", resume=True, **fields)
    assert train(again, quiet()).losses == whole.losses
    ours, theirs = weights(tmp_path / "a"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_resumed_run_must_be_the_same_run(llama, tmp_path: Path) -> None:
    (tmp_path / "a.run").mkdir()
    with pytest.raises(LorafoldError, match=r"a.run: found no run to resume"):
        trained(llama, tmp_path / "a", resume=True)
    (tmp_path / "a.run").rmdir()
    with pytest.raises(LorafoldError, match="loss is nan"):
        trained(llama, tmp_path / "a", lr=1e30, lr_b=1e30, save_every=1)
    with pytest.raises(LorafoldError, match=r"have changed: lr: was 1e\+30, now 0.001; lr_b"):
        trained(llama, tmp_path / "a", lr=1e-3, resume=True)


@pytest.mark.slow
def test_other_held_out_rows_are_refused_whatever_the_run_said(llama, tmp_path) -> None:
    out, fields = tmp_path / "a", {"lr": 1e30, "lr_b": 1e30, "save_every": 1}
    one, other = ({"prompt": "a", "completion": c} for c in ("b", "c"))
    asked = replace(request(llama, out, **fields), eval_rows=[one])
    with pytest.raises(LorafoldError, match="nan"):
        train(asked, quiet())
    again = replace(asked, eval_rows=[other], resume=True)
    with pytest.raises(LorafoldError, match="eval_data: was "):
        train(again, quiet())
    identity = json.loads((RunDirectory(out).path / "run.json").read_text())
    del identity["eval_data"]
    RunDirectory(out).start(identity)  # as a version began it that knew no such field
    with pytest.raises(LorafoldError, match=r"eval_data: was None, now .* and lorafold version"):
        train(again, quiet())


@pytest.mark.parametrize("found", ["more", "fewer"])
def test_targets_that_mean_other_modules_now(found: str, llama, tmp_path: Path) -> None:
    stops = {"lr": 1e30, "lr_b": 1e30, "save_every": 1}
    asked = request(llama, tmp_path / "a", **stops)
    with pytest.raises(LorafoldError, match="the loss is nan"):
        train(asked, quiet())
    again = replace(asked, resume=True)
    run = RunDirectory(again.out)
    [last] = run.checkpoints().values()
    progress, tensors, optimizer = run.load(last)
    some = {k: t for k, t in tensors.items() if k.split(".")[-2] in ("up_proj", "down_proj")}
    assert some
    if found == "more":
        tensors = {k: t for k, t in tensors.items() if k not in some}
        said = r"missing \['model\.layers\.0\.mlp\.down_proj\."
    else:
        tensors |= {k.replace(".mlp.", ".indexer."): t.clone() for k, t in some.items()}
        said = r"unknown \['model\.layers\.0\.indexer\.down_proj\."
    pieces = Replicated(SINGLE_PROCESS).pieces
    run.save(progress, pieces(tensors), pieces(optimizer), keep=2)
    with pytest.raises(LorafoldError, match=f"keys of the state dict: .*{said}"):
        train(again, quiet())


def test_a_loss_not_finite_stops_the_run_and_names_the_last_checkpoint(llama, tmp_path) -> None:
    told = r"the loss is nan; the last good checkpoint is .*a.run/step-0*1\b"
    with pytest.raises(LorafoldError, match=told):
        trained(llama, tmp_path / "a", lr=1e30, lr_b=1e30, clip=0.0, save_every=1)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("lr", "steps", "told"),
    [
        (1e9, 9, r"steps 2 to 6: the gradient is not finite; the last good .*step-000001\b"),
        (1e38, 1, r"step 1: found NaN or infinity in model.embed_tokens.weight.*no checkpoint"),
    ],
)
def test_full_fine_tuning_writes_nothing_not_finite(lr, steps, told, llama, tmp_path) -> None:
    fields = {"method": "full", "lr": lr, "steps": steps, "save_every": 1, "keep": 9}
    with pytest.raises(LorafoldError, match=told):
        trained(llama, tmp_path / "a", **fields)
    assert not (tmp_path / "a").exists()
    for file in tmp_path.rglob("adapter.safetensors"):
        assert all(t.isfinite().all() for t in load_file(file).values())


@pytest.mark.parametrize("over", ["fish", "lt-sft"])
def test_a_method_without_a_file_format_is_refused_before_training(over, llama, tmp_path) -> None:
    with pytest.raises(LorafoldError, match=r"DoRA\(over=.*there is no file format for this spec"):
        trained(llama, tmp_path / "a", method="dora", options={"over": over})
    assert [*tmp_path.rglob("*")] == []


def test_a_model_that_is_not_what_was_trained_is_no_success(llama, tmp_path, monkeypatch) -> None:
    save = PreTrainedModel.save_pretrained

    def damaged(model: Any, folder: Path, **how: Any) -> None:
        save(model, folder, **how)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", damaged)
    with pytest.raises(LorafoldError, match=r"differ from the trained values in model\.norm\.w"):
        trained(llama, tmp_path / "a", method="full")
    assert RunDirectory(tmp_path / "a").checkpoints()


@pytest.mark.parametrize(("rate", "better"), [(5e-3, True), (1e-9, False)])
def test_a_loss_that_is_no_better_than_the_base_is_told(rate, better, llama, tmp_path) -> None:
    asked = {"steps": 54, "lr": rate, "lr_b": rate}
    console = Console(file=io.StringIO(), width=400)
    result = train(request(llama, tmp_path / "a", **asked), console)
    assert result.guessing["guessing"] == result.losses[0]
    assert result.guessing["better"] == better
    assert ("step 52: so far the loss is" in console.file.getvalue()) != better
    assert ("no better than guessing" in str(result)) != better


def test_an_adapter_without_gradient_is_an_error(llama, tmp_path: Path) -> None:
    with pytest.raises(LorafoldError, match=r"no gradient in the first step.*lm_head"):
        # alpha so small that every gradient underflows to zero
        trained(llama, tmp_path / "a", alpha=1e-300, targets=["lm_head"], clip=0.0)


def test_modules_without_a_gradient_are_named(llama, tmp_path, caplog, monkeypatch) -> None:
    """A model whose second block's output is thrown away."""
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaDecoderLayer.forward

    def left_out(self, x, *args, **kwargs):
        y = forward(self, x, *args, **kwargs)
        return x if self.self_attn.layer_idx else y

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", left_out)
    asked = request(llama, tmp_path / "a", targets=["q_proj", "v_proj"], steps=2)
    train(asked, quiet())
    [told] = [text for text in caplog.messages if "no gradient" in text]
    assert told == (
        "2 of the 4 adapted modules get no gradient in the first step, because the loss of its rows"
        " does not depend on them: model.layers.1.self_attn.q_proj, model.layers.1.self_attn.v_proj"
    )


def test_modules_whose_first_gradient_is_zero_are_not(llama, tmp_path, caplog) -> None:
    """Fastfood's scale of a matrix multiplies a vector that starts at zero."""
    trained(llama, tmp_path / "a", method="fastfood", steps=1)
    assert not [text for text in caplog.messages if "no gradient" in text]


def test_evaluation_best_checkpoint_and_warm_start(llama, tmp_path: Path) -> None:
    first = trained(llama, tmp_path / "a", eval_rows=ROWS[:6], lr=1e-2, lr_b=5e-2, steps=10)
    record = json.loads((tmp_path / "a" / "lorafold.json").read_text())
    assert record["evals"]["10"] == first.eval_loss
    second = trained(llama, tmp_path / "b", init_adapter=tmp_path / "a", lr=1e-4)
    assert second.losses[0] < first.losses[0]
    # training makes these less likely
    other = [
        {"prompt": "Book a table", "completion": "the quick brown fox jumps over the lazy dog"}
    ]
    fields = {"lr": 1e-2, "lr_b": 0.2, "steps": 10, "eval_every": 1, "targets": ["lm_head"]}
    worse = trained(llama, tmp_path / "c", eval_rows=other, **fields)
    record = json.loads((tmp_path / "c" / "lorafold.json").read_text())
    best = min(record["evals"], key=record["evals"].get)
    assert int(best) < 10
    model = fresh_model(llama)
    lf.load(model, tmp_path / "c.best")
    assert worse.eval_loss > record["evals"][best]
    card = (tmp_path / "c.best" / "README.md").read_text()
    assert f"| eval loss | {record['evals'][best]:,.6g} |" in card


def test_an_existing_out_is_refused_before_anything_is_done(llama, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious").write_text("x")
    with pytest.raises(LorafoldError, match="contains files that lorafold did not write"):
        trained(llama, tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_a_wrong_option_of_the_method(llama, tmp_path: Path) -> None:
    with pytest.raises(LorafoldError, match="method lora has no option colour; options: rank"):
        trained(llama, tmp_path / "a", options={"colour": 1})
    with pytest.raises(LorafoldError, match="unknown method 'lorra'"):
        trained(llama, tmp_path / "a", method="lorra")
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_run_is_not_thrown_away_unasked(llama, tmp_path: Path) -> None:
    with pytest.raises(LorafoldError, match="loss is nan"):
        trained(llama, tmp_path / "a", lr=1e30, lr_b=1e30, clip=0.0, save_every=1)
    told = r"a.run contains a stopped run: pass --resume to continue it"
    with pytest.raises(LorafoldError, match=told):
        trained(llama, tmp_path / "a")
    trained(llama, tmp_path / "a", overwrite=True)


def test_what_the_initial_adapter_brings_cant_be_set_beside_it(llama, tmp_path) -> None:
    fixed = "rank, targets: the adapter of --init-adapter fixes these fields"
    with pytest.raises(LorafoldError, match=fixed):
        trained(llama, tmp_path / "b", init_adapter=tmp_path / "a", rank=2, targets="mlp")


def test_trackers_keep_their_logs(llama, tmp_path: Path) -> None:
    trained(llama, tmp_path / "a", trackers=("tensorboard",))
    found = EventAccumulator(str(tmp_path / "a.logs" / "lorafold")).Reload()
    norms = [event.value for event in found.Scalars("gradient norm")]
    shown = json.loads((tmp_path / "a" / "lorafold.json").read_text())["steps"]["gradient norm"]
    assert norms == pytest.approx(shown, rel=1e-5)
    record = json.loads((tmp_path / "a" / "lorafold.json").read_text())
    rates = [event.value for event in found.Scalars("lr")]
    assert rates == pytest.approx(record["steps"]["learning rate"], rel=1e-5)
    assert len(norms) == 6
    assert min(norms) > 0


def test_full_fine_tuning_leaves_a_model_with_its_tokenizer(llama, tmp_path: Path) -> None:
    trained(llama, tmp_path / "a", method="full")
    assert load_tokenizer(tmp_path / "a").get_vocab() == load_tokenizer(llama).get_vocab()
    load_model(tmp_path / "a", torch.float32)
