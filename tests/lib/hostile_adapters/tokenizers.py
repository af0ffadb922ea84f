"""Tokenizers: their vocabulary, their configuration, and what they do to a text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from hostile_adapters.case import HELLO, MANY, either, own, wrong


@wrong
def tokenizer_deep(at: Path, base: Path) -> None:
    """A tokenizer.json nested 100,000 deep."""
    own(at, base)
    (at / "tokenizer.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")


@wrong
def tokenizer_config_deep(at: Path, base: Path) -> None:
    """The same for its configuration."""
    own(at, base)
    (at / "tokenizer_config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")


@either
def tokenizer_split(at: Path, base: Path) -> None:
    """A split by an expression that takes exponential time."""
    content = own(at, base)
    how = {"behavior": "Isolated", "invert": False}
    split = {"type": "Split", "pattern": {"Regex": "((a+)+)+$|(x+x+)+y"}} | how
    both = [split, content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": both}
    (at / "tokenizer.json").write_text(json.dumps(content))


@either
def tokenizer_decoder(at: Path, base: Path) -> None:
    """A decoder that replaces every letter by thousands."""
    content = own(at, base)
    content["decoder"] = {"type": "Replace", "pattern": {"Regex": "."}, "content": "y" * 10_000}
    (at / "tokenizer.json").write_text(json.dumps(content))


@either
def tokenizer_normalizer(at: Path, base: Path) -> None:
    """Normalizers that make a text of one letter one of a billion."""
    content = own(at, base)
    one = {"type": "Replace", "pattern": {"Regex": "."}, "content": "aaaaaaaaaa"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [one] * 9}
    (at / "tokenizer.json").write_text(json.dumps(content))


def words(n: int, size: int = 0) -> Callable[[Path, Path], None]:
    """A tokenizer with n tokens more, of so many letters each."""

    def alter(at: Path, base: Path) -> None:
        content = own(at, base)
        content["added_tokens"] += [
            content["added_tokens"][0]
            | {"id": 300 + i, "content": f"<w{i}>" + "x" * size, "special": i % 2 == 0}
            for i in range(n)
        ]
        (at / "tokenizer.json").write_text(json.dumps(content))

    return alter


@wrong
def tokenizer_million_words(at: Path, base: Path) -> None:
    """A million added tokens."""
    words(MANY)(at, base)


@either
def tokenizer_many_words(at: Path, base: Path) -> None:
    """Thirty thousand added tokens, each of which a server would add to its own."""
    words(30_000)(at, base)


@either
def tokenizer_long_word(at: Path, base: Path) -> None:
    """An added token of 2 MB."""
    words(1, 2 << 20)(at, base)


@wrong
def tokenizer_vocabulary(at: Path, base: Path) -> None:
    """A vocabulary of a million."""
    content = own(at, base)
    content["model"]["vocab"] |= {f"v{i}": 300 + i for i in range(MANY)}
    (at / "tokenizer.json").write_text(json.dumps(content))


@wrong
def tokenizer_numbers(at: Path, base: Path) -> None:
    """A token with a number of billions."""
    content = own(at, base)
    content["model"]["vocab"]["zzz"] = 2**32 - 1
    (at / "tokenizer.json").write_text(json.dumps(content))


@wrong
def tokenizer_renumbered(at: Path, base: Path) -> None:
    """Two tokens of the base that change places."""
    content = own(at, base)
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (at / "tokenizer.json").write_text(json.dumps(content))


@either
def tokenizer_collides(at: Path, base: Path) -> None:
    """Special tokens that are texts of the base's words."""
    content = own(at, base, eos_token="a", pad_token="e", additional_special_tokens=["o", "t"])
    (at / "tokenizer.json").write_text(json.dumps(content))


@either
def tokenizer_code(at: Path, base: Path) -> None:
    """Code of its own."""
    own(at, base, auto_map={"AutoTokenizer": ["code.Own", None]}, tokenizer_class="Own")
    (at / "code.py").write_text("open('/tmp/hostile-ran', 'w')\nclass Own: pass\n")


@either
def tokenizer_classes(at: Path, base: Path) -> None:
    """A class that is none."""
    own(at, base, tokenizer_class={"a": [1]}, model_max_length="x", eos_token={"__type": 3})


@either
def tokenizer_bytes_class(at: Path, base: Path) -> None:
    """A class that needs no vocabulary, or another one."""
    own(at, base, tokenizer_class="ByT5Tokenizer")


@either
def tokenizer_template_list(at: Path, base: Path) -> None:
    """A chat template that is a list of anything."""
    own(at, base, chat_template=[{"name": 3}, 4, {"name": "default", "template": ["x"]}])
    (at / "chat_template.jinja").unlink()


@either
def tokenizer_template_object(at: Path, base: Path) -> None:
    """A chat template that is an object."""
    own(at, base, chat_template={"default": {"a": 1}, "tool_use": None})
    (at / "chat_template.jinja").unlink()


@either
def tokenizer_template_number(at: Path, base: Path) -> None:
    """A chat template that is a number."""
    own(at, base, chat_template=7)
    (at / "chat_template.jinja").unlink()


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
def tokenizer_large_config(at: Path, base: Path) -> None:
    """A configuration of 200 MB."""
    own(at, base, x="y" * (200 << 20))


@either
def tokenizer_special_map(at: Path, base: Path) -> None:
    """Special tokens of other types, and with texts that are no UTF-8."""
    own(at, base, extra_special_tokens={"a_token": "\ud800", "b_token": "b" * 100_000})


@wrong
def tokenizer_two_gigabytes(at: Path, base: Path) -> None:
    """Twenty sparse vocabularies of 150 MB."""
    own(at, base)
    for i in range(20):
        (at / f"vocab{i}.txt").touch()
        os.truncate(at / f"vocab{i}.txt", 150 << 20)
