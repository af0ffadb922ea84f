"""Tiny models of the families that llama.cpp's files can say, in Hugging Face's format, and a
tokenizer as SentencePiece learns it.

    directory = saved("gemma2", folder)      config, fp32 weights that all matter, tokenizer
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import lorafold as lf
from conftest import CHAT_TEMPLATE, CORPUS, make_tokenizer

COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
HEADS = COMMON | {"head_dim": 16}
WINDOW = HEADS | {"sliding_window": 32}
EXPERTS = {"num_experts_per_tok": 2}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

Made = Callable[..., Any]
CONFIGS: dict[str, Made] = {
    "llama": lambda **t: tf.LlamaConfig(**HEADS, **t),
    "llama-tied": lambda **t: tf.LlamaConfig(**HEADS, tie_word_embeddings=True, **t),
    "llama-llama3": lambda **t: tf.LlamaConfig(**HEADS, rope_parameters=LLAMA3, **t),
    "llama-yarn": lambda **t: tf.LlamaConfig(**HEADS, rope_parameters=YARN, **t),
    "llama-linear": lambda **t: tf.LlamaConfig(**HEADS, rope_parameters=LINEAR, **t),
    "mistral": lambda **t: tf.MistralConfig(**HEADS, sliding_window=None, **t),
    "mixtral": lambda **t: tf.MixtralConfig(**HEADS, **EXPERTS, num_local_experts=4, **t),
    "qwen2": lambda **t: tf.Qwen2Config(**COMMON, **t),
    "qwen3": lambda **t: tf.Qwen3Config(**COMMON, head_dim=128, **t),
    "qwen3_moe": lambda **t: tf.Qwen3MoeConfig(
        **HEADS, **EXPERTS, num_experts=4, moe_intermediate_size=32, norm_topk_prob=True, **t
    ),
    "gemma": lambda **t: tf.GemmaConfig(**HEADS, hidden_act="gelu_pytorch_tanh", **t),
    "gemma2": lambda **t: tf.Gemma2Config(**WINDOW, query_pre_attn_scalar=16, **t),
    "gemma3": lambda **t: tf.Gemma3TextConfig(
        **WINDOW | {"num_hidden_layers": 7}, query_pre_attn_scalar=16, **t
    ),
    "phi3": lambda **t: tf.Phi3Config(**COMMON, **t),
}
UNREAD = ("mixtral", "qwen3_moe", "gemma")  # transformers has other sizes or names for these
LEARNED = ("mistral", "gemma", "gemma2", "gemma3", "phi3")  # with SentencePiece


def saved(kind: str, folder: Path, **sizes: int) -> Path:
    """The directory of a tiny model, with weights so large that every part matters."""
    tokenizer = learned(kind.startswith("gemma")) if kind in LEARNED else make_tokenizer()
    own: Any = tokenizer
    tokens = {
        "vocab_size": len(tokenizer) + 20, "eos_token_id": own.eos_token_id,
        "bos_token_id": own.bos_token_id, "pad_token_id": own.pad_token_id,
    }  # fmt: skip
    config = CONFIGS[kind](**tokens)
    config = type(config).from_dict({**config.to_dict(), **sizes})
    torch.manual_seed(0)
    model: Any = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = 0.0 if "gemma" in kind else 1.0
            p.normal_(std=0.2).add_(gain) if name.endswith("norm.weight") else p.normal_(std=0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def moved(
    base: Path, out: Path, spec: Any = None, storage: str = "fp32", size: float = 0.1, **beside: Any
) -> Path:
    """The directory of an adapter whose update is not small, with the size given here."""
    model = lf.load_model(base, storage=storage, device="cpu")
    adapter = lf.attach(model, spec or lf.LoRA(rank=4, alpha=8, dropout=0.0), **beside)
    torch.manual_seed(0)
    for p in adapter.parameters():
        p.data += size * torch.randn_like(p)
    return adapter.save(out)


def quietly(done: int, total: int) -> None:
    """No progress is shown."""


def learned(as_gemma: bool) -> Any:
    """A tokenizer of merges that SentencePiece would have, with bytes for unknown characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers.tokenization_utils_base import generate_merges

    space = normalizers.Replace(" ", "▁")
    normalizer = space if as_gemma else normalizers.Sequence([normalizers.Prepend("▁"), space])
    first = Tokenizer(models.BPE())
    first.normalizer = normalizer
    first.train_from_iterator(
        [word for line in CORPUS for word in line.replace(" ", " ▁").split("▁")],
        trainers.BpeTrainer(vocab_size=300, show_progress=False),
    )
    known = sorted(first.get_vocab(), key=first.get_vocab().get)  # type: ignore[arg-type]
    merged = [token for token in known if len(token) > 1]
    letters = [token for token in known if len(token) == 1]
    texts = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    texts += [f"<0x{n:02X}>" for n in range(256)] + merged + letters
    vocabulary = {text: n for n, text in enumerate(texts)}
    ranks = {text: -n for n, text in enumerate(texts)}
    kept = {text: vocabulary[text] for text in merged + letters}
    merges = generate_merges(kept, {text: ranks[text] for text in kept})
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="<|im_end|>",
        pad_token="</s>", additional_special_tokens=["<|im_start|>"],
        chat_template="{{ bos_token }}" + CHAT_TEMPLATE,
    )  # fmt: skip
    return made
