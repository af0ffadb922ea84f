"""Examples: the token ids of a row, with labels that say which tokens are trained on.

The text of a row is tokenized once, with character offsets. Tokens inside a trained span are their
own labels; all others are labelled -100. If a token would span the border between prompt and
completion, the text is tokenized in two pieces, so that the ids before the completion are the ones
that generation sees.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from lorafold.data.render import Rendered, render_trained
from lorafold.data.rows import LISTED, check_objective, check_rows
from lorafold.data.shapes import Row, shape_of
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

NO_LOSS = -100  # torch's ignore_index


@dataclass(frozen=True)
class Example:
    """A tokenized row: `ids` (T,) and unshifted `labels` (T,), where labels[t] is ids[t] or -100.

    The first label is -100, because nothing comes before the first token.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What `encode` made of the rows; `str` gives it as lines of text.

    `rows` counts all rows, `tokens` and `labelled` the tokens of the examples. `longest` is the
    length of the longest row in tokens, before cutting. `truncated` rows were cut at `max_length`
    tokens, `unlabelled` rows have no token to train on, and `turns_left_out` assistant turns are
    not trained on.
    """

    rows: int
    tokens: int
    labelled: int
    longest: int
    max_length: int
    truncated: int
    unlabelled: int
    turns_left_out: int

    def __str__(self) -> str:
        text = (
            f"{self.rows} rows, {self.tokens} tokens, {self.labelled} of them trained on; the"
            f" longest row has {self.longest}"
        )
        if self.truncated:
            text += f"\n{self.truncated} rows were cut at {self.max_length} tokens"
        if self.unlabelled:
            text += f"\n{self.unlabelled} rows have no token to train on and are left out"
        if self.turns_left_out:
            text += (
                f"\n{self.turns_left_out} assistant turns are not trained on: the chat template"
                " renders them differently at generation"
            )
        return text


@dataclass(frozen=True)
class Encoded:
    """The examples that have a token to train on, in the order of their rows, and the report over
    all rows.
    """

    examples: list[Example]
    report: Report


def encode(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Encoded:
    """Tokenize rows of conversations, prompts with completions, or plain text.

    Raises LorafoldError if rows are malformed, if the chat template refuses some, or if no row has
    a token to train on.

    Args:
        rows: The user's rows, all of one shape.
        tokenizer: A fast tokenizer. Conversations need its chat template; `ensure_chat_template`
            sets one where there is none.
        max_length: Longer rows are cut to this many tokens, at their end.
    """
    if not tokenizer.is_fast:
        raise LorafoldError(
            f"tokenizer: found {type(tokenizer).__name__}, which gives no character offsets;"
            " expected a fast tokenizer (one with a tokenizer.json)"
        )
    rows = check_rows(enumerate(rows, 1), "data")
    check_objective(rows, "sft")
    examples: list[Example] = []
    bad: list[str] = []
    longest = truncated = left_out = 0
    for number, row in enumerate(rows, 1):
        try:
            example, skipped = _encode_row(row, tokenizer)
        except LorafoldError as error:
            bad.append(f"row {number}: {error}")
            continue
        longest, truncated, left_out = (
            max(longest, len(example.ids)),
            truncated + (len(example.ids) > max_length),
            left_out + skipped,
        )
        example = Example(example.ids[:max_length], example.labels[:max_length])
        if any(label != NO_LOSS for label in example.labels):
            examples.append(example)
    if bad:
        raise LorafoldError(
            "; ".join(bad[:LISTED])
            + (f"; and {len(bad) - LISTED} more" if len(bad) > LISTED else "")
        )
    tokens = sum(len(example.ids) for example in examples)
    labelled = sum(label != NO_LOSS for example in examples for label in example.labels)
    report = Report(
        len(rows),
        tokens,
        labelled,
        longest,
        max_length,
        truncated,
        len(rows) - len(examples),
        left_out,
    )
    if not examples:
        raise LorafoldError(
            f"none of the {len(rows)} rows has a token to train on: {truncated} were cut at"
            f" max_length {max_length} (the longest has {longest} tokens), and {left_out} assistant"
            " turns are left out because the chat template renders them differently at generation;"
            " expected assistant turns or completions within max_length"
        )
    return Encoded(examples, report)


def preview(example: Example, tokenizer: "PreTrainedTokenizerBase") -> "Text":
    """Return the example's text as the model sees it.

    Tokens that are trained on are bold and stand in ⟦ ⟧, which shows them without colour too.
    """
    from rich.text import Text

    text = Text()
    for trained, run in groupby(
        zip(example.ids, example.labels, strict=True), key=lambda pair: pair[1] != NO_LOSS
    ):
        piece = str(
            tokenizer.decode(
                [token for token, _ in run],
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
        )
        shown, style = (f"⟦{piece}⟧", "bold green") if trained else (piece, "dim")
        text.append(shown, style=style)
    return text


def _encode_row(row: Row, tokenizer: "PreTrainedTokenizerBase") -> tuple[Example, int]:
    shape = shape_of(row)
    if shape is None or shape.conversation is None:
        ids = list(tokenizer(row["text"], verbose=False).input_ids)
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        return _example(ids, ids), 0
    rendered = render_trained(shape.conversation(row), tokenizer)
    ids, starts = _tokens(rendered, tokenizer)
    labels = [NO_LOSS] * len(ids)
    for start, end in rendered.spans:
        inside = slice(bisect_left(starts, start), bisect_left(starts, end))
        labels[inside] = ids[inside]
    return _example(ids, labels), rendered.left_out


def _example(ids: Iterable[int], labels: Iterable[int]) -> Example:
    return Example(tuple(ids), (NO_LOSS, *islice(labels, 1, None)))


def _tokens(
    rendered: Rendered, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[int]]:
    """Return the token ids and the character at which each starts.

    The text is cut before a trained span if tokenizing it whole would change the prompt's ids.
    """
    ids: list[int] = []
    starts: list[int] = []
    at = 0
    rest, rest_starts = _tokenize(rendered.text, at, None, tokenizer)
    for border, _ in rendered.spans:
        head, head_starts = _tokenize(rendered.text, at, border, tokenizer)
        if rest[: len(head)] != head:
            ids, starts, at = ids + head, starts + head_starts, border
            rest, rest_starts = _tokenize(rendered.text, at, None, tokenizer)
    return ids + rest, starts + rest_starts


def _tokenize(
    text: str, start: int, end: int | None, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[int]]:
    encoded: Any = tokenizer(
        text[start:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return encoded.input_ids, [start + begin for begin, _ in encoded.offset_mapping]
