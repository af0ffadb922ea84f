"""Checks before training: a summary of the chat template, and problems of tokenized rows.

Rows are compared by digests of their tokens (`TableExamples`). `PROBLEMS` lists the checks. Labels
without rows and files without trained turns are also reported.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafold.data.arrow import TURNS, Array, TableExamples, column, hash_rows
from lorafold.data.chat_template import (
    ASSISTANT,
    NOWHERE,
    PROBE_KEY,
    PROBE_NAME,
    PROBE_TEXT,
    PROBE_TOOL,
    SYSTEM,
    TOOL_CALL,
    USER,
    WITH_TURN,
    date_used,
    template_of,
    tool_call,
    try_apply,
)
from lorafold.data.examples import EMPTY, TRAINED
from lorafold.data.formats import Conversation
from lorafold.data.render import THINKS, helpful_kwargs, reasoning_kwargs, render_trained
from lorafold.data.row_store import RowPlace, Rows, row_names
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SHOWN = 5  # rows that one line names
HELD_OUT = "held_out_in_training"
PROBLEMS = {
    "duplicates": "are identical to an earlier row",
    HELD_OUT: "are also in the training data, so held-out results look better than they are",
    "empty_answers": "have an empty answer to train on",
    "contradictions": "{}",
    "ends_lost": "are truncated at max_length {} and lose the end of an answer",
    "untrained": "are left out of training",
}
STREAMED = (
    "rows are streamed, so lorafold does not check them for duplicates, held-out rows, empty"
    " answers, contradictions or truncated answers"
)
UNKNOWN = "the objective's examples are not in a table, so lorafold does not check them"
TEXT_BESIDE_CALL, OTHER = "probe beside", "probe other value"
CALLS = [*TOOL_CALL["tool_calls"], tool_call(PROBE_NAME, {PROBE_KEY: OTHER}) | {"id": "probe0001"}]
ROLES = {"", "system", "user", "assistant", "model", "human"}
WORDS = re.compile(r"[^\W\d_]{2,}")
NO_REASONING = "turns without reasoning are left out, because at generation they begin differently"
MAX_QUOTED = 60  # characters of the template's system prompt that are shown


@dataclass(frozen=True)
class TemplateSummary:
    """The behaviour of a chat template. `end` is the end of a turn, `ended` is `Ending.written`,
    `prompt` describes reasoning in the generation prompt, `system` is the default system prompt,
    `hides` lists parts that are not rendered, and `plain` is the reason if plain turns can't be
    trained.
    """

    end: str
    ended: str
    prompt: str
    system: str
    dated: bool
    hides: tuple[str, ...]
    plain: str = ""

    @property
    def lines(self) -> list[str]:
        end = f"turns end with {self.end}"
        if self.ended == NOWHERE and self.end:
            end = f"turns have no end token: training adds {self.end} (unless --end-of-turn none)"
        elif self.ended == NOWHERE:
            end = "turns have no end token, and the tokenizer has no EOS token to end generation"
        elif self.ended != WITH_TURN:
            end += ", which the template writes only before the next message"
        remarks = {
            end: True,
            f"the generation prompt {self.prompt}": self.prompt,
            f"the default system message is {self.system!r}": self.system,
            "the template inserts today's date": self.dated,
            f"the template does not render {', '.join(self.hides)}": self.hides,
            self.plain: self.plain,
        }
        return [line for line, applies in remarks.items() if applies]


def describe_template(tokenizer: PreTrainedTokenizerBase) -> TemplateSummary:
    template, block = template_of(tokenizer), template_of(tokenizer).block
    without_prompt = try_apply([USER], tokenizer)
    added = try_apply([USER], tokenizer, for_generation=True)
    added, prompt = added.removeprefix(without_prompt.rstrip()).strip(), ""
    if added.endswith(block.opening):
        prompt = f"opens a reasoning block ({block.opening})"
    elif block.opening in added and block.closing in added:
        prompt = f"has an empty reasoning block ({block.opening}{block.closing})"
    # words before the first message, except role names
    before = template.specials.sub("\n", without_prompt.partition(str(USER["content"]))[0])
    lines = (line.strip() for line in before.splitlines())
    system = " ".join(line for line in lines if line.strip("#: ").lower() not in ROLES)
    if len(WORDS.findall(system)) < 3:
        system = ""
    elif len(system) > MAX_QUOTED:
        system = f"{system[:MAX_QUOTED].rstrip()}..."
    beside, two_calls = (
        try_apply([USER, ASSISTANT | {"content": content, "tool_calls": calls}], tokenizer)
        for content, calls in ((TEXT_BESIDE_CALL, CALLS[:1]), ("", CALLS))
    )
    may_think = not block.shown and re.search(THINKS, template.text)
    kwargs = reasoning_kwargs(template) if may_think else ""
    shows = {
        "system messages": PROBE_TEXT in try_apply([SYSTEM, USER], tokenizer),
        "tools": template_of(tokenizer, [PROBE_TOOL]).shows_tools,
        "tool calls": template.shows_calls,
        "text next to a tool call": TEXT_BESIDE_CALL in beside or not template.shows_calls,
        "a second tool call": OTHER in two_calls or not template.shows_calls,
        f"reasoning{kwargs and f' ({kwargs} renders it)'}": block.shown,
    }
    plain = _untrained_reason(tokenizer)
    if plain and (kwargs := helpful_kwargs(tokenizer, lambda other: not _untrained_reason(other))):
        plain += f"; {kwargs} helps"
    hides = tuple(part for part, is_shown in shows.items() if not is_shown)
    end = template.ending
    return TemplateSummary(
        end.text.strip(), end.written, prompt, system, bool(date_used(tokenizer)), hides, plain
    )


def _untrained_reason(tokenizer: PreTrainedTokenizerBase) -> str:
    answer = {"role": "assistant", "content": PROBE_TEXT}
    try:
        return NO_REASONING * render_trained(Conversation([USER, answer]), tokenizer).left_out
    except LorafoldError as error:
        return f"the template rejects a plain conversation ({error})"


@dataclass(frozen=True)
class DataFinding:
    count: int
    of: int
    text: str
    first: tuple[tuple[RowPlace, RowPlace | None], ...] = ()

    def __str__(self) -> str:
        more = f" and {self.count - len(self.first):,} more" if self.count > len(self.first) else ""
        rows = []
        for name, (one, other) in zip(row_names(p for p, _ in self.first), self.first, strict=True):
            rows.append(name if other is None else f"{name} (see {[*row_names([one, other])][1]})")
        return f"{self.count:,} of {self.of:,} rows {self.text}: {', '.join(rows)}{more}"


@dataclass(frozen=True)
class Findings:
    """The results by name in PROBLEMS, the number of examples per label, (turns, trained turns) per
    role, files with assistant turns of which none is trained, the skipped checks, and the most user
    turns in a row.
    """

    rows: int
    found: Mapping[str, DataFinding] = field(default_factory=dict)
    labels: Mapping[str, int] = field(default_factory=dict)
    roles: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    silent: Mapping[str, int] = field(default_factory=dict)
    unseen: str = ""
    turns: int = 0

    @property
    def lines(self) -> list[str]:
        lines = [f"data: {self.unseen}"] * bool(self.unseen)
        for name, one in self.found.items():
            if one.count:
                lines.append(f"{'held out' if name == HELD_OUT else 'data'}: {one}")
        if missing := [label for label, count in self.labels.items() if not count]:
            there = ", ".join(f"{label} {n:,}" for label, n in self.labels.items() if n)
            lines.append(f"data: no row has the label {' or '.join(missing)} ({there})")
        for file, turns in self.silent.items():
            lines.append(f"data: {file}: none of its {turns:,} assistant turns is trained on")
        return lines

    @property
    def nothing(self) -> str:
        names = ", ".join(name.replace("_", " ") for name in self.found)
        return f"no problems found (checked: {names})"

    def as_json(self) -> dict[str, Any]:
        """Returns the results as JSON, in which null marks a skipped check."""
        results = dict.fromkeys(PROBLEMS)
        for name, of in self.found.items():
            first = [
                one._asdict() | ({"as": other._asdict()} if other else {})
                for one, other in of.first
            ]
            results[name] = {"rows": of.count, "of": of.of, "first": first}
        return {
            "rows": self.rows,
            **results,
            "labels": dict(self.labels),
            "roles": {role: {"turns": n, "trained": t} for role, (n, t) in self.roles.items()},
            "untrained_files": dict(self.silent),
            "not_looked_at": self.unseen,
        }


def find_problems(
    examples: Sequence[Any],
    rows: Rows,
    max_length: int,
    held_out: tuple[Sequence[Any], Rows] | None = None,
) -> Findings:
    if not isinstance(examples, TableExamples):
        return Findings(len(rows), unseen=UNKNOWN)
    of, digests = _row_digests(examples)
    unique, at, which = np.unique(digests, return_index=True, return_inverse=True)
    first = at[which]  # index of the first equal row
    later = first != np.arange(len(first))
    results = {"duplicates": _finding("duplicates", rows, of[later], of[first[later]])}
    if held_out is not None and isinstance(held_out[0], TableExamples):
        held_rows, held_digests = _row_digests(held_out[0])
        near = np.minimum(np.searchsorted(unique, held_digests), len(unique) - 1)
        is_known = unique[near] == held_digests
        shared = of[at[near[is_known]]]
        results[HELD_OUT] = _finding(HELD_OUT, held_out[1], held_rows[is_known], shared, like=rows)
    roles, silent, empty, most = turns_of(examples, rows)
    if roles:
        results["empty_answers"] = _finding("empty_answers", rows, empty)
    if judgements := examples.judgements:
        # rows whose verdict differs from the first verdict on the same subject
        _, at, which = np.unique(judgements.subjects, return_index=True, return_inverse=True)
        other = judgements.verdicts != judgements.verdicts[at[which]]
        contradiction = examples.rows[other], examples.rows[at[which][other]]
        results["contradictions"] = _finding(
            "contradictions", rows, *contradiction, about=judgements.contradiction
        )
    if examples.ends_lost is not None:
        cut = examples.rows[examples.ends_lost]
        results["ends_lost"] = _finding("ends_lost", rows, cut, about=max_length)
    results["untrained"] = _finding("untrained", rows, np.setdiff1d(np.arange(len(rows)), of))
    labels = judgements.labels if judgements else {}
    return Findings(len(rows), results, labels, roles, silent, turns=most)


def _row_digests(examples: TableExamples[Any]) -> tuple[Array, Array]:
    """Returns the ascending indices of rows that have examples (n,), and their digests (n,)."""
    starts = np.flatnonzero(np.diff(examples.rows, prepend=-1))
    position = np.arange(len(examples)) - np.repeat(starts, np.diff([*starts, len(examples)]))
    hashes = hash_rows(*examples.compared_by)[examples.indices]
    weighted = hashes.astype(np.uint64) * (2 * position + 1).astype(np.uint64)
    return examples.rows[starts], np.add.reduceat(weighted, starts)


def _finding(
    name: str,
    rows: Rows,
    indices: Array,
    others: Array | None = None,
    like: Rows | None = None,
    about: Any = "",
) -> DataFinding:
    text = PROBLEMS[name].format(about)
    chosen, at = np.unique(indices, return_index=True)
    if not len(chosen):
        return DataFinding(0, len(rows), text)
    first = rows.origins.places(chosen[:MAX_SHOWN])
    compared: list[Any] = [None] * len(first)
    if others is not None:
        compared = (like or rows).origins.places(others[at[:MAX_SHOWN]])
    return DataFinding(len(chosen), len(rows), text, tuple(zip(first, compared, strict=True)))


def turns_of(
    examples: TableExamples[Any], rows: Rows
) -> tuple[dict[str, tuple[int, int]], dict[str, int], Array, int]:
    """Returns `Findings.roles`, `Findings.silent`, the indices of rows with an empty answer, and
    `Findings.turns`.
    """
    table = examples.table
    if TURNS not in table.column_names:
        return {}, {}, np.zeros(0, np.int64), 0
    texts = [text for chunk in table.column(TURNS).chunks for text in chunk.to_pylist()]
    of = column(table, "row")
    names, file = [""], np.zeros(len(rows), np.int64)
    if len({name for name, *_ in rows.origins.runs}) > 1:
        names, file = rows.origins.files(len(rows))
    turns, trained, empty = Counter[str](), Counter[str](), set[str]()
    answers, learned = Counter[int](), Counter[int]()  # of the assistant, by file
    for (text, number), count in Counter(zip(texts, file[of].tolist(), strict=True)).items():
        for line in text.splitlines():
            suffix = next((end for end in (TRAINED, EMPTY) if line.endswith(end)), "")
            role = line.removesuffix(suffix)
            turns[role] += count
            trained[role] += count * bool(suffix)
            if suffix == EMPTY:
                empty.add(text)
            if role == "assistant":
                answers[number] += count
                learned[number] += count * bool(suffix)
    roles = {role: (n, trained[role]) for role, n in turns.items()}
    silent = {names[n]: answers[n] for n in sorted(answers) if not learned[n] and len(names) > 1}
    most = max((text.splitlines().count("user") for text in set(texts)), default=0)
    return roles, silent, of[[text in empty for text in texts]], most
