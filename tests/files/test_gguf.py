"""GGUF files: every weight that transformers reads from them, in their precision, or a refusal that
names what is missing.
"""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Split
from transformers import AutoModelForCausalLM, GgufConfig

import lorafold as lf
from gguf_cases import write_gguf
from lorafold.errors import LorafoldError
from lorafold.identity import of_model
from lorafold.models.configuration import configuration
from lorafold.models.gguf_words import AS_GPT2, EACH_DIGIT, GPT2, RULES
from lorafold.models.loading import load_model, load_tokenizer
from lorafold.models.sources import resolve_model

LOST = "blk.1.ffn_up.weight"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORAFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def split(tiny_model_dir, tmp_path) -> list[Path]:
    """The files of a model that is split in several."""
    folder = tmp_path / "split"
    folder.mkdir()
    write_gguf(tiny_model_dir("llama"), folder / "tiny.gguf", per_file=8)
    return sorted(folder.glob("*.gguf"))


def by_transformers(file: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    dense = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=dense, dtype=dtype
    ).state_dict()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def test_a_split_model_is_read_whole_by_any_of_its_files(split, tiny_model_dir, tmp_path, cache):
    assert [file.name for file in split] == [f"tiny-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    write_gguf(tiny_model_dir("llama"), tmp_path / "whole.gguf")
    expected = by_transformers(tmp_path / "whole.gguf", torch.float32)
    sources = [resolve_model(given) for given in (*split, split[0].parent)]
    assert len({source.path for source in sources}) == 1
    assert len({of_model(source) for source in sources}) == 1
    model = load_model(sources[0], torch.float32)
    assert same(model.state_dict(), expected)
    assert not list(sources[0].path.glob("*.gguf"))
    text = "Book a table  for 4"
    assert load_tokenizer(sources[0])(text) == load_tokenizer(tmp_path / "whole.gguf")(text)
    # the output matrix, which says that the head is not tied, is in another file than the metadata
    shown = [configuration(str(given)).to_dict() for given in (*split, split[0].parent)]
    for one in shown:
        del one["_name_or_path"]
    assert all(one == shown[0] for one in shown)
    assert shown[0]["tie_word_embeddings"] is model.config.tie_word_embeddings is False


def test_every_file_of_a_split_model_is_part_of_what_it_is(split, cache):
    source = resolve_model(split[0])
    before = of_model(source)
    for file in split:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert of_model(source) != before
        file.write_bytes(content)
    assert of_model(source) == before


def test_a_file_of_a_split_model_that_is_not_there_is_named(split, cache):
    split[1].rename(split[1].with_name("elsewhere"))
    for given in (split[0], split[2], split[0].parent):
        for read in (resolve_model, lambda name: configuration(str(name))):
            with pytest.raises(LorafoldError, match=r"missing beside it: tiny-00002-of-00003"):
                read(given)
    alone = split[0].rename(split[0].with_name("model.gguf"))
    with pytest.raises(LorafoldError, match=r"says that it is file 1 of 3, expected file 1 of 1"):
        resolve_model(alone)
    split[2].rename(split[0])
    split[1].with_name("elsewhere").rename(split[1])
    split[1].with_name(split[2].name).write_bytes(alone.read_bytes())
    with pytest.raises(LorafoldError, match=r"says that it is file 3 of 3, expected file 1 of 3"):
        resolve_model(split[1])


def test_weights_that_a_file_lacks_are_named(tiny_model_dir, tmp_path, cache):
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_model_dir("llama"), file, without=[LOST])
    for _ in range(2):  # nothing of it is kept
        with pytest.raises(
            LorafoldError,
            match=rf"{file}: 1 weights are missing in its files: model\.layers\.1\.mlp\.up_proj",
        ):
            resolve_model(file)
    write_gguf(tiny_model_dir("llama"), file)
    whole = file.read_bytes()
    for size in (len(whole) - 100, len(whole) // 2, 200, 10, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(LorafoldError, match="expected a GGUF file, but it is none, or was cut"):
            resolve_model(file)


def test_a_folder_has_one_model(tiny_model_dir, tmp_path, cache):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.gguf", "mmproj-a.gguf"):
        write_gguf(tiny_model_dir("llama"), folder / name)
    assert resolve_model(folder).path == resolve_model(folder / "a.gguf").path
    (folder / "b.gguf").touch()
    with pytest.raises(LorafoldError, match=r"found 2 GGUF models .* one of them: a.gguf, b.gguf"):
        resolve_model(folder)


KEPT = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.float32
}  # fmt: skip


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", KEPT)
def test_a_copy_has_the_precision_of_its_file(kind, tiny_model_dir, tmp_path, cache):
    write_gguf(tiny_model_dir("llama"), tmp_path / "tiny.gguf", kind=kind)
    expected = by_transformers(tmp_path / "tiny.gguf", torch.float32)
    source = resolve_model(tmp_path / "tiny.gguf")
    assert same(load_model(source, torch.float32).state_dict(), expected)
    stored = load_file(source.path / "model.safetensors")
    assert {weight.dtype for weight in stored.values() if weight.dim() > 1} == {KEPT[kind]}
    # vectors are fp32 in all files; those of the tiny model are ones
    assert source.config()["dtype"] == str(KEPT[kind]).removeprefix("torch.")
    assert resolve_model(tmp_path / "tiny.gguf", fp32=True).path == source.path


