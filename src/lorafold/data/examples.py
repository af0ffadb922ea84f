"""Supervised examples: the token ids of a row, with labels for its trained tokens.

A text is tokenized once. If a token would cross the border between a prompt and its turn, the turn
gets a separate example that is tokenized in two parts, so that training has the same prompt ids as
generation. To detect this, the end of the prompt, from its last added token on, is tokenized alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafold.data.arrow import TURNS, Lists, TableExamples, column, to_batch
from lorafold.data.chat_template import date_used, template_of
from lorafold.data.control_tokens import MARK_START, ROWS_REMARK, Pieces, rendered_ids, to_pieces
from lorafold.data.formats import CONVERSATIONS, Conversation
from lorafold.data.json_input import Row
from lorafold.data.render import (
    Rendered,
    Rendering,
    TrainedRenderings,
    ensure_chat_template,
    reasoning_kwargs,
    render_trained,
)
from lorafold.data.row_store import Rows, parts_of
from lorafold.data.rows import read_rows, to_rows
from lorafold.data.tokenizing import Encoded, Encoder, tokenize_rows, with_counts
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console
    from rich.text import Text
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

NO_LOSS = -100  # PyTorch's ignore_index
WHOLE = Rendering()  # train on every assistant turn, with its reasoning
TRAINED, EMPTY = ":trained", ":empty"  # suffixes of `turns`; an empty turn is trained too
MAX_CACHED_PROMPTS = 1000  # cached tokenizations of prompt ends


@dataclass
class PendingExample:
    row: int
    left_out: int = 0
    hidden: int = 0
    marked: bool = False
    turns: str = ""
    problem: str = ""
    kwargs: str = ""
    rendered: Rendered | None = None
    text: str = ""
    ids: Sequence[int] = ()
    spans: Sequence[int] = ()


@dataclass(eq=False)
class CompletionEncoder(Encoder):
    """Encodes each row to one or more examples. The columns are `row`, `ids` (T,), `spans` (2n,),
    the starts and ends of n trained spans, and, for a row's first example, `left_out` (number of
    assistant turns that can't be trained), `hidden` (number of trained turns of which the template
    hides a part), `kwargs` (the --template-kwargs that show more), `marked` (contains control
    tokens as text), `turns` (a line per message: role and `TRAINED` or `EMPTY`) and `problem`.
    """

    tokenizer: PreTrainedTokenizerBase
    rendering: Rendering = field(default_factory=Rendering)
    _prompt_end_ids: dict[str, list[int]] = field(default_factory=dict, repr=False)
    row_content = CONVERSATIONS

    @property
    def identity(self) -> dict[str, Any]:
        of_tokenizer = tokenizer_identity(self.tokenizer)
        return {"kind": "completions", "rendering": asdict(self.rendering), **of_tokenizer}

    def encode(self, contents: Sequence[Conversation], first: int) -> pa.RecordBatch:
        pieces = [piece for n, one in enumerate(contents, first) for piece in self._pieces(one, n)]
        encodings: dict[int, Encoding | Pieces] = {}  # of pieces without a problem
        for plain in (False, True):
            some = [n for n, p in enumerate(pieces) if not p.problem and (not p.rendered) is plain]
            if not some:
                continue
            encoded = self.tokenizer(
                [pieces[n].text for n in some],
                add_special_tokens=plain,
                return_attention_mask=False,
                verbose=False,
            ).encodings
            if encoded is None:
                raise LorafoldError(
                    f"tokenizer: found {type(self.tokenizer).__name__}, which has no character"
                    " offsets, expected a fast tokenizer (one with a tokenizer.json)"
                )
            encodings |= zip(some, encoded, strict=True)
        examples = []
        for n, piece in enumerate(pieces):
            encoding = encodings.get(n)
            if encoding is not None and piece.rendered:
                examples += self._examples(piece, encoding)
                continue
            if encoding is not None:
                end = self.tokenizer.eos_token_id
                ended = end is None or encoding.ids[-1:] == [end]
                piece.ids = encoding.ids if ended else [*encoding.ids, end]
                piece.spans = [0, len(piece.ids)]
            examples.append(piece)
        entries, integers = [*map(vars, examples)], ("row", "left_out", "hidden")
        texts = (TURNS, "problem", "kwargs")
        return to_batch(entries, integers, ("ids", "spans"), ("marked",), texts)

    def _pieces(self, given: Conversation, number: int) -> list[PendingExample]:
        if not given.messages:
            turns = f"text{TRAINED if given.text.strip() else EMPTY}"
            return [PendingExample(number, turns=turns, text=given.text)]
        try:
            trained = render_trained(given, self.tokenizer, self.rendering)
        except LorafoldError as error:
            return [PendingExample(number, problem=str(error))]
        pieces = [PendingExample(number, rendered=one, text=one.text) for one in trained.renderings]
        first, lines = pieces[0], []
        for n, message in enumerate(given.messages):
            is_empty = not (message.get("content") or "").strip()
            is_empty &= not (message.get("tool_calls") or message.get("reasoning_content"))
            suffix = "" if n not in trained.turns else EMPTY if is_empty else TRAINED
            lines.append(" ".join(message["role"].split()) + suffix)
        first.left_out, first.hidden = trained.left_out, trained.hidden
        if trained.hidden:
            first.kwargs = reasoning_kwargs(template_of(self.tokenizer))
        first.marked = any(MARK_START in piece.text for piece in pieces)
        first.turns = "\n".join(lines)
        return pieces

    def _examples(self, piece: PendingExample, encoding: Encoding | Pieces) -> list[PendingExample]:
        """Makes an example for each turn whose border a token would cross, and one for the rest."""
        assert piece.rendered is not None
        rendered, text, together = piece.rendered, piece.text, []
        if MARK_START in text:
            encoding = to_pieces(text, self.tokenizer)
        examples = []
        ids, added = encoding.ids, template_of(self.tokenizer).added
        for border, following in pairwise([*rendered.turns, len(text) + 1]):
            at = first_token(encoding, border, text)
            spans = [span for span in rendered.spans if border <= span[0] < following]
            # checks whether tokenizing the prompt alone gives the same ids
            last = next((i for i in reversed(range(at)) if ids[i] in added), 0)
            start = encoding.token_to_chars(last) if last else None
            ending = text[start[0] if start else 0 : border]
            if ending not in self._prompt_end_ids:
                if len(self._prompt_end_ids) > MAX_CACHED_PROMPTS:
                    self._prompt_end_ids.clear()
                self._prompt_end_ids[ending] = rendered_ids(ending, self.tokenizer)
            if self._prompt_end_ids[ending] == ids[last:at]:
                together += spans
                continue
            end = len(text) if following > len(text) else spans[-1][1]
            cut = Rendered(text[:end], tuple(spans), (border,))
            examples.append(PendingExample(piece.row))
            examples[-1].ids, examples[-1].spans = tokenize_in_parts(cut, self.tokenizer)
        if together or not examples:
            places = [
                first_token(encoding, at, text, spaced=not n)
                for span in together
                for n, at in enumerate(span)
            ]
            examples.append(PendingExample(piece.row, ids=ids, spans=places))
        first = examples[0]
        return [replace(piece, ids=first.ids, spans=first.spans), *examples[1:]]


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns everything that token ids depend on, such as today's date if it is rendered."""
    return {
        "day": date_used(tokenizer),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "template": str(tokenizer.chat_template),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }


