"""`lorafold chat`: what the model sees of a conversation, who answers, and what goes where."""

import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafold as lf
from conftest import lorafold
from fresh_models import fresh_model
from lorafold.conversation import Chat, unique_names
from lorafold.data.render import render
from lorafold.data.rows import read_rows
from lorafold.engine import Sampling
from lorafold.errors import LorafoldError
from lorafold.generation import end_tokens
from lorafold.models.tokenizer import load_tokenizer

USER, ASSISTANT = "user", "assistant"
BOTH = ("on_model_first", "on_model_second")


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


@pytest.fixture(scope="module")
def adapters(tiny_model_dir, tmp_path_factory: Any) -> list[Path]:
    """Two adapters of the tiny llama that answer unlike the base and each other."""
    paths = [tmp_path_factory.mktemp("adapters") / name for name in ("first", "second")]
    for seed, path in enumerate(paths):
        adapter = lf.attach(fresh_model(tiny_model_dir("llama")), lf.LoRA(rank=4))
        draw = torch.Generator().manual_seed(seed)
        for p in adapter.parameters():
            p.data.normal_(generator=draw)
        adapter.save(path)
    return paths


@pytest.fixture
def made(tiny_model, adapters: list[Path]) -> Callable[[], Any]:
    """Makes the tiny model with both adapters active on it."""

    def make() -> Any:
        model = tiny_model("llama")
        for path in adapters:
            lf.load(model, path, name=f"on_model_{path.name}")
        return model

    return make


@pytest.fixture
def chat(made: Callable[[], Any], tiny_model_dir, adapters: list[Path]) -> Iterator[Chat]:
    names = {path.name: f"on_model_{path.name}" for path in adapters}
    tokenizer = load_tokenizer(tiny_model_dir("llama"))
    with Chat(made(), tokenizer, names, max_new_tokens=6) as chat:
        yield chat


@pytest.fixture
def alone(made: Callable[[], Any], tiny_model_dir) -> Callable[..., str]:
    """The answer to a whole conversation under the adapters of these names on the model, by another
    model and transformers' own `generate`.
    """
    model, tokenizer = made(), load_tokenizer(tiny_model_dir("llama"))

    def answer(messages: list[dict[str, str]], *names: str) -> str:
        prompt = render(messages, tokenizer, for_generation=True)
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
        how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
        with lf.only(model, *names):
            out = model.generate(ids, **how, eos_token_id=[*end_tokens(model, tokenizer)])
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    return answer


def talk(chat: Chat, text: str) -> str:
    """Ask, and keep what the last speaker answers."""
    turn = chat.ask(text)
    answer = ["".join(chat.answer(turn, names)) for names in chat.speakers()][-1]
    chat.keep(turn, answer)
    return answer


def test_each_answer_is_the_models_own_to_all_that_was_said(chat: Chat, alone: Any) -> None:
    chat.system = "Be brief."
    messages = [said("system", "Be brief.")]
    for text in ("a table for four", "rain", "six"):
        messages.append(said(USER, text))
        answer = talk(chat, text)
        assert answer == alone(messages, *BOTH)
        messages.append(said(ASSISTANT, answer))
    assert chat.conversation() == messages
    chat.reset()
    assert chat.conversation() == messages[:1]
    assert talk(chat, "rain") == alone([messages[0], said(USER, "rain")], *BOTH)


def test_each_question_starts_afresh_with_an_adapter_of_single_questions(
    made: Any, tiny_model_dir: Any, alone: Any, tmp_path: Path
) -> None:
    names = dict(zip(("first", "second"), BOTH, strict=True))
    tokenizer = load_tokenizer(tiny_model_dir("llama"))
    with Chat(made(), tokenizer, names, single=["second"], max_new_tokens=6) as chat:
        for text in ("a table for four", "six"):
            assert talk(chat, text) == alone([said(USER, text)], *BOTH)
        chat.save(tmp_path / "rows.jsonl")
        chat.continued = True  # from the last question on
        messages = [*chat.messages[-2:], said(USER, "rain")]
        answer = talk(chat, "rain")
        assert answer == alone(messages, *BOTH)
        chat.continued = False
        chat.switch("first")  # was trained on conversations
        messages += [said(ASSISTANT, answer), said(USER, "snow")]
        assert talk(chat, "snow") == alone(messages, "on_model_first")
    rows = read_rows(str(tmp_path / "rows.jsonl"))
    assert [row["messages"][0]["content"] for row in rows] == ["a table for four", "six"]
    assert {len(row["messages"]) for row in rows} == {2}


def test_switching_chooses_who_answers_and_leaves_the_model_as_it_was(chat, alone) -> None:
    names = {"first": BOTH[:1], "second": BOTH[1:], "none": (), "all": BOTH}
    answers = {}
    for name, attached in names.items():
        chat.reset()
        chat.switch(name)
        answers[name] = talk(chat, "book a table")
        assert answers[name] == alone([said(USER, "book a table")], *attached)
    assert len(set(answers.values())) == 4, "they must differ for this to test anything"
    with pytest.raises(LorafoldError, match="adapter third, expected one of none, all, first"):
        chat.switch("third")
    ids = torch.tensor([[5, 6, 7]])
    before = chat.model(ids).logits
    unfinished = chat.answer(chat.ask("rain"), ())
    next(unfinished)
    unfinished.close()
    assert torch.equal(chat.model(ids).logits, before)


