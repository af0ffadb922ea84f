"""User data to token ids and loss mask: shapes and their errors, chat templates, spans, order."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conversation_cases import jsonl as rows_in
from conversation_cases import prompts, trained_texts
from error_cases import refusal as refused
from error_cases import told_of
from lorafold.api.arguments import as_rows
from lorafold.data.batches import Batches, split
from lorafold.data.examples import NO_LOSS, encode, preview
from lorafold.data.formats import Conversation, format_of
from lorafold.data.render import ensure_chat_template
from lorafold.data.row_sources import Reading
from lorafold.data.rows import read_rows
from lorafold.recipe.recipe import Recipe

CHAT = {
    "messages": [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Hi!\nWhat now? "},
        {"role": "user", "content": "Say naïve 🙂"},
        {"role": "assistant", "content": "naïve 🙂"},
    ]
}
PAIR = {"prompt": "Hello there", "completion": "Hi you", "label": 3}
THOUGHTFUL = (  # as reasoning models do it: the thoughts of all turns but the last are dropped
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}<think>{{"
    " m.reasoning_content or '' }}</think>{% endif %}{{ m.content }}<e>\n{% endfor %}{% if"
    " add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{"
    " m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<e>\n{% endfor %}{% if"
    " add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def smollm2(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def plain():
    """A byte-level BPE tokenizer without template, which adds a BOS of its own."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    chat = "User: Hello there\n\nAssistant: Hi you\n\n"
    alphabet = inner.pre_tokenizer.alphabet()
    inner.train_from_iterator(
        [chat, "one two three\n\n\n", "the cat sat on the mat"] * 3,
        trainers.BpeTrainer(
            vocab_size=340, special_tokens=["<s>", "</s>", "<e>"], initial_alphabet=alphabet
        ),
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<e>"]
    )


def jsonl(tmp_path: Path, *rows: object) -> str:
    return rows_in(tmp_path / "rows.jsonl", *rows)


def trained(example, tokenizer) -> list[str]:
    return trained_texts([example], tokenizer)


# reading


@pytest.mark.parametrize(
    "row",
    [CHAT, PAIR, {"text": "the cat"},
     {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:2]}],
)  # fmt: skip
def test_every_shape_is_read(tmp_path, row):
    assert read_rows(jsonl(tmp_path, row, "", row)) == [row, row]
    (tmp_path / "rows.json").write_text(json.dumps([row, row], indent=1))
    assert read_rows(str(tmp_path / "rows.json")) == [row, row]


def test_parquet_and_directories(tmp_path):
    from datasets import Dataset

    dataset = Dataset.from_list([PAIR, PAIR])
    dataset.to_parquet(str(tmp_path / "rows.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    dataset.to_parquet(str(tmp_path / "folder" / "train.parquet"))
    for name in ("rows.parquet", "saved", "folder"):
        assert read_rows(str(tmp_path / name)) == [PAIR, PAIR]


def test_bad_rows_are_told_together_by_line(tmp_path):
    bad: dict[str, dict] = {
        "keys found: 'question', 'answer'; expected one of {messages}, {prompt, completion} and 9"
        " more; did you mean --columns prompt=question,completion=answer":
            {"question": "a", "answer": "b"},
        "row 2: field messages[0].content: found null, expected text; row 2: field messages[1]:"
        " found 3, expected an object with role and content":
            {"messages": [{"role": "user", "content": None}, 3]},
        "row 2: format {prompt, completion}, but row 1 has {messages}": PAIR,
        "row 2: field messages: found an empty list, expected a list of messages": {"messages": []},
    }  # fmt: skip
    source = jsonl(tmp_path, CHAT, "", '{"messages": [', "[1]", *bad.values())
    message = refused(read_rows, source)
    assert message.startswith(f"{source}: row 3: not JSON: ")
    assert "row 4: found a list, expected an object" in message
    assert "and 5 more" in message
    for part, row in bad.items():
        assert part in refused(read_rows, jsonl(tmp_path, CHAT, row))


def test_many_bad_rows_are_counted(tmp_path):
    message = refused(read_rows, jsonl(tmp_path, *({"text": i} for i in range(25))))
    assert message.count("expected text") == 4
    assert message.endswith("; and 21 more")
    message = refused(read_rows, jsonl(tmp_path, *[{"text": 1}] * 25))
    assert message.endswith(": rows 1 to 25: field text: found 1, expected text")
    message = refused(read_rows, jsonl(tmp_path, {"text": 1}, {"text": "a"}, {"text": 1}))
    assert message.endswith(": 2 rows from 1 to 3: field text: found 1, expected text")


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"prompt": "a", "completion": [CHAT["messages"][1]]},
         "found text and a list, expected text in both or lists"),
        ({"prompt": "a", "completion": 7}, "field completion: found 7, expected text"),
        ({"prompt": {"a": 1}, "completion": "b"}, "field prompt: found an object, expected text"),
        ({"prompt": "a"}, "keys found: 'prompt'; expected one of"),
        (b"\xff{}".decode("latin-1"), "not JSON"),
    ],
)  # fmt: skip
def test_bad_fields(tmp_path, row, part):
    assert part in refused(read_rows, jsonl(tmp_path, row))