def first_token(
    encoding: Encoding | Pieces, character: int, text: str, spaced: bool = False
) -> int:
    """Returns the index of the first token that starts at or after a character. With `spaced`, the
    token may also start with whitespace before the character.
    """
    if character >= len(text):
        return len(encoding)
    at = encoding.char_to_token(character)
    if at is None:  # no token contains this character
        return bisect_left([start for start, _ in encoding.offsets], character)
    while at < len(encoding) and (span := encoding.token_to_chars(at)) and span[0] < character:
        if spaced and not text[span[0] : character].strip():
            break
        at += 1  # the token crosses the border
    return at


def tokenize_in_parts(
    rendered: Rendered, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Tokenizes the texts before and after the start of a turn. Returns ids and trained spans."""
    [border], text = rendered.turns, rendered.text
    before, rest = to_pieces(text[:border], tokenizer), to_pieces(text[border:], tokenizer)
    starts = [min(start, border - 1) for start, _ in before.offsets]
    starts += [border + start for start, _ in rest.offsets]
    spans: list[int] = []
    for a, b in rendered.spans:
        first = bisect_left(starts, a)
        last = starts[first - 1] if first and starts[first : first + 1] != [a] else border - 1
        spans += first - (last >= border and not text[last:a].strip()), bisect_left(starts, b)
    return before.ids + rest.ids, spans


@dataclass(frozen=True)
class Example:
    """Tokens `ids` (T,) and unshifted `labels` (T,): labels[t] is ids[t], or -100 if it is not
    trained. labels[0] is -100, because no token precedes it.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class EncodingReport:
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
    marked: int = 0
    kwargs: str = ""

    def __str__(self) -> str:
        return with_counts(
            f"{self.rows} row{'s' * (self.rows != 1)}, {self.tokens} tokens, {self.labelled} of"
            f" them trained on; the longest row has {self.longest}",
            (self.truncated, f"rows were cut at {self.max_length} tokens"),
            (self.unlabelled, "rows have no token to train on and are left out"),
            (
                self.turns_left_out,
                "assistant turns are not trained on: they have no prompt, or the chat template"
                " renders them differently at generation",
            ),
            (
                (self.examples > self.rows - self.unlabelled) * self.examples,
                "examples: a row becomes several if the chat template rewrites earlier turns, or if"
                " a token would cross the border of a turn",
            ),
            (
                self.reasoning_hidden,
                "assistant turns are trained on without their reasoning or their text next to a"
                " tool call, because the chat template leaves these out"
                + f"; {self.kwargs} renders the reasoning" * bool(self.kwargs),
            ),
            (self.marked, ROWS_REMARK),
        )


class Examples(TableExamples[Example]):
    def __init__(self, table: pa.Table, max_length: int) -> None:
        self._spans = Lists(table.column("spans"))
        lengths = np.minimum(Lists(table.column("ids")).lengths, max_length)
        spans = zip(self._spans.ends, self._spans.values, strict=True)
        flat = [np.zeros(0, np.int32), *(of[ends[0] : ends[-1]] for ends, of in spans)]
        start, end = np.concatenate(flat).reshape(-1, 2).T  # (s,) each
        of = np.repeat(np.arange(len(lengths)), self._spans.lengths // 2)  # (s,), each span's index
        # the first token is never in the loss, because no token precedes it
        counted = np.maximum(0, np.minimum(end, lengths[of]) - np.maximum(start, 1))
        labelled = np.bincount(of, counted, len(lengths)).astype(np.int64)
        last = np.zeros(len(lengths), np.int32)
        last[of] = end  # the end of the last span
        super().__init__(table, max_length, np.flatnonzero(labelled))
        self.labelled = labelled[self.indices]  # (n,), number of tokens in the loss
        self.compared_by = self._ids, self._spans
        self.ends_lost = last[self.indices] > max_length

    def item(self, index: int) -> Example:
        entry = int(self.indices[index])
        ids = self._ids[entry][: self._max_length].tolist()
        return example_of(ids, self._spans[entry].tolist())


def example_of(ids: Sequence[int], spans: Sequence[int]) -> Example:
    labels = [NO_LOSS] * len(ids)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        labels[start:end] = ids[start:end]
    return Example(tuple(ids), (NO_LOSS, *labels[1:]))


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    console: Console | None = None,
    rendering: Rendering = WHOLE,
) -> Encoded:
    rows = to_rows(rows, CONVERSATIONS)
    table = tokenize_rows(rows, CompletionEncoder(tokenizer, rendering), console)
    return encoded(table, rows, max_length)


def encoded(table: pa.Table, rows: Rows, max_length: int) -> Encoded:
    """Returns the examples in a table from `CompletionEncoder`, truncated to `max_length` tokens,
    with a report.
    """
    examples = Examples(table, max_length)
    whole, row = Lists(table.column("ids")).lengths, column(table, "row")
    longest, truncated = int(whole.max()), len(np.unique(row[whole > max_length]))
    left_out = int(column(table, "left_out").sum())
    if not examples:
        cut = f"{truncated} were cut at max_length {max_length} (the longest has {longest} tokens)"
        lost = f"{left_out} assistant turns have no prompt or are rendered differently"
        reasons = [*[cut] * bool(truncated), *[f"{lost} at generation"] * bool(left_out)]
        raise LorafoldError(
            f"none of the {len(rows)} rows has a token to train on:"
            f" {', and '.join(reasons) or 'they have no assistant turn that may be trained on'};"
            " expected assistant turns after a prompt, within max_length"
        )
    used = np.unique(examples.rows)
    report = EncodingReport(
        len(rows),
        int(examples.lengths.sum()),
        int(examples.labelled.sum()),
        longest,
        max_length,
        truncated,
        len(rows) - len(used),
        left_out,
        len(examples),
        int(column(table, "hidden").sum()),
        examples.marked,
        max(table.column("kwargs").unique().to_pylist()),
    )
    return Encoded(examples, report, parts_of(used, rows.parts))


def encode_row(
    row: Row, tokenizer: PreTrainedTokenizerBase, rendering: Rendering = WHOLE
) -> tuple[list[Example], TrainedRenderings]:
    encoder = CompletionEncoder(tokenizer, rendering)
    entries = encoder.encode(Rows.of([row], CONVERSATIONS).extract(CONVERSATIONS), 0).to_pylist()
    if problem := entries[0]["problem"]:
        raise LorafoldError(problem)
    examples = [example_of(entry["ids"], entry["spans"]) for entry in entries]
    counts = (sum(entry[name] for entry in entries) for name in ("left_out", "hidden"))
    return examples, TrainedRenderings((), *counts)


def preview(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Returns the text as the model reads it, with trained tokens in bold and ⟦ ⟧."""
    from rich.text import Text

    text, tokens = Text(), zip(example.ids, example.labels, strict=True)
    for trained, run in groupby(tokens, key=lambda pair: pair[1] != NO_LOSS):
        piece = decode_ids(tokenizer, [token for token, _ in run])
        text.append(f"⟦{piece}⟧" if trained else piece, style="bold green" if trained else "dim")
    return text


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


PROBES = Path(__file__).with_name("probes.jsonl")


def probe_ids(
    tokenizer: PreTrainedTokenizerBase, probe: str | Path | None
) -> list[tuple[int, ...]]:
    """Returns the token ids of the built-in probe texts, or of the rows in a file."""
    ensure_chat_template(tokenizer)
    return [
        example.ids
        for example in encode(read_rows(str(probe or PROBES)), tokenizer, max_length=512).examples
    ]
