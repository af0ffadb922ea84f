"""The metadata of a GGUF file: configuration, rotary positions and tokenizer.

    hidden_size -> ARCH.embedding_length, num_experts -> ARCH.expert_count, ...
    llama3, longrope    tensors rope_freqs.weight and rope_factors_{long,short}.weight (dims / 2,)
    gpt2      byte-level BPE: tokens, merges, and the name of the pre-tokenizer rule, chosen from
              `models.gguf_tokenizers` because it splits all `PROBE_TEXTS` in the same way
    llama     BPE with byte fallback: tokens with scores; the score decreases with the rank of the
              first merge that creates the token

`ARCHITECTURES` has the name of each architecture in llama.cpp and the configuration values that
llama.cpp assumes; models with other values are rejected. Embedding rows without a token get a
padding token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer as Backend
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lorafold.errors import LorafoldError, listed
from lorafold.exporting.target import window_notes
from lorafold.models.gguf_rope import FREQUENCIES, YARN
from lorafold.models.gguf_tokenizers import WHOLE_WORDS, pre_tokenizer_names, pre_tokenizer_of

TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    activation: The activation of the gated MLP.
    interleaved: Whether the rows of queries and keys are interleaved.
    norm_offset: Added to the weights of norms in the GGUF file.
    assumed: Configuration fields with the values that llama.cpp assumes.
    window_period: Every window_period-th layer attends to all positions; 0 if all layers do.
    by_width: Numbers of layers for which attention is scaled by hidden_size / heads, not head_dim.
    """

    name: str
    activation: str = "silu"
    interleaved: bool = False
    norm_offset: float = 0.0
    assumed: Mapping[str, Any] = field(default_factory=dict)
    window_period: int = 0
    by_width: Sequence[int] = ()


ARCHITECTURES = {name: Architecture(**row) for name, row in TABLES["architectures"].items()}


def architecture_of(config: Any) -> Architecture:
    arch = ARCHITECTURES.get(config.model_type)
    if arch is None:
        raise LorafoldError(
            f"found a model of type {config.model_type}, expected one of"
            f" {', '.join(ARCHITECTURES)}; for other types, run lorafold merge and convert its"
            " output with llama.cpp's convert_hf_to_gguf.py"
        )
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    wrong = [
        f"{name} = {actual!r} of {config.model_type}, and assumes {value!r}"
        for name, value in arch.assumed.items()
        if (actual := getattr(config, name, value)) != value
    ]
    if activation != arch.activation:
        wrong.append(f"the activation {activation} of this model, and assumes {arch.activation}")
    scale = getattr(config, "query_pre_attn_scalar", None)
    square = config.num_hidden_layers in arch.by_width
    width = config.hidden_size // config.num_attention_heads if square else head_dim(config)
    if scale not in (None, width):
        wrong.append(f"query_pre_attn_scalar = {scale}, and assumes {width}")
    if wrong:
        raise LorafoldError(f"llama.cpp can't represent {wrong[0]}")
    return arch


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_metadata(writer: GGUFWriter, config: Any, arch: Architecture) -> Sequence[str]:
    """Writes the configuration, except positions; returns notes on differences in llama.cpp."""
    for table, add in (("integers", writer.add_uint32), ("floats", writer.add_float32)):
        values = {}  # by key, because two fields may have the same key
        for name, key in TABLES[table].items():
            value = getattr(config, name, None)
            if value is not None and not (name == "sliding_window" and not arch.window_period):
                values[key] = value
        for key, value in values.items():
            add(f"{arch.name}.{key}", value)
    for key in ("attention.key_length", "attention.value_length"):
        writer.add_uint32(f"{arch.name}.{key}", head_dim(config))
    if arch.window_period:
        layers = config.num_hidden_layers
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
        windowed = [kind == "sliding_attention" for kind in kinds]
        if windowed != [(n + 1) % arch.window_period != 0 for n in range(layers)]:
            writer.add_array(f"{arch.name}.attention.sliding_window_pattern", windowed)
    return () if arch.window_period else window_notes("llama.cpp", config)