def test_vectors_that_fp16_does_not_have_stay_fp32(tiny_model_dir, tmp_path, cache):
    directory, name = tiny_model_dir("llama"), "blk.0.attn_norm.weight"
    values = np.linspace(0.9, 1.1, 32, dtype=np.float32)
    write_gguf(directory, tmp_path / "tiny.gguf", kind="F16", besides={name: values})
    source = resolve_model(tmp_path / "tiny.gguf")
    stored = load_file(source.path / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    assert torch.equal(stored, torch.from_numpy(values))


def test_fewer_bits_are_bf16_unless_fp32_is_asked_for(tiny_model_dir, tmp_path, cache):
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_model_dir("llama"), file, kind="Q4_1")
    exact, rounded = (by_transformers(file, dtype) for dtype in (torch.float32, torch.bfloat16))
    asked = lf.load_model(file, storage="fp32")
    assert same(asked.state_dict(), exact)
    for storage in ("auto", "bf16"):
        found = lf.load_model(file, storage=storage).state_dict()
        assert same({name: weight.bfloat16() for name, weight in found.items()}, rounded)
    fp32, bf16 = (resolve_model(file, fp32=fp32) for fp32 in (True, False))
    assert of_model(fp32) != of_model(bf16)
    assert {w.dtype for w in load_file(bf16.path / "model.safetensors").values()} == {
        torch.bfloat16
    }


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


def test_tensors_that_nobody_reads_are_told_or_refused(tiny_model_dir, tmp_path, cache, caplog):
    """Those of the model's own blocks change what it computes; others are of other models."""
    beside = {f"blk.{n}.odd.weight": np.ones(3, np.float32) for n in range(2, 11)}
    write_gguf(tiny_model_dir("llama"), tmp_path / "tiny.gguf", besides=beside)
    with caplog.at_level(logging.WARNING, "lorafold"):
        resolve_model(tmp_path / "tiny.gguf")
    assert "9 tensors of its files are not read" in caplog.text
    assert "blk.9.odd.weight and 1 more" in caplog.text
    inside = {"blk.1.attn_q.bias": np.ones(32, np.float32)}
    write_gguf(tiny_model_dir("llama"), tmp_path / "tiny.gguf", besides=inside)
    with pytest.raises(LorafoldError, match=r"no place for 1 tensors .*: blk\.1\.attn_q\.bias"):
        resolve_model(tmp_path / "tiny.gguf")
