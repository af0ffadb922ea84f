"""Directions that an update reads and writes: planted tokens, and places in the residual stream."""

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, Olmo2Config

import lorafold as lf
from lorafold.core.delta import put
from lorafold.errors import LorafoldError
from lorafold.inspecting.inspect import inspect
from lorafold.inspecting.residual_stream import gain, stream_of
from lorafold.inspecting.token_directions import (
    Directions,
    largest_shares,
    mean_nearest,
    nearest,
    read_vectors,
    shares,
)  # fmt: skip
from lorafold.inspecting.updates import of_factors
from lorafold.models.checkpoint import build
from lorafold.peft.adapter_directory import open_all
from lorafold.resolve import Base

LLAMA = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
LAST = ("self_attn.o_proj", "mlp.down_proj")
GPT2 = {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2"}
PLACES = {  # blocks, readers with their norm, writers, the last norm
    **dict.fromkeys(("llama", "qwen2", "gemma"), ("model.layers", LLAMA, LAST, "model.norm")),
    "gpt2": ("transformer.h", GPT2, ("attn.c_proj", "mlp.c_proj"), "transformer.ln_f"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_readers_and_writers_of_the_residual_stream(kind, tiny_model):
    model = tiny_model(kind)
    blocks, readers, writers, final = PLACES[kind]
    found = stream_of(model)
    expected = {
        f"{blocks}.{i}.{path}": f"{blocks}.{i}.{norm}"
        for i in range(2)
        for path, norm in readers.items()
    }
    assert found.readers == {**expected, "lm_head": final}
    assert {p for p in found.writers if p.startswith(blocks)} == {
        f"{blocks}.{i}.{path}" for i in range(2) for path in writers
    }
    assert found.embedding in found.writers
    assert (found.final_norm, found.size) == (final, 32)


def test_places_where_norms_come_after_and_among_experts():
    size = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 300,
    }  # fmt: skip
    after = stream_of(build(Olmo2Config(**size), False))
    assert {p: n for p, n in after.readers.items() if "attn" in p} == {
        f"model.layers.{i}.self_attn.{name}_proj": "" for i in range(2) for name in "qkv"
    }
    assert {p.split(".")[-1] for p in after.writers} == {"embed_tokens", "o_proj", "down_proj"}
    config = MixtralConfig(**size, num_key_value_heads=2, num_local_experts=2)
    experts = stream_of(build(config, False))
    assert experts.readers["model.layers.1.self_attn.q_proj"] == "model.layers.1.input_layernorm"
    assert {p: n for p, n in experts.readers.items() if "experts" in p} == {
        f"model.layers.{i}.mlp.experts.gate_up_proj": f"model.layers.{i}.post_attention_layernorm"
        for i in range(2)
    }
    assert {p for p in experts.writers if "layers" in p} == {
        f"model.layers.{i}.{name}"
        for i in range(2)
        for name in ("self_attn.o_proj", "mlp.experts.down_proj")
    }


@pytest.mark.parametrize("kind", PLACES)
def test_gain_is_what_the_norm_does_to_a_direction(kind, tiny_model):
    model = tiny_model(kind)
    norm = model.get_submodule(stream_of(model).final_norm)
    with torch.no_grad():
        norm.weight.add_(0.3 * torch.randn(32))
        h, v = torch.randn(32), torch.randn(32)
        h -= h.mean()  # LayerNorm takes it away
        bias = getattr(norm, "bias", None)
        read = v @ (norm(h) - (0 if bias is None else bias))
        size = h.square().mean().sqrt()
        expected = float((gain(norm, 32) * v) @ h / size)
        assert float(read) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_nearest_is_brute_force_over_many_rows():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20_000, 8, generator=generator).bfloat16()
    directions = torch.randn(8, 5, generator=generator)
    near = nearest(rows, directions)
    similar = torch.nn.functional.cosine_similarity
    cosines = similar(rows.float()[:, :, None], directions[None], dim=1)
    for end, sign in ((near.top, 1), (near.bottom, -1)):
        values, places = (sign * cosines).topk(6, 0)
        assert torch.allclose(end[0], sign * values, atol=1e-5)
        assert torch.equal(end[1], places)


@pytest.mark.parametrize("kind", PLACES)
def test_planted_tokens_are_read_and_written(kind, tiny_model, tiny_model_dir, tmp_path):
    blocks, readers, writers, final = PLACES[kind]
    (reader, norm), source = next(iter(readers.items())), Base(tiny_model_dir(kind))
    token = source.tokenizer().decode([77])

    def found(at: str, norm: str, writes: bool) -> Any:
        """The figures of an adapter of rank 1 at a module, with the token planted on one side."""
        model, path = tiny_model(kind), f"{blocks}.1.{at}"
        end = model.get_output_embeddings() if writes else model.get_input_embeddings()
        adapter = lf.attach(model, lf.LoRA(rank=1, alpha=1, dropout=0.0), [path])
        delta = adapter.deltas[path]
        with torch.no_grad():
            direction = end.weight[77] / gain(model.get_submodule(norm), 32)
            out, inn = delta.delta().shape
            put(delta, "B", direction[:, None] if writes else torch.randn(out, 1))
            put(delta, "A", torch.randn(1, inn) if writes else direction[None])
        adapter.save(tmp_path / at)
        return inspect(source, open_all([tmp_path / at])).sites[path]

    def nearest_of(ends: Any) -> tuple[float, str]:
        near = [(e.cosine, e.name) for e in ends.positive]
        return max(near + [(-e.cosine, e.name) for e in ends.negative])

    reads = found(reader, f"{blocks}.1.{norm}", False).reads
    assert nearest_of(reads[0]) == (pytest.approx(1, abs=1e-4), token)
    written = found(writers[1], final, True)
    assert written.reads is None
    assert nearest_of(written.writes[0]) == (pytest.approx(1, abs=1e-4), token)


def test_shares_of_vectors_are_those_of_the_dense_update():
    up, down, vectors = torch.randn(20, 3), torch.randn(3, 12), torch.randn(6, 12)
    svd, dense = of_factors(up, down), up @ down
    unit = torch.nn.functional.normalize(vectors, dim=1)
    expected = (dense @ unit.t()).square().sum(0) / dense.square().sum()
    side = Directions(svd.v, False)
    assert torch.allclose(shares(side, svd.s, vectors), expected, atol=1e-5)
    basis = torch.linalg.qr(torch.randn(12, 12))[0]
    assert float(shares(side, svd.s, basis).sum()) == pytest.approx(1, rel=1e-4)
    top = largest_shares(side, svd.s, list("abcdef"), vectors)
    assert list(top.values()) == sorted(top.values(), reverse=True)
    assert next(iter(top)) == "abcdef"[int(expected.argmax())]


def test_vectors_of_a_file(tmp_path):
    rows = torch.randn(3, 8)
    file = tmp_path / "f.safetensors"
    save_file({"one": torch.ones(8), "decoder": rows, "columns": torch.randn(8, 5)}, file)
    names, matrix = read_vectors(file, 8)
    columns, decoder = [f"columns[{i}]" for i in range(5)], [f"decoder[{i}]" for i in range(3)]
    assert names == [*columns, *decoder, "one"]
    assert torch.equal(matrix[5:8], rows)
    save_file({"wrong": torch.ones(7), "ids": torch.ones(8, dtype=torch.long)}, file)
    told = r"ids: shape \[8\].*wrong: shape \[7\], expected \[8\]"
    with pytest.raises(LorafoldError, match=told):
        read_vectors(file, 8)


def test_chance_is_what_random_directions_come_to():
    rows = torch.randn(500, 16, generator=torch.Generator().manual_seed(1))
    found = mean_nearest(rows, None)
    drawn = torch.nn.functional.normalize(torch.randn(16, 2000), dim=0)
    expected = (torch.nn.functional.normalize(rows, dim=1) @ drawn).amax(0).mean()
    assert found == pytest.approx(float(expected), rel=0.05)
    # all rows on one line; a plane full of rows
    assert mean_nearest(rows[:, :1].expand(-1, 16), None) < found < mean_nearest(rows[:, :2], None)
