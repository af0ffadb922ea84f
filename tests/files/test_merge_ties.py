"""Merging into weights that a model shares among its blocks."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, RobertaConfig, Zamba2Config, ZambaConfig

import lorafold as lf
from adapter_cases import differs, make_adapter
from conftest import make_tokenizer
from fresh_models import fresh_model
from lorafold.api.merge import merge

SIZE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 4, "mamba_d_state": 8, "use_mamba_kernels": False,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid"],
    "vocab_size": 300, "max_position_embeddings": 512,
}  # fmt: skip
CONFIGS = {
    "zamba": lambda: ZambaConfig(**SIZE, n_mamba_heads=2, attention_hidden_size=64),
    "zamba2": lambda: Zamba2Config(**SIZE, n_mamba_heads=8, mamba_ngroups=1, chunk_size=8),
}
HEAD = {name: SIZE[name] for name in ("hidden_size", "intermediate_size", "vocab_size")}
CONFIGS["roberta"] = lambda: RobertaConfig(
    **HEAD, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512, is_decoder=True
)
SHARED = {"zamba": "shared_transf", "zamba2": "shared_transformer"}


@pytest.fixture(scope="module")
def shared_blocks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model whose attention is one for several of its blocks."""

    def make(kind: str) -> Path:
        path = tmp_path_factory.mktemp(kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32)
            for parameter in model.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(path)
        make_tokenizer().save_pretrained(path)
        return path

    return cache(make)


@pytest.mark.parametrize(("kind", "tokens"), [("zamba", ()), ("zamba2", (7, 300))])
def test_what_stays_equal_is_written_where_nothing_is_shared_any_more(
    kind, tokens, shared_blocks, tmp_path
):
    """The rows of tokens change the embedding and the head alike."""
    base, shared = shared_blocks(kind), SHARED[kind]
    targets = rf".*layers\.1\.{shared}\..*q_proj"
    adapter = make_adapter(base, tmp_path / "adapter", targets=targets, tokens=tokens)
    result = merge(str(base), [adapter], tmp_path / "merged", certificate=False)
    assert differs(tmp_path / "merged", base, adapter) < 1e-5
    assert f"model.layers.3.{shared}.self_attn.q_proj.weight" in result.folded.untied
    assert "lm_head.weight" in result.folded.untied
    said = result.summary()
    assert "weights are no longer shared: " in said
    assert re.search(r", .*,? and \d+ more were added", said)

    model = fresh_model(base)
    lf.load(model, adapter).merge(untie_weights=True)
    model.save_pretrained(tmp_path / "saved")
    assert differs(tmp_path / "saved", base, adapter) < 1e-5


@pytest.mark.parametrize("kind", SHARED)
def test_what_no_block_changes_alone_stays_shared(kind, shared_blocks, tmp_path):
    base = shared_blocks(kind)
    adapter = make_adapter(base, tmp_path / "adapter", targets=["in_proj"])
    result = merge(str(base), [adapter], tmp_path / "merged", certificate=False)
    assert result.folded.untied == ()
    assert differs(tmp_path / "merged", base, adapter) < 1e-5


def test_a_bias_that_was_tied_like_the_weight_beside_it_is_written(shared_blocks, tmp_path):
    base = shared_blocks("roberta")
    adapter = make_adapter(base, tmp_path / "adapter", targets=["decoder"])
    result = merge(str(base), [adapter], tmp_path / "merged", certificate=False)
    assert result.folded.untied == ("lm_head.decoder.weight", "lm_head.decoder.bias")
    assert differs(tmp_path / "merged", base, adapter) < 1e-5
