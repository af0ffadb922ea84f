"""Exports a whole model for Ollama: a GGUF file, and a Modelfile with its chat template.

Since 0.34.1, Ollama rejects a Modelfile with ADAPTER (ollama#14969), so adapters are merged.
Ollama's templates use Go's template language, so the chat template is converted: `detect_turns`
renders chats with the probes S, u and a (system, user and assistant message), and finds the text
around them:

    system given     before S between u a_open a u_open u ... end
    none given       start            u a_open a u_open u ... end

These texts come from three renderings and are then checked on every conversation of `PROBE_CHATS`.
`system_last` means that the template writes the system message into the last user turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lorafold.data.chat_template import template_of
from lorafold.data.messages import Message
from lorafold.data.render import ensure_chat_template, render
from lorafold.engine.kv_cache import common_length
from lorafold.errors import LorafoldError, truncate_middle
from lorafold.exporting.target import ExportedFiles, Progress, Subject
from lorafold.exporting.to_gguf import GgufModel, model_file, write_file

S, U, A, V = "probe rule", "probe question", "probe answer", "probe second"
ROLES = {"s": "system", "u": "user", "a": "assistant"}
PROBE_CHATS = ("u", "su", "uau", "suau", "uauau", "suauau")
PROBE_CONTENTS = (
    "Line one.\nLine two: {{ 3 }} \"x\" 'y' <b>",
    "Grüße, 世界 🚀 & 100%",
    "What is 12 + 30?",
    "{% if x %} \\n $y",
    "No.",
    "And then?",
)


@dataclass(frozen=True)
class Turns:
    """The text that a chat template writes around messages, named as at the top of this module.
    `system` is None for a template without system messages.
    """

    start: str
    system: tuple[str, str] | None
    a_open: str
    u_open: str
    end: str
    system_last: bool = False

    def text(self, messages: Sequence[Message]) -> str:
        first = messages[0]["content"] if messages[0]["role"] == "system" else None
        texts = [str(m["content"]) for m in messages if m["role"] != "system"]
        before, between = self.system or ("", "")
        if self.system_last and first is not None:
            texts[-1] = f"{before}{first}{between}{texts[-1]}"
        opening = self.start if self.system_last or first is None else f"{before}{first}{between}"
        parts = [opening, texts[0]]
        for n, text in enumerate(texts[1:], 1):
            parts += [self.a_open if n % 2 else self.u_open, text]
        return "".join([*parts, self.end])


def detect_turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    def rendered(messages: Sequence[Message]) -> str:
        return render(messages, tokenizer, for_generation=True)

    start, end = _split_around(rendered(_chat("u", [U])), [U])
    _, a_open, u_open, _ = _split_around(rendered(_chat("uau", [U, A, V])), [U, A, V])
    with_system, candidates = "", [Turns(start, None, a_open, u_open, end)]
    with suppress(LorafoldError):  # templates may reject system messages
        with_system = rendered(_chat("su", [S, U]))
    if S in with_system:
        before, between, _ = _split_around(with_system, [S, U])
        candidates = [Turns(start, (before, between), a_open, u_open, end)]
        if before.startswith(start):
            late = (before.removeprefix(start), between)
            candidates.append(Turns(start, late, a_open, u_open, end, system_last=True))
    wrong = []
    for turns in candidates:
        wrong.append(_first_difference(turns, rendered))
        if not wrong[-1]:
            return turns
    raise LorafoldError(
        f"the model's chat template can't be converted for Ollama: the conversion differs at"
        f" {wrong[0]}; use --to gguf-model, whose file has the original template"
    )


def lost_feature_notes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    template = str(tokenizer.chat_template)
    notes = []
    if lost := [feature for feature, word in EXTRA_FEATURES.items() if re.search(word, template)]:
        notes.append(
            "the Ollama template supports plain chat only; the model's own also supports"
            f" {' and '.join(lost)}"
        )
    spaced = f" {U} "
    if spaced not in render(_chat("u", [spaced]), tokenizer, for_generation=True):
        notes.append("the model's chat template strips whitespace around messages; Ollama's can't")
    if re.search(r"strftime_now\s*\(", template):
        notes.append("the model's chat template has the current date; Ollama's keeps the export's")
    return notes


EXTRA_FEATURES = {"tools": r"\btools\b", "reasoning": r"reasoning_content|enable_thinking|<think>"}


def _chat(roles: str, contents: Sequence[str]) -> list[Message]:
    return [{"role": ROLES[r], "content": text} for r, text in zip(roles, contents, strict=True)]


def _split_around(text: str, contents: Sequence[str]) -> list[str]:
    parts = []
    for content in contents:
        before, mark, text = text.partition(content)
        if not mark or content in text:
            raise LorafoldError(
                "the model's chat template does not render each message of a plain chat exactly"
                " once and in order; use --to gguf-model, whose file has the original template"
            )
        parts.append(before)
    return [*parts, text]


def _first_difference(turns: Turns, rendered: Callable[[Sequence[Message]], str]) -> str:
    """A description of the first probe chat that `turns` does not reproduce, or ""."""
    for roles in PROBE_CHATS:
        if roles.startswith("s") and turns.system is None:
            continue
        chat = _chat(roles, PROBE_CONTENTS[: len(roles)])
        by_marks = turns.text(chat)
        if (text := rendered(chat)) != by_marks:
            at, chat_of_roles = common_length(text, by_marks), "-".join(ROLES[r] for r in roles)
            part = truncate_middle(repr(text[max(at - 20, 0) : at + 20]), 60)
            return f"{part} in a {chat_of_roles} chat"
    return ""


QUOTES = '"""'
SYSTEM = "%(before)s{{ $.System }}%(between)s"
LATE = "{{ if and $last $.System }}" + SYSTEM + "{{ end }}"
MESSAGES = (
    "{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
    '{{ if eq $m.Role "user" }}LATE{{ $m.Content }}{{ if $last }}%(end)s{{ end }}'
    '{{ else if eq $m.Role "assistant" }}%(a_open)s{{ $m.Content }}'
    "{{ if not $last }}%(u_open)s{{ end }}{{ end }}{{ end }}"
)
MODELFILE = "Modelfile"


