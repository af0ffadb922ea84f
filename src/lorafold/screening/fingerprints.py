"""What of a tokenizer tells whether two of them render and split texts alike."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

from jinja2 import Environment, TemplateError, meta

# variables that transformers itself gives to a template
OURS = {"messages", "tools", "documents", "add_generation_prompt", "chat_template",
        "raise_exception", "strftime_now"}  # fmt: skip
SETTINGS = ("truncation", "padding")  # of calls, not of the tokenizer


def backend_of(tokenizer: Any) -> str:
    """The digest of how a fast tokenizer splits texts; empty for one that is not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ""
    parts = json.loads(backend.to_str())
    kept = {name: part for name, part in parts.items() if name not in SETTINGS}
    return sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def variables_of(tokenizer: Any) -> frozenset[str]:
    """The variables that a caller may set for the tokenizer's chat template."""
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            str(tokenizer.get_chat_template())
        )
    except TemplateError:  # tags of transformers' own
        return frozenset()
    return meta.find_undeclared_variables(tree) - OURS - tokenizer.special_tokens_map.keys()
