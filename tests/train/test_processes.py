"""Several processes of one run compute what one process does, and one alone speaks."""

import json
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lorafold.methods import METHODS, sparse
from lorafold.models import quantizations
from lorafold.training import loop, setup
from mixtures import CONFIGS
from process_cases import apart, rows, same_bytes, together, well

RUN = ("--device", "cpu", "--set", "storage=fp32", "--set", "steps=8", "--set", "batch=8")
FEW = ("lora", pytest.param("full", marks=pytest.mark.slow))
CLOSE = 1e-5
DROPS = {"lora", "rslora", "pissa", "olora", "dora", "adalora", "lokr", "vera"}


@pytest.fixture(scope="module")
def command(tiny_model_dir, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A run but for its method and its directory."""
    data = rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
    return ("train", "--model", str(tiny_model_dir("llama-wide")), "--data", str(data), *RUN)


@pytest.mark.parametrize("method", FEW)
def test_two_processes_train_what_one_does(method: str, command, tmp_path) -> None:
    dropped = ("--set", "dropout=0.1") if method in DROPS else ()
    command = (*command, "--method", method, *dropped)
    well(1, tmp_path, *command, "--out", str(tmp_path / "one"))
    well(2, tmp_path, *command, "--out", str(tmp_path / "two"), "--json")
    assert apart(tmp_path / "one", tmp_path / "two") < CLOSE


@pytest.mark.slow
def test_preferences_beside_their_reference(tiny_model_dir, tmp_path: Path) -> None:
    data, model = rows(tmp_path / "rows.jsonl", 24, "dpo"), str(tiny_model_dir("llama-wide"))
    command = ("train", "--model", model, "--data", str(data), *RUN, "--objective", "dpo")
    outs = [tmp_path / str(n) for n in (1, 2)]
    for n, out in enumerate(outs, 1):
        well(n, tmp_path, *command, "--set", "dropout=0.1", "--out", str(out))
    assert apart(*outs) < CLOSE


@pytest.mark.slow
def test_experts_some_of_which_get_no_token(tiny_model_dir, tmp_path: Path) -> None:
    config = CONFIGS["mixtral"](num_local_experts=16, max_position_embeddings=512)
    model = shutil.copytree(tiny_model_dir("llama-wide"), tmp_path / "mixture")
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained(model)
    data = rows(tmp_path / "rows.jsonl", 8)
    targets = ("--set", "targets=[gate_up_proj, down_proj, q_proj]", "--set", "accumulate=2")
    command = ("train", "--model", str(model), "--data", str(data), *RUN, *targets)
    outs = [tmp_path / str(n) for n in (1, 2)]
    for n, out in enumerate(outs, 1):
        well(n, tmp_path, *command, "--set", "dropout=0.1", "--out", str(out))
    assert apart(*outs) < CLOSE


def by_row(one: Path, folder: Path, *asked: str, but: str = "nothing") -> float:
    """How far rounding may lead: a run with micro-batches of one row, but for tensors of `but`."""
    batch = next(text for text in asked if text.startswith("batch=")).removeprefix("batch=")
    out = folder / "by row"
    well(1, folder, *asked, "--set", f"accumulate={batch}", "--overwrite", "--out", str(out))
    found = apart(one, out, but)
    assert found < 100 * CLOSE  # more is no rounding
    return found


@pytest.mark.slow
def test_three_processes_and_one_head_of_keys(tiny_model_dir, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny_model_dir("llama-wide"))
    config.num_key_value_heads = 1
    model = shutil.copytree(tiny_model_dir("llama-wide"), tmp_path / "model")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    data = rows(tmp_path / "rows.jsonl")
    asked = ("train", "--model", str(model), "--data", str(data), *RUN[:-1], "batch=9")
    for method in ("lora", "dora"):
        command, outs = (*asked, "--method", method, "--set", "dropout=0.1", "--overwrite"), []
        for n in (1, 3):
            outs.append(tmp_path / f"{method} {n}")
            well(n, tmp_path, *command, "--out", str(outs[-1]))
        rounded = by_row(outs[0], tmp_path, *command)
        print(method, f"{apart(*outs):.1e}, by row {rounded:.1e}")
        assert apart(*outs) < max(CLOSE, 2 * rounded)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", sorted(METHODS.keys() - {"linear-probe", "rslora", "pissa", "pfeiffer"})
)  # the last three are another scale, start or place of one that is here
def test_every_method_in_two_processes_and_four(method: str, command, tmp_path) -> None:
    """Two without dropout, four with it; prints the largest difference to one process."""
    for dropout, several in (("0", (2,)), ("0.1", (4,))) if method in DROPS else ((None, (2, 4)),):
        dropped = () if dropout is None else ("--set", f"dropout={dropout}")
        asked, outs = (*command, "--method", method, *dropped, "--overwrite"), {}
        for n, strategy in ((1, "ddp"), *product(several, ("ddp", "fsdp"))):
            outs[n, strategy] = out = tmp_path / f"{n} {strategy}"
            well(n, tmp_path, *asked, "--strategy", strategy, "--out", str(out))
        one = outs.pop((1, "ddp"))
        # gradients of key biases are zero but for rounding, which AdamW makes steps of
        but = "k_proj.base_layer.bias"
        found = {how: apart(one, out, but) for how, out in outs.items()}
        print(method, dropout, {f"{n} {how}": f"{d:.1e}" for (n, how), d in found.items()})
        if (most := max(found.values())) > CLOSE:
            assert most < 2 * by_row(one, tmp_path, *asked, but=but)
        for n in several if method != "full" else ():
            assert same_bytes(outs[n, "ddp"], outs[n, "fsdp"])


@pytest.mark.slow
def test_a_process_that_rounds_otherwise_trains_what_the_first_one_chose(command, tmp_path) -> None:
    """As on GPUs, where scores that are all but equal may come in another order."""

    def before() -> None:
        choose = sparse.largest_positions

        def otherwise(scores: list[torch.Tensor], density: float) -> list[torch.Tensor]:
            return choose([s * (1 + 0.2 * (i % 2)) for i, s in enumerate(scores)], density)

        sparse.largest_positions = otherwise

    asked = (*command, "--method", "fish", "--set", "options={samples: 8}")
    outs = [tmp_path / str(n) for n in (1, 2)]
    for n, out in enumerate(outs, 1):
        told = ("--out", str(out))
        done = well(n, tmp_path, *asked, *told, own=lambda r: {"before": before} if r else {})
        assert "no gradient in the first step" not in done[0].stderr + done[0].stdout
    assert apart(*outs) < CLOSE


DRAWN = ("--set", "objective_options={group: 4, max_new_tokens: 8}")
# of losses: what rounding makes of them; a quantized base computes in bf16 where that is fast
SHARED = {
    "nf4": (2e-3, "--set", "storage=nf4", "--set", "dropout=0.1"),
    "int8": (2e-3, "--set", "storage=int8"),
    "streamed": (1e-5, "--set", "streaming=true", "--set", "dropout=0.1"),
    "kto": (1e-6, "--objective", "kto"),
    "grpo": (1e-5, "--objective", "grpo", "--reward", r"regex:\w*a", *DRAWN),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SHARED)
def test_two_processes_share_other_runs(what: str, command, tmp_path) -> None:
    data, (close, *own) = rows(tmp_path / "rows.jsonl", kind=what), SHARED[what]
    asked, found = (*command[:4], str(data), *command[5:], *own), []
    for n in (1, 2):
        out = tmp_path / str(n)
        well(n, tmp_path, *asked, "--out", str(out))
        found.append(json.loads((out / "lorafold.json").read_text())["losses"])
    assert found[1] == pytest.approx(found[0], abs=close)


DIVIDED = {
    "uneven batches": ("--set", "batch=6", "--set", "accumulate=3"),
    "checkpointed": ("--set", "gradient_checkpointing=true"),
    "nf4": ("--set", "storage=nf4"),
    "nf4 in fp32": ("--set", "storage=nf4"),
    "dropout": ("--set", "dropout=0.1"),
    "prompt": ("--method", "prompt"),
    "dora": ("--method", "dora", "--eval-fraction", "0.2"),
    "dpo": ("--objective", "dpo"),
    "kto": ("--objective", "kto", "--set", "batch=6", "--set", "accumulate=3"),
    "reward": ("--objective", "reward"),
    "pissa": ("--method", "pissa"),
    "adalora": ("--method", "adalora"),
    "8 bits": ("--set", "optimizer=adamw8bit", "--rank", "64"),
    "full": ("--method", "full", "--set", "clip=0.5", "--eval-fraction", "0.2"),
    "full, some modules": ("--method", "full", "--set", "targets=[q_proj, down_proj]"),
    "full, bf16": ("--method", "full", "--set", "storage=bf16"),
    "full, checkpointed": ("--method", "full", "--set", "gradient_checkpointing=true"),
}


def noting(folder: Path, fp32: bool) -> Callable[[int], dict]:
    """Notes the bytes of weights when a method is attached; fp32: bf16 is not native."""

    def before() -> None:
        attach = setup.attach
        if fp32:
            quantizations.native_bf16 = lambda device: (False, "as asked")

        def noted(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            storages = {p.untyped_storage()._cdata: p for p in model.parameters()}.values()
            held = sum(p.untyped_storage().nbytes() for p in storages)
            (folder / "held").write_text(f"{held} {sum(p.nbytes for p in storages)}")
            return attach(model, *args, **kwargs)

        setup.attach = noted  # type: ignore[assignment]

    return lambda rank: {"before": before}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_moments_are_divided(method: str, command: tuple[str, ...], tmp_path: Path) -> None:
    """Each process has those of what it updates, and together they have those of one process."""

    def own(rank: int) -> dict:
        def before() -> None:
            tensors_of = loop.optimizer_tensors

            def noted(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
                found = tensors_of(optimizer)
                sizes = {name: t.nbytes for name, t in found.items()}
                (tmp_path / f"{rank}.json").write_text(json.dumps(sizes))
                return found

            loop.optimizer_tensors = noted

        return {"before": before}

    found = []
    for n in (1, 2):
        out = ("--method", method, "--strategy", "fsdp", "--out", str(tmp_path / str(n)))
        well(n, tmp_path, *command, *out, own=own)
        found += [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(n)]
    whole, one, other = found
    assert not one.keys() & other.keys()
    assert one | other == whole
    assert sum(one.values()) == pytest.approx(sum(other.values()), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("what", DIVIDED)
def test_divided_weights_train_the_bytes_of_whole_ones(what: str, command, tmp_path: Path) -> None:
    kinds = {"dpo": "dpo", "reward": "dpo", "kto": "kto"}
    data = rows(tmp_path / "rows.jsonl", kind=kinds.get(what, "sft"))
    asked = (*command[:4], str(data), *command[5:], *DIVIDED[what])
    outs, needed = [tmp_path / strategy for strategy in ("ddp", "fsdp")], []
    for out in outs:
        there = (*asked, "--strategy", out.name, "--out", str(out))
        found = well(2, tmp_path, *there, own=noting(tmp_path, "fp32" in what))
        said = found[0].stderr + found[0].stdout
        needed += re.findall(r"memory: ([\d.]+) MB at the peak", said)
    assert same_bytes(*outs)
    held, whole = map(int, (tmp_path / "held").read_text().split())
    assert held < 0.4 * whole  # what is small, since parts are beside the model
    whole_need, divided_need = map(float, needed)
    assert divided_need <= whole_need
    kept, whole = re.findall(r"keeps ([\d.]+) kB of ([\d.]+) kB of weights", said)[0]
    assert float(kept) == pytest.approx(float(whole) / 2, rel=0.01)


@pytest.mark.few(2)
@pytest.mark.parametrize("processes", [1, 2])
def test_what_can_not_be_divided_is_refused(processes: int, command, tmp_path) -> None:
    out, data = tmp_path / "out", tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a"}\n' * 16)
    asked = (*command[:4], str(data), *command[5:], "--strategy", "fsdp", *SHARED["grpo"][1:])
    done = together(processes, tmp_path, *asked, "--out", str(out))
    assert [p.code for p in done] == [2] * processes
    assert "strategy fsdp does not support the objective grpo" in done[0].stderr
    assert not out.exists()


def test_one_process_has_all_weights(command: tuple[str, ...], tmp_path: Path) -> None:
    [one] = together(1, tmp_path, *command, "--strategy", "fsdp", "--out", str(tmp_path / "out"))
    assert one.code == 0
    assert "one process has all weights" in one.stderr + one.stdout
