"""Examples: the token ids of a row, with labels that say which tokens are trained on.

The text of a row is tokenized once, with character offsets. Tokens inside a trained span are their
own labels; all others are labelled -100. If a token would span the border between prompt and
completion, the text is tokenized in two pieces, so that the ids before the completion are the ones
that generation sees. A conversation may give several examples (`data.trained`).
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, pairwise
from typing import TYPE_CHECKING, Any

from lorafold.data.render import Rendered, Rendering, Trained, render_trained
from lorafold.data.rows import LISTED, check_objective, check_rows
from lorafold.data.shapes import shape_of
from lorafold.data.sources import Row
from lorafold.data.trained import Span
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

NO_LOSS = -100  # torch's ignore_index
WHOLE = Rendering()  # every turn of the assistant, with its reasoning


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
    not trained on. `examples` are what the rows gave, and `reasoning_hidden` trained turns have a
    reasoning that the chat template leaves out.
    """

    rows: int
    tokens: int
    labelled: int
    longest: int
    max_length: int
    truncated: int
    unlabelled: int
    turns_left_out: int
    examples: int = 0
    reasoning_hidden: int = 0

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
        if self.examples > self.rows - self.unlabelled:
            text += (
                f"\n{self.examples} examples: a row gives several where the chat template rewrites"
                " earlier turns, or tokens would span their borders"
            )
        if self.reasoning_hidden:
            text += (
                f"\nthe reasoning of {self.reasoning_hidden} assistant turns is not trained on: the"
                " chat template leaves it out"
            )
        return text


@dataclass(frozen=True)
class Encoded:
    """The examples that have a token to train on, in the order of their rows, and the report over
    all rows.
    """

    examples: list[Example]
    report: Report


def encode(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    rendering: Rendering = WHOLE,
) -> Encoded:
    """Tokenize rows of conversations, prompts with completions, or plain text.

    Raises LorafoldError if rows are malformed, if the chat template refuses some, or if no row has
    a token to train on.

    Args:
        rows: The user's rows, all of one shape.
        tokenizer: A fast tokenizer. Conversations need its chat template; `ensure_chat_template`
            sets one where there is none.
        max_length: Longer examples are cut to this many tokens, at their end.
        rendering: What of a conversation is trained on.
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
    longest = truncated = left_out = hidden = unlabelled = 0
    for number, row in enumerate(rows, 1):
        try:
            found, trained = encode_row(row, tokenizer, rendering)
        except LorafoldError as error:
            bad.append(f"row {number}: {error}")
            continue
        longest = max(longest, *(len(example.ids) for example in found))
        truncated += any(len(example.ids) > max_length for example in found)
        left_out, hidden = left_out + trained.left_out, hidden + trained.hidden
        cut = [Example(e.ids[:max_length], e.labels[:max_length]) for e in found]
        kept = [e for e in cut if any(label != NO_LOSS for label in e.labels)]
        unlabelled += not kept
        examples += kept
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
        unlabelled,
        left_out,
        len(examples),
        hidden,
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


def encode_row(
    row: Row, tokenizer: "PreTrainedTokenizerBase", rendering: Rendering = WHOLE
) -> tuple[list[Example], Trained]:
    """The examples of one row, before they are cut, and how its conversation was rendered.

    Args:
        row: A checked row.
        tokenizer: A fast tokenizer with a chat template.
        rendering: What of a conversation is trained on.

    Raises LorafoldError if the chat template refuses the row.
    """
    shape = shape_of(row)
    if shape is None or shape.conversation is None:
        ids = list(tokenizer(row["text"], verbose=False).input_ids)
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        return [_example(ids, ids)], Trained(())
    trained = render_trained(shape.conversation(row), tokenizer, rendering)
    return [e for text in trained.renderings for e in encode_rendered(text, tokenizer)], trained


def encode_rendered(rendered: Rendered, tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    """Tokenize one rendered text: one example, unless a token would span the border between a
    prompt and its turn. Such a turn has an example of its own, in which the text is cut there, so
    that the ids before it are those of the prompt alone.
    """
    ids, starts = _tokenize(rendered.text, 0, tokenizer)
    examples: list[Example] = []
    together: list[Span] = [] if rendered.turns else list(rendered.spans)
    borders = [*rendered.turns, len(rendered.text) + 1]
    for border, following in pairwise(borders):
        spans = [span for span in rendered.spans if border <= span[0] < following]
        prompt = tokenizer(rendered.text[:border], add_special_tokens=False, verbose=False)
        before = list(prompt.input_ids)
        if ids[: len(before)] == before:
            together += spans
            continue
        # up to the end of the turn, or of the text after the last one
        end = spans[-1][1] if following <= len(rendered.text) else len(rendered.text)
        rest, rest_starts = _tokenize(rendered.text[:end], border, tokenizer)
        examples.append(_labelled(before + rest, [-1] * len(before) + rest_starts, spans))
    if together or not examples:
        examples.append(_labelled(ids, starts, together))
    return examples


def _labelled(ids: list[int], starts: list[int], spans: Sequence[Span]) -> Example:
    """The example whose trained tokens are those that start within a span."""
    labels = [NO_LOSS] * len(ids)
    for start, end in spans:
        inside = slice(bisect_left(starts, start), bisect_left(starts, end))
        labels[inside] = ids[inside]
    return _example(ids, labels)


def _example(ids: Iterable[int], labels: Iterable[int]) -> Example:
    return Example(tuple(ids), (NO_LOSS, *islice(labels, 1, None)))


def _tokenize(
    text: str, start: int, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[int]]:
    """The ids of a text from a character on, and the character at which each starts."""
    encoded: Any = tokenizer(
        text[start:], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return encoded.input_ids, [start + begin for begin, _ in encoded.offset_mapping]
