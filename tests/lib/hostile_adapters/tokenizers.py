"""Tokenizers: their vocabulary, their configuration, and what they do to a text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_adapters.case import HELLO, MANY, cases, either, own, wrong

NESTED = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
SPLIT = {
    "type": "Split", "pattern": {"Regex": "((a+)+)+$|(x+x+)+y"}, "behavior": "Isolated",
    "invert": False,
}  # fmt: skip
LONGER = {"type": "Replace", "pattern": {"Regex": "."}, "content": "aaaaaaaaaa"}


def changed(at: Path, base: Path, change: Callable[[dict[str, Any]], Any], **config: Any) -> None:
    """Give the adapter the base's tokenizer with another content."""
    content = own(at, base, **config)
    change(content)
    (at / "tokenizer.json").write_text(json.dumps(content))


def nested(at: Path, base: Path, name: str) -> None:
    own(at, base)
    (at / name).write_text(NESTED)


def templates(at: Path, base: Path, template: Any) -> None:
    """Give the adapter a chat template that is none."""
    own(at, base, chat_template=template)
    (at / "chat_template.jinja").unlink()


def words(at: Path, base: Path, n: int, size: int = 0) -> None:
    """A tokenizer with n tokens more, of so many letters each."""

    def more(content: dict[str, Any]) -> None:
        content["added_tokens"] += [
            content["added_tokens"][0]
            | {"id": 300 + i, "content": f"<w{i}>" + "x" * size, "special": i % 2 == 0}
            for i in range(n)
        ]

    changed(at, base, more)


def exchanged(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


cases("tokenizer", {
    "deep": (
        "A tokenizer.json nested 100,000 deep.",
        lambda at, base: nested(at, base, "tokenizer.json"),
    ),
    "config-deep": (
        "The same for its configuration.",
        lambda at, base: nested(at, base, "tokenizer_config.json"),
    ),
    "million-words": ("A million added tokens.", lambda at, base: words(at, base, MANY)),
    "vocabulary": (
        "A vocabulary of a million.",
        lambda at, base: changed(at, base, lambda content: content["model"]["vocab"].update(
            {f"v{i}": 300 + i for i in range(MANY)}
        )),
    ),
    "numbers": (
        "A token with a number of billions.",
        lambda at, base: changed(
            at, base, lambda content: content["model"]["vocab"].update(zzz=2**32 - 1)
        ),
    ),
    "renumbered": (
        "Two tokens of the base that change places.",
        lambda at, base: changed(at, base, exchanged),
    ),
    "large-config": (
        "A configuration of 200 MB.", lambda at, base: own(at, base, x="y" * (200 << 20))
    ),
})  # fmt: skip
cases("tokenizer", {
    "split": (
        "A split by an expression that takes exponential time.",
        lambda at, base: changed(at, base, lambda content: content.update(pre_tokenizer={
            "type": "Sequence", "pretokenizers": [SPLIT, content["pre_tokenizer"]],
        })),
    ),
    "decoder": (
        "A decoder that replaces every letter by thousands.",
        lambda at, base: changed(
            at, base, lambda content: content.update(decoder=LONGER | {"content": "y" * 10_000})
        ),
    ),
    "normalizer": (
        "Normalizers that make a text of one letter one of a billion.",
        lambda at, base: changed(at, base, lambda content: content.update(normalizer={
            "type": "Sequence", "normalizers": [LONGER] * 9,
        })),
    ),
    "many-words": (
        "Thirty thousand added tokens, each of which a server would add to its own.",
        lambda at, base: words(at, base, 30_000),
    ),
    "long-word": ("An added token of 2 MB.", lambda at, base: words(at, base, 1, 2 << 20)),
    "collides": (
        "Special tokens that are texts of the base's words.",
        lambda at, base: changed(
            at, base, lambda content: None, eos_token="a", pad_token="e",
            additional_special_tokens=["o", "t"],
        ),
    ),
    "classes": (
        "A class that is none.",
        lambda at, base: own(
            at, base, tokenizer_class={"a": [1]}, model_max_length="x", eos_token={"__type": 3}
        ),
    ),
    "bytes-class": (
        "A class that needs no vocabulary, or another one.",
        lambda at, base: own(at, base, tokenizer_class="ByT5Tokenizer"),
    ),
    "template-list": (
        "A chat template that is a list of anything.",
        lambda at, base: templates(
            at, base, [{"name": 3}, 4, {"name": "default", "template": ["x"]}]
        ),
    ),
    "template-object": (
        "A chat template that is an object.",
        lambda at, base: templates(at, base, {"default": {"a": 1}, "tool_use": None}),
    ),
    "template-number": (
        "A chat template that is a number.", lambda at, base: templates(at, base, 7)
    ),
    "special-map": (
        "Special tokens of other types, and with texts that are no UTF-8.",
        lambda at, base: own(
            at, base, extra_special_tokens={"a_token": "\ud800", "b_token": "b" * 100_000}
        ),
    ),
}, told=False)  # fmt: skip


@either
def tokenizer_code(at: Path, base: Path) -> None:
    """Code of its own."""
    own(at, base, auto_map={"AutoTokenizer": ["code.Own", None]}, tokenizer_class="Own")
    (at / "code.py").write_text("open('/tmp/hostile-ran', 'w')\nclass Own: pass\n")


@either
def tokenizer_templates(at: Path, base: Path) -> None:
    """Five thousand templates."""
    own(at, base)
    (at / "additional_chat_templates").mkdir()
    for i in range(5000):
        (at / "additional_chat_templates" / f"t{i}.jinja").write_text(HELLO)


@either
def tokenizer_manifest(at: Path, base: Path) -> None:
    """A directory of templates that is a link to the machine's."""
    own(at, base)
    (at / "additional_chat_templates").symlink_to("/etc")


@wrong
def tokenizer_two_gigabytes(at: Path, base: Path) -> None:
    """Twenty sparse vocabularies of 150 MB."""
    own(at, base)
    for i in range(20):
        (at / f"vocab{i}.txt").touch()
        os.truncate(at / f"vocab{i}.txt", 150 << 20)