def add_positions(writer: GGUFWriter, config: Any, arch: Architecture) -> dict[str, Tensor]:
    """Writes the rotary positions; returns additional tensors (rotated / 2,) by name."""
    rope = config.rope_parameters
    windowed = {}  # of layers with a sliding window
    if "full_attention" in rope:
        rope, windowed = rope["full_attention"], rope.get("sliding_attention", {})
    kind, prefix = rope.get("rope_type", "default"), f"{arch.name}.rope."
    if kind not in ROPE_TYPES or windowed.get("rope_type", "default") != "default":
        raise LorafoldError(
            f"rope_type: found {kind}, expected one of {', '.join(ROPE_TYPES)}, and default in"
            " layers with a sliding window"
        )
    width = int(head_dim(config) * rope.get("partial_rotary_factor", 1.0))
    writer.add_uint32(f"{prefix}dimension_count", width)
    writer.add_float32(f"{prefix}freq_base", rope["rope_theta"])
    if windowed:
        writer.add_float32(f"{prefix}freq_base_swa", windowed["rope_theta"])
    if kind == "llama3":
        exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        return {FREQUENCIES: rope["rope_theta"] ** -exponents / scaled}
    if kind == "longrope":
        return _add_longrope(writer, config, rope, prefix)
    if kind in ("linear", "yarn"):
        writer.add_string(f"{prefix}scaling.type", kind)
        writer.add_float32(f"{prefix}scaling.factor", rope["factor"])
    if kind == "yarn":
        _check_yarn(rope)
        for key, name in YARN.items():
            if rope.get(name) is not None:
                whole = name == "original_max_position_embeddings"
                (writer.add_uint32 if whole else writer.add_float32)(prefix + key, rope[name])
    return {}


def _check_yarn(rope: Mapping[str, Any]) -> None:
    """Rejects attention scales other than YaRN's, because llama.cpp reads no other from files."""
    scale, factor = rope.get("attention_factor"), rope["factor"]
    default = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    if rope.get("mscale") or not (scale is None or math.isclose(scale, default, rel_tol=1e-4)):
        raise LorafoldError(
            "the model's YaRN positions scale attention by"
            f" {scale or rope.get('mscale')}, expected YaRN's default {default:.4g}, because"
            " llama.cpp reads no other value from a file"
        )


def _add_longrope(
    writer: GGUFWriter, config: Any, rope: Mapping[str, Any], prefix: str
) -> dict[str, Tensor]:
    first = rope["original_max_position_embeddings"]
    scale = config.max_position_embeddings / first
    default = math.sqrt(1 + math.log(scale) / math.log(first)) if scale > 1 else 1.0
    writer.add_uint32(f"{prefix}scaling.original_context_length", first)
    writer.add_float32(f"{prefix}scaling.attn_factor", rope.get("attention_factor") or default)
    return {
        f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"])
        for length in ("long", "short")
    }


SPACE = "▁"
PROBE_TEXTS: list[str] = TABLES["probes"]


def pre_tokenizer_name(backend: Backend, whole_words: bool) -> str:
    splitter, before = backend.pre_tokenizer, backend.normalizer
    # Qwen's normalizer (NFC) only composes marks with their letters
    if splitter is not None and (before is None or type(before).__name__ == "NFC"):
        for name in pre_tokenizer_names():
            rule = pre_tokenizer_of(name)
            if rule is None or (name in WHOLE_WORDS) != whole_words:
                continue
            if all(_split_text(rule, text) == _split_text(splitter, text) for text in PROBE_TEXTS):
                return name
    kind = type(splitter).__name__ + " with ignore_merges" * whole_words
    raise LorafoldError(
        f"the model's pre-tokenizer ({kind}) matches no known one of llama.cpp; expected the"
        " pre-tokenizer of GPT-2, SmolLM2, Llama 3, Qwen 2, Tekken, GPT-4o or another supported"
        " model"
    )


def _split_text(rule: object, text: str) -> list[str]:
    return [piece for piece, _ in rule.pre_tokenize_str(text)]  # type: ignore[attr-defined]