def test_sharegpt_and_alpaca_are_conversations(tmp_path):
    share = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    system = {"role": "system", "content": "Be brief."}
    for row, messages, trained in [
        (share, said, 0),
        (share | {"system": "Be brief."}, [system, *said], 0),
        ({"instruction": "Hi", "output": "Yo", "input": ""}, said, 1),
        ({"instruction": "Hi", "output": "Yo", "system": "Be brief."}, [system, *said], 2),
    ]:
        (read,) = read_rows(jsonl(tmp_path, row))
        assert format_of(read).conversation(read) == Conversation(messages, trained)
    turn = {"from": "narrator", "value": None}
    message = refused(read_rows, jsonl(tmp_path, {"conversations": [turn]}))
    assert "conversations[0].from: found 'narrator', expected one of human, prompter" in message
    assert message.endswith("; and 1 more")
    turn = {"from": "human", "value": None}
    message = refused(read_rows, jsonl(tmp_path, {"conversations": [turn]}))
    assert "conversations[0].value: found null, expected text" in message
    message = refused(read_rows, jsonl(tmp_path, {"instruction": "a", "output": "b", "input": 1}))
    assert "field input: found 1, expected text" in message


def test_columns_have_other_names_and_unknown_keys_are_named(tmp_path):
    rows = [{"question": "a", "answer": "b", "id": 7}, {"question": "c", "answer": "d"}]
    path = jsonl(tmp_path, *rows)
    rows = read_rows(path, Reading({"prompt": "question", "completion": "answer"}))
    assert rows == [{"id": 7, "prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    assert rows.ignored == ("id",)
    message = refused(lambda: read_rows(path, Reading({"prompt": "questions"})))
    assert "row 1: found no column 'questions'; the row has 'question', 'answer', 'id'" in message
    swapped = jsonl(tmp_path, {"prompt": "b", "completion": "a"})
    found = read_rows(swapped, Reading({"prompt": "completion", "completion": "prompt"}))
    assert found == [{"prompt": "a", "completion": "b"}]


def test_a_row_that_has_the_new_name_too_is_refused(tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": "b", "prompt": "c"}]
    columns = {"prompt": "question", "completion": "answer"}
    message = refused(read_rows, jsonl(tmp_path, *rows), Reading(columns))
    assert "row 2: --columns prompt=question: the row already has a column prompt" in message
    assert "row 2: --columns prompt=question" in refused(as_rows, rows, Reading(columns))


def test_ignored_keys_are_named_on_the_console(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "id": 7, "[red]": 1}, {"prompt": "c", "answer": "d"}]
    columns = {"completion": "answer"}
    found = as_rows(jsonl(tmp_path, rows[1] | {"x": None}), Reading(columns))
    assert found == [{"prompt": "c", "x": None, "completion": "d"}]
    told = "rows given in Python: ignored keys: id, [red] (rows of {prompt, completion})\n"
    assert told_of(rows[:1]) == told
    path = jsonl(tmp_path, rows[1] | {"x": 1})
    assert told_of(path, columns) == f"{path}: ignored keys: x (rows of {{prompt, completion}})\n"
    assert told_of(jsonl(tmp_path, rows[1] | {"x": None}), columns) == ""


def test_csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('\ufeffprompt,completion,id\n"a, b","say ""c""\nd",1\n\nx,y,2\n', "utf-8")
    expected = [("a, b", 'say "c"\nd', "1"), ("x", "y", "2")]
    assert [tuple(row.values()) for row in read_rows(str(path))] == expected
    path.write_text("text,label\ngood,pos\nbad\nfine,pos,extra\n")
    message = refused(read_rows, str(path))
    assert "row 2: found 1 values, expected 2 as in the header" in message
    assert "row 3: found 3 values, expected 2 as in the header" in message
    path.write_text('text\n"open\n')
    assert "not CSV after line 1: a quote is not closed" in refused(read_rows, str(path))
    path.write_bytes("text\nä\n".encode() + b"\xff\n")
    assert "invalid UTF-8 soon after line 1; save the whole" in refused(read_rows, str(path))
    path.write_text("text,label,text,label\na,b,c,d\n")
    assert refused(read_rows, str(path)) == (
        f"{path}: header: found 'text', 'label' more than once, expected each name once"
    )
    path.write_text(",text, ,\n0,good,,\n1,bad,,\n")  # an index as pandas writes it, and commas
    rows = read_rows(str(path))
    assert rows[0] == {"column 1": "0", "text": "good", "column 3": "", "column 4": ""}
    assert rows.ignored == ("column 1", "column 3", "column 4")
    assert read_rows(str(path), Reading({"label": "column 1"}))[1]["label"] == "1"
    path.write_text("question,answer\na,b\n")
    assert "keys found: 'question', 'answer'; expected one of" in refused(read_rows, str(path))


def test_bad_sources(tmp_path):
    assert "no rows found" in refused(read_rows, jsonl(tmp_path))
    assert "there is no such file" in refused(read_rows, str(tmp_path / "none.jsonl"))
    assert "there is no such file" in refused(read_rows, str(tmp_path / "none.parquet"))
    assert "found no such file or directory, expected .jsonl" in refused(read_rows, "a.jsonl:x")
    (tmp_path / "rows.xml").write_text("a,b\n")
    kinds = "found a .xml file, expected .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet, .arrow"
    assert kinds in refused(read_rows, str(tmp_path / "rows.xml"))
    (tmp_path / "bad.parquet").write_bytes(b"nope")
    assert "can't be read" in refused(read_rows, str(tmp_path / "bad.parquet"))
    (tmp_path / "bad.json").write_text('[{"text": "a"},\n {"text"]')
    assert "line 2: not JSON" in refused(read_rows, str(tmp_path / "bad.json"))
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}\n'.encode("latin-1"))
    assert "row 1: not UTF-8 at byte 11" in refused(read_rows, str(tmp_path / "latin.jsonl"))


def test_an_unreachable_hub_dataset_is_one_line(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refused(read_rows, "nobody/nothing")
    assert "nobody/nothing: there is no such file, and loading a hub dataset of this name" in said


# encoding


@pytest.mark.slow
def test_smollm2_prompt_ids_are_those_of_generation(smollm2):
    rows = [PAIR, {"prompt": "a\n", "completion": "\n\n b"}]
    examples = encode(rows, smollm2, 512).examples
    for example, (text, _) in zip(examples, prompts(rows, smollm2), strict=True):
        seen = tuple(smollm2(text, add_special_tokens=False).input_ids)
        assert example.ids[: len(seen)] == seen
        assert set(example.labels[: len(seen)]) == {NO_LOSS}
        assert example.labels[len(seen)] == example.ids[len(seen)]


@pytest.mark.slow
def test_smollm2_trains_every_answer_with_its_end_of_turn(smollm2):
    assert ensure_chat_template(smollm2) is None
    [example], report = (encoded := encode([CHAT], smollm2, 512)).examples, encoded.report
    assert trained(example, smollm2) == ["Hi!\nWhat now? <|im_end|>", "naïve 🙂<|im_end|>"]
    text = smollm2.apply_chat_template(CHAT["messages"], tokenize=False)
    assert smollm2.decode(example.ids) == text
    assert example.ids.count(smollm2.bos_token_id) == 5  # a system turn and four more: none doubled
    assert (report.rows, report.tokens) == (1, len(example.ids))
    assert (report.truncated, report.turns_left_out) == (0, 0)
    assert report.labelled == sum(label != NO_LOSS for label in example.labels)
    for token, label in zip(example.ids, example.labels, strict=True):
        assert label in (NO_LOSS, token)


def test_only_the_completion_of_a_pair_of_message_lists_is_trained(smollm2):
    row = {"prompt": CHAT["messages"][:3], "completion": CHAT["messages"][3:]}
    assert trained(encode([row], smollm2, 512).examples[0], smollm2) == ["naïve 🙂<|im_end|>"]


def test_a_border_that_would_be_merged_is_cut(plain):
    plain.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    plain.add_tokens("\n\n")
    row = {"prompt": "one two three\n", "completion": "\nHi"}
    prompt = plain(row["prompt"], add_special_tokens=False).input_ids
    joined = plain("one two three\n\nHi", add_special_tokens=False).input_ids
    assert joined[: len(prompt)] != prompt  # or the test would show nothing
    [example] = encode([row], plain, 64).examples
    assert list(example.ids[: len(prompt)]) == prompt
    assert trained(example, plain) == ["\nHi</s>"]


def test_a_tokenizer_without_template_gets_a_plain_one(plain):
    notice = ensure_chat_template(plain)
    assert "no chat template" in notice
    assert "</s>" in notice
    assert ensure_chat_template(plain) is None
    [example] = encode([CHAT], plain, 512).examples
    assert trained(example, plain) == ["Hi!\nWhat now? </s>", "naïve 🙂</s>"]
    assert example.ids.count(plain.bos_token_id) == 1
    [(text, answer)] = prompts([PAIR], plain)
    assert (text, answer) == ("<s>### User:\nHello there\n### Assistant:\n", "Hi you")


def test_no_template_and_no_end_of_sequence_is_an_error(plain):
    plain.eos_token = None
    assert "nor an EOS token" in refused(ensure_chat_template, plain)


def test_single_questions_are_joined_with_those_of_equal_system_messages() -> None:
    asked = [{"prompt": f"q{n}", "completion": f"a{n}", "system": "SB"[n % 2]} for n in range(20)]
    shots = [("user", "x"), ("assistant", "y"), ("user", "z")]
    several = {
        "prompt": [{"role": role, "content": text} for role, text in shots],
        "completion": [{"role": "assistant", "content": "w"}],
    }
    for rows, kept in ((asked, []), ([several], [several])):
        found = as_rows(rows, recipe=Recipe(join="auto"))
        assert found == as_rows(rows, recipe=Recipe(join="auto"))
        turns = [row["messages"] for row in found]
        if kept:  # its first answer is part of the prompt, so it is not trained
            assert [message.get("weight") for message in turns[0]] == [None, 0, None, None]
            continue
        assert {len(messages) for messages in turns} == {3, 5, 7}
        pairs = [
            (system["content"], *(message["content"] for message in pair))
            for system, *rest in turns
            for pair in zip(rest[::2], rest[1::2], strict=True)
        ]
        given = [(row["system"], row["prompt"], row["completion"]) for row in rows]
        assert sorted(pairs) == sorted(given)
        assert as_rows(rows, recipe=Recipe(join="auto", seed=1)) != found
        # an estimated length: system message and question and answer have about 50 tokens
        short = as_rows(rows, recipe=Recipe(join="auto", max_length=120))
        assert {len(row["messages"]) for row in short} == {3, 5}
        assert len(as_rows(rows, recipe=Recipe(join="auto", max_length=60))) == len(rows)


def test_rows_that_are_not_joined_are_not_announced(capsys) -> None:
    texts = [{"text": f"text {n}"} for n in range(4)]
    for rows, told in ((texts, False), ([{"prompt": "a", "completion": "b"}] * 9, True)):
        as_rows(rows, console=Console(), recipe=Recipe(join="auto"))
        assert ("join: 9 rows, number of conversations: " in capsys.readouterr().out) == told


def test_turns_that_the_template_rewrites_have_examples_of_their_own(plain):
    plain.chat_template = THOUGHTFUL
    encoded = encode([CHAT], plain, 512)
    first, last = (trained(example, plain) for example in encoded.examples)
    assert first == ["<think></think>Hi!\nWhat now? <e>"]
    assert last == ["<think></think>naïve 🙂<e>"]
    assert encoded.report.turns_left_out == 0
    assert "2 examples: a row becomes several if" in str(encoded.report)


def test_the_templates_own_marks_are_taken(plain):
    plain.chat_template = MARKED
    assert trained(encode([CHAT], plain, 512).examples[0], plain) == ["Hi!\nWhat now? ", "naïve 🙂"]
    row = {"prompt": CHAT["messages"][:3], "completion": CHAT["messages"][3:]}
    assert trained(encode([row], plain, 512).examples[0], plain) == ["naïve 🙂"]


def test_what_a_template_refuses_names_the_row(plain):
    plain.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    )
    bad = {"messages": [{"role": "system", "content": "x"}, *CHAT["messages"]]}
    told = refused(encode, [bad, CHAT], plain, 512)
    assert "row 1: the model's chat template rejects this conversation: no system turns" in told


def test_text_is_trained_whole_and_ended(plain, smollm2):
    [example] = encode([{"text": "the cat"}], plain, 64).examples
    assert plain.decode(example.ids) == "<s>the cat</s>"
    assert example.labels == (NO_LOSS, *example.ids[1:])
    [example] = encode([{"text": "the cat<|im_end|>"}], smollm2, 64).examples
    assert example.ids.count(smollm2.eos_token_id) == 1


def test_cut_and_unlabelled_rows_are_reported(plain):
    ensure_chat_template(plain)
    rows = [
        PAIR,
        {"prompt": "the cat sat on the mat " * 9, "completion": "Hi"},
        {"prompt": "Hello", "completion": "the cat " * 30},
    ]
    encoded = encode(rows, plain, 60)
    assert len(encoded.examples) == 2
    assert max(len(example.ids) for example in encoded.examples) == 60
    assert (encoded.report.rows, encoded.report.truncated, encoded.report.unlabelled) == (3, 2, 1)
    assert encoded.report.longest > 60
    told = "2 rows were cut at 60 tokens\n1 rows have no token to train on and are left out"
    assert told in str(encoded.report)
    told = "none of the 1 rows has a token to train on: 1 were cut at max_length 60"
    assert told in refused(encode, rows[1:2], plain, 60)


def test_prompts_are_the_last_answer(smollm2):
    asked = {"tokenize": False, "add_generation_prompt": True}
    text = smollm2.apply_chat_template(CHAT["messages"][:3], **asked)
    assert prompts([CHAT], smollm2) == [(text, "naïve 🙂")]
    assert "row 1: found plain text" in refused(prompts, [{"text": "a"}], smollm2)
    unanswered = [{"messages": CHAT["messages"][:1]}]
    assert "row 1: found no assistant turn" in refused(prompts, unanswered, smollm2)


def test_preview_shows_the_mask_with_and_without_colour(smollm2):
    text = preview(encode([PAIR], smollm2, 64).examples[0], smollm2)
    console = Console(width=200, color_system=None)
    with console.capture() as shown:
        console.print(text)
    assert "assistant\n⟦Hi you<|im_end|>⟧" in shown.get()
    [span] = [span for span in text.spans if "green" in str(span.style)]
    assert text.plain[span.start : span.end] == "⟦Hi you<|im_end|>⟧"


# order


def test_batches_cover_every_row_once_an_epoch_and_any_step_is_found_again():
    order = list(Batches(10, 4, 5, seed=3))
    assert [len(step) for step in order] == [4] * 5
    flat = [row for step in order for row in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert list(Batches(10, 4, 3, seed=3)) == order[:3]
    assert list(Batches(10, 4, 5, seed=4)) != order
    assert sorted(Batches(2, 6, 1, seed=0)[0]) == [0, 0, 0, 1, 1, 1]
    assert "no rows" in refused(Batches, 0, 4, 1, 0)


def test_split_is_seeded_disjoint_and_never_empty():
    rows = [{"text": str(i)} for i in range(20)]
    train, held = split(rows, 0.25, seed=1)
    assert len(held) == 5
    assert sorted([*train, *held], key=rows.index) == rows
    assert split(rows, 0.25, seed=1) == (train, held)
    assert split(rows, 0.25, seed=2) != (train, held)
    assert [len(part) for part in split(rows, 0.001, seed=1)] == [19, 1]
    assert [len(part) for part in split(rows, 0.999, seed=1)] == [1, 19]
    assert split(rows, 0.0, seed=1) == (rows, [])
    assert "at least 2" in refused(split, rows[:1], 0.1, 0)
