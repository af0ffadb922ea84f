"""GGUF files are read as transformers reads them, in their precision, or refused."""

import errno
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Split
from transformers import AutoModelForCausalLM, GgufConfig, Qwen3MoeConfig

import lorafold as lf
from adapter_files import configure, json_of, tensors_of
from error_cases import refusal
from gguf_cases import write_gguf
from lorafold.errors import LorafoldError
from lorafold.identity import of_model
from lorafold.models.gguf_tokenizers import AS_GPT2, EACH_DIGIT, GPT2, RULES
from lorafold.models.loading import load_model
from lorafold.models.sources import read_configuration, resolve_model
from lorafold.models.tokenizer import load_tokenizer

LOST = "blk.1.ffn_up.weight"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORAFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tiny_model_dir, tmp_path, cache):
    """Write the tiny Llama as a file."""

    def write(name: str = "tiny.gguf", directory: Path | None = None, **how) -> Path:
        write_gguf(directory or tiny_model_dir("llama"), tmp_path / name, **how)
        return tmp_path / name

    return write


@pytest.fixture
def split(tiny_model_dir, tmp_path, cache) -> list[Path]:
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


def test_a_split_model_is_read_whole_by_any_of_its_files(split, tiny):
    assert [file.name for file in split] == [f"tiny-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    whole = tiny("whole.gguf")
    expected = by_transformers(whole, torch.float32)
    sources = [resolve_model(given) for given in (*split, split[0].parent)]
    assert len({source.path for source in sources}) == 1
    assert len({of_model(source) for source in sources}) == 1
    model = load_model(sources[0], torch.float32)
    assert same(model.state_dict(), expected)
    assert not list(sources[0].path.glob("*.gguf"))
    text = "Book a table  for 4"
    assert load_tokenizer(sources[0])(text) == load_tokenizer(whole)(text)
    # the output matrix, which says that the head is not tied, is in another file than the metadata
    shown = [read_configuration(str(given)).to_dict() for given in (*split, split[0].parent)]
    for one in shown:
        del one["_name_or_path"]
    assert all(one == shown[0] for one in shown)
    assert shown[0]["tie_word_embeddings"] is model.config.tie_word_embeddings is False


def test_every_file_of_a_split_model_is_part_of_what_it_is(split):
    source = resolve_model(split[0])
    before = of_model(source)
    for file in split:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert of_model(source) != before
        file.write_bytes(content)
    assert of_model(source) == before


def test_a_file_of_a_split_model_that_is_not_there_is_named(split):
    split[1].rename(split[1].with_name("elsewhere"))
    for given in (split[0], split[2], split[0].parent):
        for read in (resolve_model, lambda name: read_configuration(str(name))):
            with pytest.raises(LorafoldError, match=r"missing: tiny-00002-of-00003"):
                read(given)
    alone = split[0].rename(split[0].with_name("model.gguf"))
    with pytest.raises(LorafoldError, match=r"describes file 1 of 3, expected file 1 of 1"):
        resolve_model(alone)
    split[2].rename(split[0])
    split[1].with_name("elsewhere").rename(split[1])
    split[1].with_name(split[2].name).write_bytes(alone.read_bytes())
    with pytest.raises(LorafoldError, match=r"describes file 3 of 3, expected file 1 of 3"):
        resolve_model(split[1])


def test_weights_that_a_file_lacks_are_named(tiny):
    file = tiny(without=[LOST])
    lost = f"{file}: weights missing in the files (1): model.layers.1.mlp.up_proj"
    for _ in range(2):  # nothing of it is kept
        assert lost in refusal(resolve_model, file)
    whole = tiny().read_bytes()
    for size in (len(whole) - 100, len(whole) // 2, 200, 10, 0):
        file.write_bytes(whole[:size])
        assert "can't be read as GGUF (another format, truncated" in refusal(resolve_model, file)


def test_a_header_that_its_bytes_do_not_agree_with_is_refused(tiny):
    file = tiny()
    whole, name = file.read_bytes(), b"blk.0.ffn_down.weight"
    dims = whole.index(name) + len(name) + 4
    kind, place = dims + 16, dims + 20  # of a matrix
    tensors = int.from_bytes(whole[8:16], "little")
    lies = {
        8: ((tensors - 1).to_bytes(8, "little"), f".* after the last of its {tensors - 1}"),
        kind: ((1).to_bytes(4, "little"), ".* the end of the previous tensor"),  # F16
        place: ((0).to_bytes(8, "little"), "blk.0.ffn_down.weight at byte 0 of"),
    }
    for at, (value, said) in lies.items():
        file.write_bytes(whole[:at] + value + whole[at + len(value) :])
        with pytest.raises(LorafoldError, match=rf"{file}: the header is damaged: found {said}"):
            resolve_model(file)


def test_a_copy_for_which_the_disk_has_no_room(tiny, cache, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(LorafoldError, match=rf"^{cache}/\S+ was not written: No space left"):
        resolve_model(tiny())


def test_a_folder_has_one_model(tiny, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.gguf", "mmproj-a.gguf"):
        tiny(f"folder/{name}")
    assert resolve_model(folder).path == resolve_model(folder / "a.gguf").path
    (folder / "b.gguf").touch()
    with pytest.raises(LorafoldError, match=r"found 2 GGUF models; .* one of them: a.gguf, b.gguf"):
        resolve_model(folder)


KEPT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.float32}


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", KEPT)
def test_a_copy_has_the_precision_of_its_file(kind, tiny):
    file = tiny(kind=kind)
    expected, source = by_transformers(file, torch.float32), resolve_model(file)
    assert same(load_model(source, torch.float32).state_dict(), expected)
    stored = tensors_of(source.path)
    assert {weight.dtype for weight in stored.values() if weight.dim() > 1} == {KEPT[kind]}
    # vectors are fp32 in all files; those of the tiny model are ones
    assert source.config()["dtype"] == str(KEPT[kind]).removeprefix("torch.")
    assert resolve_model(file, fp32=True).path == source.path


def test_vectors_that_fp16_does_not_have_stay_fp32(tiny):
    values = np.linspace(0.9, 1.1, 32, dtype=np.float32)
    source = resolve_model(tiny(kind="F16", besides={"blk.0.attn_norm.weight": values}))
    stored = tensors_of(source.path)["model.layers.0.input_layernorm.weight"]
    assert torch.equal(stored, torch.from_numpy(values))


def test_fewer_bits_are_bf16_unless_fp32_is_asked_for(tiny):
    file = tiny(kind="Q4_1")
    exact, rounded = (by_transformers(file, dtype) for dtype in (torch.float32, torch.bfloat16))
    asked = lf.load_model(file, storage="fp32")
    assert same(asked.state_dict(), exact)
    for storage in ("auto", "bf16"):
        found = lf.load_model(file, storage=storage).state_dict()
        assert same({name: weight.bfloat16() for name, weight in found.items()}, rounded)
    fp32, bf16 = (resolve_model(file, fp32=fp32) for fp32 in (True, False))
    assert of_model(fp32) != of_model(bf16)
    assert {w.dtype for w in tensors_of(bf16.path).values()} == {torch.bfloat16}


@pytest.mark.parametrize("trained", ["fp32", "bf16"])
def test_an_adapter_is_merged_into_the_copy_that_it_was_trained_on(trained, tiny, tmp_path):
    file = tiny(kind="Q4_1")
    adapter = lf.attach(lf.load_model(file, storage=trained), lf.LoRA(rank=2), ["q_proj"])
    adapter.save(tmp_path / "a")
    lf.merge(file, tmp_path / "a", tmp_path / "out")
    own = by_transformers(file, {"fp32": torch.float32, "bf16": torch.bfloat16}[trained])
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(tensors_of(tmp_path / "out")[name].float(), own[name].float())


def test_tensors_that_nobody_reads_are_told_or_refused(tiny, caplog):
    """Those of the model's own blocks change what it computes; others are of other models."""
    beside = {f"blk.{n}.odd.weight": np.ones(3, np.float32) for n in range(2, 11)}
    with caplog.at_level(logging.WARNING, "lorafold"):
        resolve_model(tiny(besides=beside))
    assert "ignoring tensors in the files (9)" in caplog.text
    assert "blk.6.odd.weight and 4 more" in caplog.text
    inside = {"blk.1.attn_q.bias": np.ones(32, np.float32)}
    with pytest.raises(LorafoldError, match=r"no weights for tensors .*\(blk\.1\.attn_q\.bias"):
        resolve_model(tiny(besides=inside))


def test_half_of_the_experts_is_named_if_it_is_missing(tiny):
    """transformers reads zeros for it."""
    gate = {"blk.0.ffn_gate_exps.weight": np.ones((2, 3, 32), np.float32)}
    with pytest.raises(LorafoldError, match=r"weights missing in .*blk\.0\.ffn_up_exps\.weigh"):
        resolve_model(tiny(besides=gate))


@pytest.mark.slow
def test_experts_are_read_whole(tiny, tiny_model_dir, tmp_path, caplog):
    directory = shutil.copytree(tiny_model_dir("llama"), tmp_path / "experts")
    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, vocab_size=300,
        max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    file = tiny(directory=directory, pre="qwen2")
    with caplog.at_level(logging.WARNING, "lorafold"):
        found = load_model(file, torch.float32)
    assert same(found.state_dict(), model.state_dict())
    assert found.config.tie_word_embeddings
    assert caplog.text == ""
    for lost in ("gate", "up", "down"):
        tiny(directory=directory, pre="qwen2", without=[f"blk.1.ffn_{lost}_exps.weight"])
        assert "weights missing in the files (1)" in refusal(resolve_model, file)


@pytest.fixture
def on_hub(tmp_path, monkeypatch, cache) -> Path:
    """The snapshot of a repository of the hub, owner/name, that is on this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    own, commit = tmp_path / "hub" / "models--owner--name", "a" * 40
    (own / "refs").mkdir(parents=True)
    (own / "refs" / "main").write_text(commit)
    (own / "snapshots" / commit / "Q8_0").mkdir(parents=True)
    return own / "snapshots" / commit


@pytest.mark.parametrize("per_file", [0, 8])
def test_the_only_gguf_model_of_a_repository_is_read(per_file: int, on_hub, tiny_model_dir):
    (on_hub / "mmproj-tiny.gguf").write_bytes(b"of a tower")
    write_gguf(tiny_model_dir("llama"), on_hub / "Q8_0" / "tiny.gguf", per_file=per_file)
    found = resolve_model("owner/name")
    first = min((on_hub / "Q8_0").glob("*.gguf"))
    assert found.name == "owner/name"
    assert found.path == resolve_model(first).path
    shown = [read_configuration(name).to_dict() for name in ("owner/name", str(first))]
    assert [one.pop("_name_or_path") is not None for one in shown] == [True, True]
    assert shown[0] == shown[1]


def test_the_gguf_models_of_a_repository_are_named(on_hub, tiny_model_dir):
    for name in ("a.gguf", "Q8_0/b.gguf"):
        write_gguf(tiny_model_dir("llama"), on_hub / name)
    for read in (resolve_model, read_configuration):
        assert refusal(read, "owner/name") == (
            "model owner/name: found 2 GGUF models in the repository; pass the path of one"
            " as --model (hf download owner/name FILE prints the path): Q8_0/b.gguf, a.gguf"
        )
    (on_hub / "a.gguf").unlink()
    (on_hub / "Q8_0" / "b.gguf").unlink()
    with pytest.raises(LorafoldError, match="model owner/name: found no config"):
        resolve_model("owner/name")


# how text is split and positions are scaled, by the rule that the file names


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
def test_text_is_split_by_the_rule_that_a_file_names(pre, expected, tiny):
    tokenizer = load_tokenizer(tiny(pre=pre))
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


def test_words_that_are_tokens_are_taken_whole_where_the_rule_says_so(tiny):
    for pre, whole in (("llama-bpe", True), ("qwen2", False)):
        backend = load_tokenizer(tiny(f"{pre}.gguf", pre=pre)).backend_tokenizer
        assert backend.model.ignore_merges is whole


def test_a_rule_that_nobody_knows_is_refused_and_none_is_told(tiny, caplog):
    with pytest.raises(LorafoldError, match=r"kimi-k2 \(tokenizer\.ggml\.pre\).* format, which"):
        resolve_model(tiny(pre="kimi-k2"))
    with caplog.at_level(logging.WARNING, "lorafold"):
        resolve_model(tiny(pre=None))
    assert "found no pre-tokenizer" in caplog.text


def llama3_factors(dims: int, theta: float) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3.1's scaling of 8."""
    old, low, high, factor = 8192, 1, 4, 8
    lengths = 2 * np.pi * theta ** (np.arange(dims) / dims)
    smooth = np.clip((old / lengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def rotated(path: Path, **how) -> Path:
    """The directory of a model with other settings of rotary positions."""
    given = json_of(path, "config.json")["rope_parameters"]
    configure(path, "config.json", rope_parameters=given | how)
    return path


def test_the_scaling_of_positions_is_read(tiny, tiny_model_dir, tmp_path):
    theta = 500000.0
    directory = rotated(shutil.copytree(tiny_model_dir("llama"), tmp_path / "a"), rope_theta=theta)
    factors = llama3_factors(4, theta)
    assert factors[0] == 1 < factors[2] < 8 == factors[3]
    file = tiny("tiny.gguf", directory, besides={"rope_freqs.weight": factors})
    found = load_model(file, torch.float32).model.rotary_emb.inv_freq
    plain = torch.tensor(theta ** -(np.arange(4) / 4))
    torch.testing.assert_close(found.double(), plain / torch.tensor(factors).double())
    factors[1] = 2
    odd = tiny("odd.gguf", directory, besides={"rope_freqs.weight": factors})
    assert "rope_freqs.weight scales RoPE differently" in refusal(resolve_model, odd)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("says", "rope"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"type": "yarn", "factor": 4.0, "original_context_length": 128.0},
         {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
    ],
)  # fmt: skip
def test_a_scaling_in_the_metadata_is_read(says, rope, tiny, tiny_model_dir, tmp_path):
    file = tiny(says={f"llama.rope.scaling.{key}": given for key, given in says.items()})
    directory = rotated(shutil.copytree(tiny_model_dir("llama"), tmp_path / "scaled"), **rope)
    ids = torch.arange(3, 203)[None]
    with torch.no_grad():
        expected = load_model(directory, torch.float32)(ids).logits
        found = load_model(file, torch.float32)(ids).logits
        plain = load_model(tiny_model_dir("llama"), torch.float32)(ids).logits
    torch.testing.assert_close(found, expected)
    assert (plain - expected).abs().max() > 1e-4  # ten times what is close


def test_a_scaling_that_is_not_known_is_refused(tiny):
    for says in ({"type": "longrope"}, {"type": "yarn", "factor": 4.0, "attn_factor": 1.19}):
        keys = {f"llama.rope.scaling.{key}": given for key, given in says.items()}
        with pytest.raises(LorafoldError, match=r"RoPE scaling (longrope|attn_factor) \(ll"):
            resolve_model(tiny(says=keys))
