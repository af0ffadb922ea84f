"""The attention heads that an update writes to and reads from."""

import json
from pathlib import Path

import pytest
import torch

import lorafold as lf
from conftest import lorafold
from lorafold.inspecting.residual_stream import Heads, heads_of, stream_of
from lorafold.inspecting.updates import of_dense

ATTENTION = "model.layers.1.self_attn"


def planted(model_dir: Path, out: Path, where: dict[str, tuple[int, int]]) -> None:
    """An adapter whose update of a module lies in some rows, or columns for o_proj, alone."""
    model = lf.load_model(model_dir, "fp32")
    adapter = lf.attach(model, lf.LoRA(rank=2), "all-linear")
    with torch.no_grad():
        for path, (first, last) in where.items():
            delta = adapter.deltas[path]
            down, up = (p for _, p in delta.named_parameters())
            up.normal_()
            side = down.T if path.endswith("o_proj") else up  # (features, r)
            mask = torch.zeros(len(side), 1)
            mask[first:last] = 1
            side.mul_(mask)
    adapter.save(out)


def test_planted_heads_are_found_and_shown(tiny_model_dir, tmp_path) -> None:
    model_dir, out, page = tiny_model_dir("llama"), tmp_path / "planted", tmp_path / "page.html"
    config = lf.load_model(model_dir, "fp32").config
    size, queries, keys = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    planted(model_dir, out, {
        f"{ATTENTION}.q_proj": (size, 2 * size),
        f"{ATTENTION}.v_proj": (0, size),
        f"{ATTENTION}.o_proj": ((queries - 1) * size, queries * size),
    })  # fmt: skip
    told = lorafold("inspect", str(out), "--model", str(model_dir), "--json", "--html", str(page))
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    heads = {path: site["heads"] for path, site in found["sites"].items() if "heads" in site}
    assert {path.rpartition(".")[2] for path in heads} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    last = queries - 1
    for name, at, n in (("q_proj", 1, queries), ("v_proj", 0, keys), ("o_proj", last, queries)):
        wanted = [float(head == at) for head in range(n)]
        assert heads[f"{ATTENTION}.{name}"] == pytest.approx(wanted, abs=1e-6)
    assert heads["model.layers.0.self_attn.q_proj"] == [0.0] * queries
    [said] = [line for line in found["advice"] if "stands out most" in line]
    assert "100%" in said
    assert "Attention heads" in page.read_text()
    assert "heads_left_out" not in found


def test_shares_are_those_of_the_dense_update() -> None:
    torch.manual_seed(0)
    dw = torch.randn(12, 20)
    whole = float(dw.norm() ** 2)
    rows = [float(dw[n * 4 : n * 4 + 4].norm() ** 2) / whole for n in range(3)]
    columns = [float(dw[:, n * 5 : n * 5 + 5].norm() ** 2) / whole for n in range(4)]
    assert Heads(3, 4, True).shares(of_dense(dw)) == pytest.approx(rows, rel=1e-5)
    assert Heads(4, 5, False).shares(of_dense(dw)) == pytest.approx(columns, rel=1e-5)


def test_a_fused_projection_is_said_to_be_left_out(tiny_model_dir, tmp_path) -> None:
    model_dir, out = tiny_model_dir("gpt2"), tmp_path / "fused"
    model = lf.load_model(model_dir, "fp32")
    found, fused = heads_of(model, stream_of(model))
    assert {path.rpartition(".")[2] for path in fused} == {"c_attn"}
    assert {path.rpartition("h.")[2].partition(".")[2] for path in found} == {"attn.c_proj"}
    lf.attach(model, lf.LoRA(rank=2), "all-linear").save(out)
    left = lf.inspect(out, model_dir).heads_left_out
    assert left is not None
    assert left.startswith("The heads of projections that are one matrix")