def test_a_closed_chat_gives_the_model_back(chat: Chat, made: Callable[[], Any]) -> None:
    model, untouched = chat.model, made()
    ids, answer = torch.tensor([[5, 6, 7]]), chat.answer(chat.ask("rain"), chat.active)
    next(answer)
    chat.close()
    answer.close()
    assert torch.equal(model(ids).logits, untouched(ids).logits)
    with lf.only(model), lf.only(untouched):
        assert torch.equal(model(ids).logits, untouched(ids).logits)
    kinds = ({path: type(m) for path, m in one.named_modules()} for one in (model, untouched))
    assert next(kinds) == next(kinds)


def test_a_chat_that_nobody_closes_is_closed_when_it_is_collected(made: Any, chat: Chat) -> None:
    model, untouched, ids = made(), made(), torch.tensor([[5, 6, 7]])
    left = Chat(model, chat.tokenizer, {})
    answer = left.answer(left.ask("rain"), left.active)
    next(answer)
    del left, answer
    gc.collect()
    assert {type(m) for m in model.modules()} == {type(m) for m in untouched.modules()}
    assert torch.equal(model(ids).logits, untouched(ids).logits)


def test_both_goes_on_with_the_adapters_answer(chat: Chat, alone: Callable[..., str]) -> None:
    chat.switch("first")
    chat.both = True
    assert chat.speakers() == [(), ("first",)]
    answer = talk(chat, "rain")
    assert answer == alone([said(USER, "rain")], "on_model_first")
    assert answer != alone([said(USER, "rain")])
    chat.switch("none")
    assert chat.speakers() == [()]


def test_old_turns_leave_when_the_context_is_full_and_the_system_message_stays(chat: Chat) -> None:
    chat.system = "Remember the lantern."
    dropped = 0
    for number in range(40):
        text = f"question {number}: is there a table for four at the Copper Lantern?"
        turn = chat.ask(text)
        dropped += turn.dropped
        tokens = len(chat.tokenizer(turn.prompt, add_special_tokens=False).input_ids)
        assert tokens + 6 <= 512
        assert turn.room == 6
        assert "Remember the lantern." in turn.prompt
        assert turn.prompt.count("question") == number - dropped + 1
        if turn.dropped:
            whole = [*chat.conversation()[:1], *chat.messages[turn.first - 2 :], said(USER, text)]
            longer = render(whole, chat.tokenizer, for_generation=True)
            assert len(chat.tokenizer(longer, add_special_tokens=False).input_ids) + 6 > 512
        chat.keep(turn, "yes, there is a table for four")
    assert 0 < dropped < 40
    assert len(chat.conversation()) == 81


def test_an_answer_gets_what_the_context_has_left_and_a_longer_message_is_refused(chat) -> None:
    chat.max_new_tokens = 400
    turn = chat.ask("x" * 300)
    tokens = len(chat.tokenizer(turn.prompt, add_special_tokens=False).input_ids)
    assert turn.room == 512 - tokens < 400
    with pytest.raises(LorafoldError, match="expected fewer than the model's context length, 512"):
        chat.ask("x" * 600)
    assert chat.messages == []


def test_sampled_answers_repeat_by_seed_and_differ_from_turn_to_turn(chat: Chat) -> None:
    chat.sampling = Sampling(temperature=3.0, seed=7)
    first = [talk(chat, "rain"), talk(chat, "rain")]
    chat.reset()
    assert [talk(chat, "rain"), talk(chat, "rain")] == first
    assert first[0] != first[1]


