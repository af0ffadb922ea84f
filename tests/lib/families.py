"""The chat templates of model families, from the installed `trl`, each with a tokenizer that knows
the special tokens in it. Nothing is copied and nothing needs the network.
"""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lorafold.models.sources import resolve_model
from lorafold.models.tokenizer import load_tokenizer

SPECIAL = re.compile(
    r"<\|[\w ./-]+\|?>|<[\w]+\|>|<｜[^｜<>]+｜>|<[a-z]+_of_[a-z]+>|</?s>|\[gMASK\]|<sop>"
)
TOKENS = 4096
TEXT_ARGUMENTS = {"deepseekv3"}  # take a call's arguments as JSON text
EMPTY_CONTENT = {"deepseekv3", "deepseekv3_training"}  # need a content beside calls
PARTS = {  # take content as a list of parts only
    *("idefics3", "idefics3_training", "llava_next", "llava_next_training"),
    *("smolvlm", "smolvlm_training"),
}


def folder() -> Path:
    spec = find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "chat_templates"


def names() -> list[str]:
    return sorted(path.stem for path in folder().glob("*.jinja"))


@cache
def embedded() -> Any:
    """The embedded model's tokenizer with its first tokens alone, which is faster to copy."""
    made = load_tokenizer(resolve_model("smollm2"))
    content = json.loads(made.backend_tokenizer.to_str())
    model = content["model"]
    model["vocab"] = {text: number for text, number in model["vocab"].items() if number < TOKENS}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    made._tokenizer = Tokenizer.from_str(json.dumps(content))
    return made


@cache
def tokenizer_of(name: str) -> Any:
    """The embedded model's tokenizer with a family's template and its special tokens."""
    made = copy.deepcopy(embedded())
    text = (folder() / f"{name}.jinja").read_text(encoding="utf-8")
    made.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>"})
    made.add_tokens(sorted(set(SPECIAL.findall(text))), special_tokens=True)
    made.chat_template = text
    return made


def as_taken(name: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as the family's documentation has them, for transformers itself."""
    found = copy.deepcopy(messages)
    for message in found:
        if isinstance(message.get("content"), list):
            message["content"] = "".join(part["text"] for part in message["content"])
        if name in EMPTY_CONTENT and "tool_calls" in message:
            message["content"] = message.get("content") or ""
        if name in TEXT_ARGUMENTS:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        if name in PARTS and isinstance(message.get("content"), str):
            message["content"] = [{"type": "text", "text": message["content"]}]
    return found
