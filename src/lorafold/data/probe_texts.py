"""Texts on which models are compared: prose, questions, code, tables, letters, a few languages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.data.examples import encode
from lorafold.data.render import ensure_chat_template
from lorafold.data.rows import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = Path(__file__).with_name("probes.jsonl")
PROBE_LENGTH = 512  # tokens; longer probe texts are cut


def probe_ids(
    tokenizer: PreTrainedTokenizerBase, probe: str | Path | None
) -> list[tuple[int, ...]]:
    """Token ids of the probe texts: the built-in ones, or the rows of a file that training takes.
    """
    ensure_chat_template(tokenizer)
    return [
        example.ids
        for example in encode(read_rows(str(probe or PROBES)), tokenizer, PROBE_LENGTH).examples
    ]