def check_normalizer(backend: Backend) -> None:
    before = SPACE * adds_space_prefix(backend)
    for text in PROBE_TEXTS:
        marked = _normalize(backend, text)
        if marked not in (before + text.replace(" ", SPACE), text.replace(" ", SPACE)):
            raise LorafoldError(
                "the model's tokenizer normalizes text in a way that llama.cpp does not"
                f" support: {text[:24]!r} becomes {marked[:24]!r}"
            )


def adds_space_prefix(backend: Backend) -> bool:
    return _normalize(backend, "a").startswith(SPACE)


def _normalize(backend: Backend, text: str) -> str:
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is not None:
        text = "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    return text


def add_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int, ends: Sequence[int]
) -> None:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    slow = {"model": {"type": type(tokenizer).__name__}}
    content: dict[str, Any] = slow if backend is None else json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise LorafoldError(
            f"the model's tokenizer is of type {model['type']}, expected byte-level BPE or BPE"
            " with byte fallback"
        )
    if len(tokenizer) > rows:
        raise LorafoldError(
            f"the tokenizer has {len(tokenizer):,} tokens, but the model's embedding has only"
            f" {rows:,} rows"
        )
    added = {token["id"]: token for token in content["added_tokens"]}
    byte_fallback = bool(model.get("byte_fallback"))
    writer.add_tokenizer_model("llama" if byte_fallback else "gpt2")
    texts, kinds = _token_texts(model["vocab"], added, rows, byte_fallback, model.get("unk_token"))
    merges = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"]]
    if byte_fallback:
        _check_byte_tokens(model["vocab"])
        check_normalizer(backend)
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(adds_space_prefix(backend))
        scores = [-1e6] * rows  # earlier merges have higher scores
        for rank, text in enumerate(dict.fromkeys("".join(pair) for pair in merges)):
            scores[model["vocab"][text]] = float(-rank - 1)
        writer.add_token_scores(scores)
    else:
        writer.add_tokenizer_pre(pre_tokenizer_name(backend, bool(model.get("ignore_merges"))))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    _add_special(writer, tokenizer, ends)


def _check_byte_tokens(vocabulary: Collection[str]) -> None:
    """Checks that every byte has a token, because llama.cpp looks them up without a check."""
    if missing := [word for n in range(256) if (word := f"<0x{n:02X}>") not in vocabulary]:
        raise LorafoldError(
            f"the tokenizer has no token for {listed(missing)}, but llama.cpp requires one for each"
            " of the 256 bytes"
        )


def _token_texts(
    vocabulary: dict[str, int],
    added: dict[int, dict[str, Any]],
    rows: int,
    byte_fallback: bool,
    unknown: str | None,
) -> tuple[list[str], list[int]]:
    texts = [f"[PAD{n}]" for n in range(rows)]
    kinds = [int(TokenType.UNUSED)] * rows
    for text, n in vocabulary.items():
        is_byte = byte_fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        kind = TokenType.BYTE if is_byte else TokenType.NORMAL
        texts[n], kinds[n] = text, TokenType.UNKNOWN if byte_fallback and text == unknown else kind
    for n, token in added.items():
        text = token["content"]
        if kinds[n] == TokenType.UNKNOWN:
            continue
        if token["special"]:
            texts[n], kinds[n] = text, TokenType.CONTROL
        else:
            texts[n] = text.replace("▁", " ") if byte_fallback else text
            kinds[n] = TokenType.USER_DEFINED
    return texts, [int(kind) for kind in kinds]


def _add_special(writer: GGUFWriter, tokenizer: Any, ends: Sequence[int]) -> None:
    own = tokenizer.eos_token_id
    eos = next(iter(ends), None) if own is None else own
    if eos is None:
        raise LorafoldError("the tokenizer and the configuration define no end-of-sequence token")
    bos = tokenizer.bos_token_id
    # llama.cpp uses token 11 if a file has none
    writer.add_bos_token_id(eos if bos is None else bos)
    writer.add_eos_token_id(eos)
    for name, token in zip(("eot", "eom"), [id for id in ends if id != eos], strict=False):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bos is not None and ids[0] == bos)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == own)
    templates = tokenizer.chat_template
    if template := templates.get("default") if isinstance(templates, dict) else templates:
        writer.add_chat_template(template)
