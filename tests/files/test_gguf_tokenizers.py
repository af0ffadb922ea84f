"""GGUF files: how their text is split and their positions are scaled, read by the rule that the
file names, or refused.
"""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Split

from gguf_cases import write_gguf
from lorafold.errors import LorafoldError
from lorafold.models.gguf_tokenizers import AS_GPT2, EACH_DIGIT, GPT2, RULES
from lorafold.models.loading import load_model
from lorafold.models.sources import resolve_model
from lorafold.models.tokenizer import load_tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORAFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


TEXT = "It's 2026:  don't pay  1234.50 €!\n\n\tnaïve 中文かな 가나 🙂 code_x=(a)\r\n  end "


def pieces(tokenizer, text: str) -> list[str]:
    """How a byte-level tokenizer splits a text, as text."""
    found = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in found]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("glm4", ["It", "'s", " ", "202", "6", ":", " ", " ", "123", "45", "\n\n", "x"]),
        ("hunyuan", ["It", "'s", " ", "2", "0", "2", "6", ":", " ", " ", *"12345", "\n\n", "x"]),
        ("exaone", ["It", "'s", " ", *"2026", ":", "  ", *"12345", "\n", "\n", "x"]),
        ("exaone4", ["It", "'s", " 2026", ":", " ", " 12345", "\n", "\n", "x"]),
        ("deepseek-v3", ["It", "'s", " ", "202", "6", ":", "  ", "123", "45", "\n\n", "x"]),
    ],
)
def test_text_is_split_by_the_rule_that_a_file_names(
    pre, expected, tiny_model_dir, tmp_path, cache
):
    write_gguf(tiny_model_dir("llama"), tmp_path / "tiny.gguf", pre=pre)
    tokenizer = load_tokenizer(tmp_path / "tiny.gguf")
    assert pieces(tokenizer, "It's 2026:  12345\n\nx") == expected
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT


def test_all_rules_are_ones_and_none_is_two():
    names = [*AS_GPT2, *EACH_DIGIT, *RULES]
    assert len(names) == len(set(names))
    for rule in {rule for rules in RULES.values() for rule in rules}:
        found = Split(Regex(rule), behavior="isolated").pre_tokenize_str(TEXT)
        assert "".join(piece for piece, _ in found) == TEXT
        assert len(found) > 2
    spelled = Split(Regex(GPT2), behavior="isolated").pre_tokenize_str(TEXT)
    built_in = ByteLevel(add_prefix_space=False).pre_tokenize_str(TEXT)
    assert [place for _, place in spelled] == [place for _, place in built_in]


def test_words_that_are_tokens_are_taken_whole_where_the_rule_says_so(
    tiny_model_dir, tmp_path, cache
):
    for pre, whole in (("llama-bpe", True), ("qwen2", False)):
        write_gguf(tiny_model_dir("llama"), tmp_path / f"{pre}.gguf", pre=pre)
        backend = load_tokenizer(tmp_path / f"{pre}.gguf").backend_tokenizer
        assert backend.model.ignore_merges is whole


def test_a_rule_that_nobody_knows_is_refused(tiny_model_dir, tmp_path, cache):
    write_gguf(tiny_model_dir("llama"), tmp_path / "tiny.gguf", pre="kimi-k2")
    with pytest.raises(LorafoldError, match=r"kimi-k2 \(tokenizer\.ggml\.pre\).* format, which"):
        resolve_model(tmp_path / "tiny.gguf")


def test_a_file_that_names_no_rule_is_told(tiny_model_dir, tmp_path, cache, caplog):
    write_gguf(tiny_model_dir("llama"), tmp_path / "tiny.gguf", pre=None)
    with caplog.at_level(logging.WARNING, "lorafold"):
        resolve_model(tmp_path / "tiny.gguf")
    assert "does not say by which rule its tokenizer splits text" in caplog.text


def llama3_factors(dims: int, theta: float) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3.1's scaling of 8."""
    old, low, high, factor = 8192, 1, 4, 8
    lengths = 2 * np.pi * theta ** (np.arange(dims) / dims)
    smooth = np.clip((old / lengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def test_the_scaling_of_positions_is_read(tiny_model_dir, tmp_path, cache):
    directory, theta = shutil.copytree(tiny_model_dir("llama"), tmp_path / "slow"), 500000.0
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = theta
    (directory / "config.json").write_text(json.dumps(config))
    factors = llama3_factors(4, theta)
    assert factors[0] == 1 < factors[2] < 8 == factors[3]
    write_gguf(directory, tmp_path / "tiny.gguf", besides={"rope_freqs.weight": factors})
    found = load_model(tmp_path / "tiny.gguf", torch.float32).model.rotary_emb.inv_freq
    plain = torch.tensor(theta ** -(np.arange(4) / 4))
    torch.testing.assert_close(found.double(), plain / torch.tensor(factors).double())
    factors[1] = 2
    write_gguf(directory, tmp_path / "odd.gguf", besides={"rope_freqs.weight": factors})
    with pytest.raises(LorafoldError, match=r"rope_freqs\.weight scales rotary positions in anoth"):
        resolve_model(tmp_path / "odd.gguf")


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("says", "rope"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 128.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
    ],
)
def test_a_scaling_in_the_metadata_is_read(says, rope, tiny_model_dir, tmp_path, cache):
    directory = shutil.copytree(tiny_model_dir("llama"), tmp_path / "scaled")
    keys = {f"llama.rope.scaling.{key}": given for key, given in says.items()}
    write_gguf(directory, tmp_path / "tiny.gguf", says=keys)
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"] |= rope
    (directory / "config.json").write_text(json.dumps(config))
    ids = torch.arange(3, 203)[None]
    with torch.no_grad():
        expected = load_model(directory, torch.float32)(ids).logits
        found = load_model(tmp_path / "tiny.gguf", torch.float32)(ids).logits
        plain = load_model(tiny_model_dir("llama"), torch.float32)(ids).logits
    torch.testing.assert_close(found, expected)
    assert (plain - expected).abs().max() > 1e-4  # ten times what is close


def test_a_scaling_that_is_not_known_is_refused(tiny_model_dir, tmp_path, cache):
    for says in ({"type": "longrope"}, {"type": "yarn", "factor": 4.0, "attn_factor": 1.19}):
        keys = {f"llama.rope.scaling.{key}": given for key, given in says.items()}
        write_gguf(tiny_model_dir("llama"), tmp_path / "tiny.gguf", says=keys)
        with pytest.raises(LorafoldError, match=r"rotary positions by (longrope|attn_factor) \(ll"):
            resolve_model(tmp_path / "tiny.gguf")