def test_saved_conversations_are_rows_that_train_reads(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    with pytest.raises(LorafoldError, match="the conversation is empty"):
        chat.save(file)
    talk(chat, "über \N{GRINNING FACE}")
    assert chat.save(file) == 1
    chat.reset()
    chat.system = "Be brief."
    talk(chat, "rain")
    assert chat.save(file) == 2
    rows = read_rows(str(file))
    assert [len(row["messages"]) for row in rows] == [2, 3]
    assert rows[1]["messages"] == chat.conversation()
    with pytest.raises(LorafoldError, match=r"ends in \.jsonl"):
        chat.save(tmp_path / "talks.txt")


@pytest.mark.parametrize("text", ["no json\n", '{"text": "a row of another shape"}\n'])
def test_saving_over_what_holds_no_conversations_leaves_it_alone(text: str, chat, tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    talk(chat, "rain")
    with pytest.raises(LorafoldError, match=r"rows\.jsonl"):
        chat.save(file)
    assert file.read_text() == text
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_names_are_unique_and_never_words_that_mean_something_else() -> None:
    paths = ["a/sql", "b/sql/", "sql-2", "none", "x/all", "base", "c/sql"]
    names = unique_names(paths)
    assert names == ["sql", "sql-2", "sql-2-2", "none-2", "all-2", "base-2", "sql-3"]


def begin(model: Path, *arguments: str, **options: Any) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "lorafold", "chat", "--model", str(model)]
    return subprocess.Popen(
        [*command, "--storage", "fp32", "--device", "cpu", *arguments],
        stdin=options.pop("stdin", subprocess.PIPE), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # where the tests run in the background it is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,
    )  # fmt: skip


def test_the_command_answers_piped_lines_and_keeps_notices_off_stdout(
    alone: Any, adapters: list[Path], tiny_model_dir, tmp_path: Path, monkeypatch
) -> None:
    lines = [
        "/adapter", "rain", "", "/adapter second", "/no-such-command", "/reset now", "/both",
        "//six", f"/save {tmp_path / 'talk.jsonl'}", "/new", "/system Be brief.", "/both",
        "/adapter none", "/both", "rain", "/help", "/quit", "never read",
    ]  # fmt: skip
    of_adapters = [argument for path in adapters for argument in ("--adapter", str(path))]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    model = ("--model", str(tiny_model_dir("llama")), "--storage", "fp32", "--device", "cpu")
    code, out, err = lorafold("chat", *model, *of_adapters, "--max-new-tokens", "6", "--json")
    assert code == 0, err
    messages = [said(USER, "rain")]
    stacked = alone(messages, *BOTH)
    messages += [said(ASSISTANT, stacked), said(USER, "/six")]
    of_base, of_second = alone(messages), alone(messages, "on_model_second")
    messages.append(said(ASSISTANT, of_second))
    last = [said("system", "Be brief."), said(USER, "rain")]
    bare = alone(last)
    *answers, result = out.rsplit("\n", 2)[:-1]
    assert answers == [f"{stacked}\n[base] {of_base}\n[second] {of_second}\n{bare}"]
    assert json.loads(result) == {"messages": [*last, said(ASSISTANT, bare)], "adapters": []}
    assert read_rows(str(tmp_path / "talk.jsonl")) == [{"messages": messages}]
    notices = [
        "answering: first + second\n",
        "* first\n* second\n  none (only the base model)\n",
        "answering: second\n",
        "error: unknown command /no-such-command; /help lists the commands",
        "error: /reset: found 'now', expected no argument\n",
        "error: /both: no adapter is active",
        "(stopped at the limit of 6 tokens)\n",
        "/save FILE ",
    ]
    assert [text for text in notices if text not in err] == []
    assert err.count("error:") == 3


@pytest.mark.usefixtures("unestimated")
@pytest.mark.parametrize("questions", [1, 2])
def test_the_command_says_when_each_question_starts_afresh(
    questions: int, tiny_model_dir: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tiny_model_dir("llama"), tmp_path / "out"
    turns = [said(USER, "rain"), said(ASSISTANT, "no")] * questions
    recipe = lf.Recipe(steps=1, storage="fp32", max_length=64)
    lf.train(recipe, model=model, data=[{"messages": turns}, {"messages": turns[:2]}], out=out)
    lines = io.BytesIO(b"six\n/continue\n/continue\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines))
    limited = ("--storage", "fp32", "--max-new-tokens", "2")
    code, _, err = lorafold("chat", "--model", str(model), "--adapter", str(out), *limited)
    assert code == 0, err
    afresh = "the adapter was trained on single questions, so each question starts"
    assert [err.count(text) for text in (afresh, "the conversation continues")] == {
        1: [2, 1],
        2: [0, 2],
    }[questions]


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_at_the_prompt_leaves_with_130(tiny_model_dir) -> None:
    process = begin(tiny_model_dir("llama"), "--max-new-tokens", "450")
    assert process.stdin and process.stdout and process.stderr  # noqa: PT018
    process.stdin.write(b"rain\n")
    process.stdin.flush()
    assert process.stdout.read(1)  # it has begun to answer
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if line == b"(stopped)\n":
            break
    else:
        pytest.fail("the answer was not stopped")
    process.stdin.write(b"/system\n")
    process.stdin.flush()
    assert process.stderr.readline() == b"system message: not set\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_in_a_terminal_lines_are_prompted_for_and_ctrl_d_ends(tiny_model_dir) -> None:
    import pty

    ours, theirs = pty.openpty()
    process = begin(tiny_model_dir("llama"), "--max-new-tokens", "2", stdin=theirs)
    os.close(theirs)
    os.write(ours, b"rain\n\x04")
    out, err = process.communicate(timeout=120)
    os.close(ours)
    assert process.returncode == 0
    assert out.endswith(b"\n")
    assert re.search(rb"^> /help lists the commands; Ctrl-D exits\n> ", err, re.MULTILINE)


@pytest.mark.slow
def test_input_that_is_not_utf8_is_named(tiny_model_dir) -> None:
    process = begin(tiny_model_dir("llama"))
    _, err = process.communicate(b"/system\n\xff\xfe\n", timeout=120)
    assert process.returncode == 2
    assert err.endswith(b"error: stdin: line 2 is not valid UTF-8\n")
    assert b"Traceback" not in err