def go_template(turns: Turns) -> str:
    before, between = turns.system or ("", "")
    marks = {name: mark for name, mark in vars(turns).items() if isinstance(mark, str)}
    # in Go templates, only the opening of an action needs escaping
    marks |= {"before": before, "between": between}
    marks = {name: mark.replace("{{", '{{ "{{" }}') for name, mark in marks.items()}
    late, start = (LATE if turns.system_last else ""), "%(start)s"
    if turns.system is not None and not turns.system_last:
        start = f"{{{{ if .System }}}}{SYSTEM}{{{{ else }}}}%(start)s{{{{ end }}}}"
    return (start + MESSAGES.replace("LATE", late)) % marks


def modelfile(weights: str, template: str, stops: Sequence[str]) -> str:
    for text in (template, *stops):
        odd = [c for c in text if not c.isprintable() and c not in "\n\t"]
        if QUOTES in text or odd:
            shown = QUOTES if QUOTES in text else repr(odd[0])
            raise LorafoldError(
                f"the model's chat template has {shown}, which a Modelfile can't contain; use --to"
                " gguf-model, whose file has the original template"
            )
    ends = "".join(f"PARAMETER stop {QUOTES}{stop}{QUOTES}\n" for stop in stops)
    return f"FROM ./{weights}\nTEMPLATE {QUOTES}{template}{QUOTES}\n{ends}"


def convert_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str], list[str]]:
    ensure_chat_template(tokenizer)
    turns, notes = detect_turns(tokenizer), lost_feature_notes(tokenizer)
    if turns.system is None:
        notes.append("the model's chat template, and so Ollama's, ignores system messages")
    bos = str(tokenizer.bos_token or "")
    if bos and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:  # the engine adds it
        system = turns.system and (turns.system[0].removeprefix(bos), turns.system[1])
        turns = replace(turns, start=turns.start.removeprefix(bos), system=system)
    ending = template_of(tokenizer).ending
    ids = [*sorted(ending.tokens), tokenizer.eos_token_id]
    stops = [str(tokenizer.convert_ids_to_tokens(i)) for i in ids if i is not None]
    if not ending.tokens and ending.text.strip():
        stops.append(ending.text)
    return go_template(turns), list(dict.fromkeys(stops)), notes


class ToOllama(GgufModel):
    name = "ollama"

    def problems(self, subject: Subject) -> Sequence[str]:
        if reasons := super().problems(subject):
            return reasons
        template, stops, _ = convert_template(subject.tokenizer)
        modelfile(model_file(subject.tensors), template, stops)
        return []

    def write(self, subject: Subject, directory: Path, progress: Progress) -> ExportedFiles:
        template, stops, notes = convert_template(subject.tokenizer)
        file = model_file(subject.tensors)
        text = modelfile(file, template, stops)
        notes = [*write_file(subject, directory, progress), *notes]
        (directory / MODELFILE).write_text(text, encoding="utf-8")
        name = (subject.adapter_name or Path(subject.base.name).name).lower()
        name = re.sub(r"[^a-z0-9_-]", "-", name).strip("-_")[:80] or "model"
        launch = (("ollama", "create", name, "-f", f"{{out}}/{MODELFILE}"), ("ollama", "run", name))
        if subject.adapters:
            notes.insert(
                0,
                "the adapters are merged into the model, because Ollama since 0.34.1 rejects"
                " ADAPTER in a Modelfile",
            )
        return ExportedFiles((MODELFILE, file), launch, notes, {"base": f"{{out}}/{file}"})
