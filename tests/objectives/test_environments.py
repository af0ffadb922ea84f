"""Environments: rollouts of several turns, with tools, and with a loop of the user's."""

import asyncio
import re
import subprocess
import sys
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from openai import AsyncOpenAI, BadRequestError, OpenAI
from transformers.utils import get_json_schema

import lorafold as lf
from conftest import CHAT_TEMPLATE
from families import names, tokenizer_of
from interrupted_runs import interrupted
from lorafold.data.examples import NO_LOSS
from lorafold.data.formats import Conversation
from lorafold.data.prompts import TokenizedPrompt
from lorafold.data.render import ConversationRenderings, render
from lorafold.engine import Sampling
from lorafold.engine.kv_cache import BLOCK
from lorafold.engine.operations import unsteady
from lorafold.errors import LorafoldError
from lorafold.evaluation.episodes import Episode, EpisodeOver
from lorafold.evaluation.policy_rewards import RewardedRollouts
from lorafold.evaluation.rollouts import Rollouts
from lorafold.models.tokenizer import set_template
from lorafold.rewards import Calls, Rewards
from lorafold.rewards.environments import EnvironmentInput, PolicyError, RolloutOver
from lorafold.rewards.functions import DEFAULT_CALLS
from lorafold.rewards.reward import environment_of

pytestmark = pytest.mark.usefixtures("unestimated")


def len_of(text: str) -> int:
    """
    Count letters.

    Args:
        text: The letters.
    """
    return len(text)


ROWS = [{"prompt": f"Say {word}", "word": word} for word in ("red", "blue", "green", "gold")]
TURNS = '''
import os, random, subprocess, time
from openai import AsyncOpenAI, OpenAI

def question(text, n):
    return f"{n} {text[:4]}" if n < 3 else None

def reward(text, word, n):
    return {"letters": sum(c in text for c in word), "turns": n / 4}

class Talk:
    def reset(self, word, seed):
        self.word, self.n, self.dice = word, 0, random.Random(seed)
        return f"Say {word}, or {self.dice.randrange(9)}"

    def step(self, text, ended):
        self.n, self.text = self.n + (ended == "stop"), text
        return question(text, self.n)

    def reward(self):
        return reward(self.text, self.word, self.n)

class Slowly(Talk):
    async def step(self, text, ended):
        return super().step(text, ended)

def talk(policy, row):
    """The conversation of Talk: yields messages, and is sent the reply, its text and its end."""
    n = 0
    dice = random.Random(policy.seed)
    messages = [{"role": "user", "content": f"Say {row['word']}, or {dice.randrange(9)}"}]
    while True:
        reply, text, ended = yield messages
        n += ended == "stop"
        seen = question(text, n) if ended == "stop" else None
        if seen is None:
            return reward(text, row["word"], n)
        messages = [*messages, reply, {"role": "user", "content": seen}]

def written(policy, row):
    talking = talk(policy, row)
    messages = next(talking)
    try:
        while True:
            reply = policy.chat(messages)
            messages = talking.send((reply, reply["content"], reply.ended))
    except StopIteration as end:
        return end.value

async def awaited(policy, row):
    talking = talk(policy, row)
    messages = next(talking)
    try:
        while True:
            reply = await policy.achat(messages)
            messages = talking.send((reply, reply["content"], reply.ended))
    except StopIteration as end:
        return end.value

def client(policy, row):
    talking, openai = talk(policy, row), OpenAI(base_url=policy.url, api_key="none")
    messages = next(talking)
    try:
        while True:
            [one] = openai.chat.completions.create(model="any", messages=messages).choices
            messages = talking.send((one.message, one.message.content, one.finish_reason))
    except StopIteration as end:
        return end.value

async def clients(policy, row):
    talking, openai = talk(policy, row), AsyncOpenAI(base_url=policy.url, api_key="none")
    messages = next(talking)
    try:
        while True:
            found = await openai.chat.completions.create(model="any", messages=messages, n=1)
            [one] = found.choices
            sent = one.message.model_dump()  # with nulls
            messages = talking.send((sent, one.message.content, one.finish_reason))
    except StopIteration as end:
        return end.value

class Bad:
    def __init__(self):
        self.n = 0
    def reset(self, row):
        return row["acts"] if "acts" in row else None
    def step(self, text):
        self.n += 1
        kinds = {
            "hangs": lambda: time.sleep(99), "raises": lambda: 1 / 0, "number": lambda: 7,
            "leaves": lambda: os._exit(3), "forks": lambda: subprocess.run(["sleep", "98"]),
            "dict": lambda: [{"content": "x"}],
            "object": lambda: [{"role": "user", "content": object()}],
        }
        return kinds[os.environ["ACT"]]()

class Reward(Bad):
    def step(self, text):
        return None
    def reward(self):
        return "much"

class Endless:
    def step(self, text):
        return "more"
    def reward(self):
        return 1

class Named:
    def step(self, action):
        return None

class Unscored(Named):
    def step(self):
        return None
    def reward(self):
        return None

class Nothing:
    pass

def one(row):
    return 1

def asks_nothing(policy, row):
    return 1.0
'''


@pytest.fixture(scope="module")
def talker(tiny_model_dir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that ends a fifth of its tokens' turns."""
    path = tmp_path_factory.mktemp("talker")
    model, tokenizer = lf.load_model(str(tiny_model_dir("llama")), storage="fp32"), None
    tokenizer = lf.load_tokenizer(str(tiny_model_dir("llama")))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 2.0
        weight = model.get_output_embeddings().weight
        weight[:, 0] = 0.0
        weight[end, 0] = 0.8
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("environments") / "turns.py"
    path.write_text(TURNS)
    return path


@pytest.fixture
def run(talker: Path, tmp_path: Path) -> Any:
    def trained(out: str, environment: Any, **changes: Any) -> Any:
        options = {"group": 4, "max_new_tokens": 12, **changes.pop("options", {})}
        given = {"steps": 2, "batch": 2, "max_length": 160, "storage": "fp32"}
        above = {name: changes.pop(name) for name in ("resume", "rewards") if name in changes}
        recipe = lf.Recipe(**{"objective": "grpo", **given, **changes}, objective_options=options)
        where = {"model": talker, "data": ROWS, "out": tmp_path / out}
        return lf.train(recipe, environment=environment, **where, **above)

    return trained


def module(file: Path) -> Any:
    sys.path.insert(0, str(file.parent))
    import turns

    return turns


def of(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_each_form_of_an_environment_trains_the_same_adapter(run, file: Path, tmp_path) -> None:
    turns = module(file)
    for name in ("Talk", "clients"):
        run(name, f"{file}:{name}")
    for name in ("Slowly", "written", "awaited", "client"):
        run(f"own {name}", getattr(turns, name))
    assert len({of(path) for path in tmp_path.iterdir()}) == 1
    steps = lf.history(tmp_path / "Talk").steps
    assert all(one > 1.2 for one in steps["turns"])
    assert all(0 < one <= 0.75 for one in steps["reward turns"])
    assert steps["reward"] == pytest.approx(
        [a + b for a, b in zip(steps["reward letters"], steps["reward turns"], strict=True)]
    )


def test_one_turn_is_a_run_without_an_environment(run, file: Path, tmp_path: Path) -> None:
    def letters(completion: str, word: str) -> float:
        return sum(c in completion for c in word) + len(completion) / 100

    async def once(policy: Any, row: Any) -> float:
        return letters((await policy.achat(policy.messages))["content"], row["word"])

    run("once", once)
    run("plain", None, rewards=letters)
    assert of(tmp_path / "once") == of(tmp_path / "plain")


def test_a_seeded_environment_resumes_exactly(run, file: Path, tmp_path: Path) -> None:
    run("whole", f"{file}:Talk", steps=3)
    with interrupted(2):
        run("stopped", f"{file}:Talk", steps=3, save_every=1)
    again = partial(run, "stopped", f"{file}:Talk", steps=3, save_every=1, resume=True)
    changed = "objective_options.temperature: was None, now 0.7. Use"
    with pytest.raises(LorafoldError, match=changed):
        again(options={"temperature": 0.7})
    again(options={"reward_seconds": 60.0, "reward_concurrency": 4, "reward_retries": 3})
    assert of(tmp_path / "whole") == of(tmp_path / "stopped")
    again()  # the limits of the finished run were others


@pytest.mark.parametrize("updates", [1, 2])
def test_exact_episodes_have_no_difference(updates: int, run, file, tmp_path, tiny_model) -> None:
    shapes = [tuple(p.shape) for p in tiny_model("llama").parameters() if p.dim() == 2]
    if unsteady(shapes, torch.float32):
        pytest.skip("products of this processor depend on the number of rows")
    run("exact", f"{file}:Talk", options={"exact": True, "updates": updates}, lr=0.05)
    assert lf.history(tmp_path / "exact").steps["largest mismatch"] == [0.0, 0.0]


@contextmanager
def rollouts_of(path: Path, environment: Any, turns: int = 16, calls: Calls = DEFAULT_CALLS) -> Any:
    model, tokenizer = lf.load_model(str(path), storage="fp32"), lf.load_tokenizer(str(path))
    lf.attach(model, lf.LoRA(rank=4))
    with environment_of(environment, calls) as played:
        rollouts = Rollouts(model, tokenizer, 6, 12, environment=played, turns=turns)
        rollouts.open(148, 16)
        with closing(rollouts):
            yield model, tokenizer, rollouts


def prompts(tokenizer: Any) -> list[TokenizedPrompt]:
    found = []
    for n, row in enumerate(ROWS):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True
        )["input_ids"]
        found.append(TokenizedPrompt(tuple(ids), row, f"row {n}", 148 - len(ids)))
    return found


def test_tokens_of_all_turns_have_the_log_probabilities_of_transformers(talker, file) -> None:
    with rollouts_of(talker, module(file).Talk) as (model, tokenizer, rollouts):
        cached, submit = [], rollouts.engine.submit
        rollouts.engine.submit = lambda request: cached.append(submit(request)) or cached[-1]
        episodes = [one for group in rollouts.sample(prompts(tokenizer), 0) for one in group]
        assert max(one.turns for one in episodes) == 3
        for one in episodes:
            ids, labels = torch.tensor([one.ids]), torch.tensor(one.labels)
            logps = torch.log_softmax(model(ids).logits[0, :-1], -1)
            places = (labels != NO_LOSS).nonzero()[:, 0]
            assert torch.equal(ids[0, places], labels[places])
            expected = logps[places - 1].gather(1, labels[places, None])[:, 0]
            assert one.logprobs == pytest.approx(expected.tolist(), abs=5e-5)
            if one.ended:  # what the template would show of this conversation
                rendered = tokenizer.apply_chat_template(one.messages)["input_ids"]
                shown = [tokenizer.decode(x, skip_special_tokens=True) for x in (one.ids, rendered)]
                assert shown[0] == shown[1].removesuffix("\n")
            sampled = [label for label in one.labels if label != NO_LOSS]
            replies = [m["content"] for m in one.messages if m["role"] == "assistant"]
            assert len(replies) == one.turns == sampled.count(one.ids[-1]) or not one.ended
            assert tokenizer.decode(sampled, skip_special_tokens=True) == "".join(replies)
        later = [one.result().cached for one in cached if len(one.request.prompt) > 80]
        assert later
        assert min(later) >= BLOCK  # of the earlier turns


ACTS = {
    "raises": r"raised ZeroDivisionError: division by zero \(line \d+ of turns.py",
    "number": r"returned 7 \(int\), expected text, a list of messages, or None",
    "leaves": "its process ended with exit code 3",
    "hangs": r"took more than 2 s \(0 done of 24 completions\); make it faster, or set a longer",
    "forks": "took more than 2 s",
    "dict": r"field messages\[2\].role: found null, expected text",
    "object": "messages: found a value that is not JSON: Object of type object is not JSON",
}


@pytest.mark.parametrize("act", ACTS)
def test_an_environment_that_fails(act: str, talker, file: Path, monkeypatch) -> None:
    monkeypatch.setenv("ACT", act)
    with rollouts_of(talker, f"{file}:Bad", calls=Calls(2)) as (_, tokenizer, rollouts):
        with pytest.raises(LorafoldError, match=ACTS[act]) as failed:
            rollouts.sample(prompts(tokenizer), 0)
        name = re.escape(f"environment {file}:Bad: row ")
        assert re.match(rf"{name}\d, completion \d: ", str(failed.value))
    if act == "forks":
        listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True)
        assert "sleep 98" not in listed.stdout


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Reward", r"returned 'much' \(str\), expected a finite number"),
        ("Named", "step: found the parameter action, expected only text, calls, ended"),
        ("Nothing", "found neither step nor tools, expected one of them"),
        ("asks_nothing", "the environment never called the model"),
        ("one", r"found <function one .*, expected a class or fn\(policy, row\)"),
        ("no", "expected a function no in turns.py, found none; the file has question, reward, T"),
    ],
)
def test_what_is_no_environment(name: str, told: str, talker, file: Path) -> None:
    with (
        pytest.raises(LorafoldError, match=told),
        rollouts_of(talker, f"{file}:{name}") as (_, tokenizer, rollouts),
    ):
        rollouts.sample(prompts(tokenizer), 0)


def test_a_rollout_has_an_end(talker, file: Path) -> None:
    with rollouts_of(talker, f"{file}:Endless", turns=3) as (_, tokenizer, rollouts):
        episodes = [one for group in rollouts.sample(prompts(tokenizer), 0) for one in group]
        assert {one.turns for one in episodes} <= {1, 2, 3}
        assert max(one.turns for one in episodes) == 3
        assert all(one.rewards == {"environment": 1.0} for one in episodes)
    with rollouts_of(talker, f"{file}:Endless", turns=99) as (_, tokenizer, rollouts):
        some = [replace(one, room=30) for one in prompts(tokenizer)]
        episodes = [one for group in rollouts.sample(some, 0) for one in group]
        assert max(one.turns for one in episodes) > 1
        for one in episodes:
            assert len(one.ids) <= len(one.prompt.ids) + 30 + 12  # max_length
        rollouts.ends, rollouts.has_continued = frozenset(range(10, 60)), False
        with pytest.raises(LorafoldError, match="the chat template renders an earlier turn as"):
            rollouts.sample(some, 0)  # none ends with the template's token


def test_a_template_that_rewrites_turns_is_refused_by_name(talker, file: Path, caplog) -> None:
    own = "m['content'] if m['role'] == 'user' else {}"
    for share, said in ((1, "'.'"), (0, "m['content'] | lower")):
        template = CHAT_TEMPLATE.replace("m['content']", own.format(said))
        with rollouts_of(talker, module(file).Talk) as (_, tokenizer, rollouts):
            rollouts.tokenizer.chat_template = template
            played = partial(rollouts.sample, prompts(tokenizer), 0)
            if share:
                with pytest.raises(LorafoldError, match="row 0: the chat template renders an earl"):
                    played()
                continue
            groups = played()
            refused = [one for group in groups for one in group if one.refused]
            assert refused
            assert "left out: the chat template renders an earlier turn" in caplog.text
            found = RewardedRollouts.of(prompts(tokenizer), groups, Rewards([]))
            assert found.figures["refused"] == len(refused) / 24
            assert int(found.rewards.isnan().sum()) == len(refused)


def refusals(policy: Any, row: Any) -> float:
    """What can't be asked, in Python and over HTTP, and then a conversation that goes on."""
    first = {"role": "user", "content": "Say it."}
    reply = policy.chat([first])
    client = OpenAI(base_url=policy.url, api_key="none", max_retries=0)
    wrong = [
        [{"role": "user", "content": "Say that."}, reply, first],
        [first, reply | {"content": reply["content"] + "!"}, first],
        [first, reply],
        [first, reply, {"role": "user"}],
        [first, reply, {"role": "user", "content": "\ud83d"}],
    ]
    for messages in wrong if reply.ended == "stop" else []:
        with pytest.raises(PolicyError, match="messages"):
            policy.chat(messages)
        if messages is not wrong[-1]:
            with pytest.raises(BadRequestError, match="messages"):
                client.chat.completions.create(model="any", messages=messages)
    if reply.ended == "stop":
        with pytest.raises(PolicyError, match="tools: found others than in the first turn"):
            policy.chat([first, reply, first], [len_of])
    with pytest.raises(BadRequestError, match=r"found 1, expected more|cut off"):
        client.chat.completions.create(model="any", messages=[first], temperature=0.7)
    for field, value in {"temperature": 1, "n": 2, "stream": True, "stop": "x"}.items():
        with pytest.raises(BadRequestError, match=f"{field}: this endpoint has only the default"):
            client.chat.completions.create(model="any", messages=[first], **{field: value})
    for path in ("/chat/completions", "/v1/models"):
        with pytest.raises(HTTPError, match="400"):
            urlopen(Request(policy.url + path, b"{}", {"Content-Type": "application/json"}))
    with pytest.raises(RolloutOver if reply.ended == "length" else PolicyError):
        policy.chat([first])
    return 1.0


def test_what_a_policy_refuses(talker) -> None:
    with rollouts_of(talker, refusals) as (_, tokenizer, rollouts):
        rollouts.sampling = Sampling(temperature=0.7)
        [first, *_], *_ = rollouts.sample(prompts(tokenizer), 0)
        assert first.rewards == {"environment": 1.0}


def test_one_call_at_a_time(talker) -> None:
    async def both(policy: Any, row: Any) -> float:
        calls = [policy.achat(policy.messages) for _ in range(2)]
        one, other = await asyncio.gather(*calls, return_exceptions=True)
        assert "called during another call" in str(other)
        with pytest.raises(PolicyError, match="chat: called in a coroutine, expected await policy"):
            policy.chat(policy.messages)
        return len(one["content"])

    with rollouts_of(talker, both) as (_, tokenizer, rollouts):
        assert rollouts.sample(prompts(tokenizer), 0)[0][0].rewards["environment"] >= 0


def add(a: int, b: int = 2) -> int:
    """
    Add numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def broken(a: int) -> str:
    """
    Half a character.

    Args:
        a: Any number.
    """
    return "\ud83d"


async def fail(text: str) -> str:
    """
    Fail.

    Args:
        text: Anything.
    """
    raise ValueError(text)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": name, "arguments": arguments}}


def start(messages: Any = (), **row: Any) -> list[EnvironmentInput]:
    values = {"row": row, "messages": messages, "seed": 0, "temperature": 1.0}
    return [EnvironmentInput("row 1", 0, values)]


def reply(content: str, calls: Any = None, problem: str = "") -> list[EnvironmentInput]:
    message = {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})
    values = {"message": message, "ended": "stop", "problem": problem}
    return [EnvironmentInput("row 1", 0, values)]


def test_tools_answer_calls_and_errors_are_answers() -> None:
    first = [{"role": "user", "content": "Add 1 and 2."}]
    with environment_of([add, fail, broken], DEFAULT_CALLS) as played:
        [request] = played(start(first))
        assert request["messages"] == first
        assert request["tools"] == [*map(get_json_schema, (add, fail, broken))]
        calls = [call("add", a=1), call("fail", text="no"), call("add", c=1), call("sub", a=1)]
        calls.append(call("broken", a=1))
        [request] = played(reply("x", calls))
        assert [m["content"] for m in request["messages"][2:]] == [
            "3", "error: ValueError: no",
            "error: TypeError: add() got an unexpected keyword argument 'c'",
            "error: no tool sub; the tools are add, fail, broken",
            "error: UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud83d' in position"
            " 0: surrogates not allowed",
        ]  # fmt: skip
        assert {m["role"] for m in request["messages"][2:]} == {"tool"}
        [request] = played(reply("{", problem="bad"))
        assert request["messages"][-1] == {"role": "tool", "content": "error: bad"}
        [last] = played(reply("{"))
        assert last == {"reward": {"environment": None}}


class Shop:
    """As TRL has environments: its methods are the tools."""

    stock = dict  # no method

    def reset(self, **row: Any) -> None:
        self.sold = list(row)

    def buy(self, thing: str) -> str:
        """
        Buy a thing.

        Args:
            thing: Its name.
        """
        self.sold.append(thing)
        return f"bought {thing}"

    def reward(self) -> float:
        return len(self.sold)


def test_methods_of_a_class_without_steps_are_tools() -> None:
    with environment_of(Shop, DEFAULT_CALLS) as played:
        [request] = played(start([{"role": "user", "content": "Go."}], word="red"))
        assert [tool["function"]["name"] for tool in request["tools"]] == ["buy"]
        [request] = played(reply("", [call("buy", thing="tea")]))
        assert request["messages"][-1]["content"] == "bought tea"
        assert played(reply("Done.")) == [{"reward": {"environment": 2.0}}]


class Seeded:
    def reset(self, seed: int, row: dict[str, Any], messages: Any, **fields: Any) -> str:
        return f"{seed} {row['seed']} {len(messages)} {fields['word']}"

    def step(self, text: str) -> None:
        pass

    def reward(self) -> float:
        return 1.0


def test_fields_of_a_row_do_not_hide_what_lorafold_passes() -> None:
    with environment_of(Seeded, DEFAULT_CALLS) as played:
        [request] = played(start(seed="no", row=2, word="red"))
        assert request["messages"][-1]["content"] == "0 no 0 red"


def letters(completion: str) -> float:
    return len(completion)


def test_a_reward_has_another_name_than_those_of_the_environment(run, file: Path) -> None:
    with pytest.raises(LorafoldError, match="letters: the environment gives a reward of the same"):
        run("out", f"{file}:Talk", rewards=letters)


def test_no_rollout_has_a_reward(run, file: Path) -> None:
    trained = run("out", f"{file}:Unscored", steps=6)
    assert trained.losses == [0.0] * 6
    told = "100% of the groups of the last 3 steps had the same reward for all completions, or none"
    assert told in str(lf.history(trained.adapter))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def a(x: int):\n    'No arguments.'", "tool a: .* no description for the argument 'x'"),
        ("def a(x):\n    pass", "tool a: .*no docstring"),
        ("def a():\n    'A.'\ndef a():\n    'B.'", "tools: found a, a, expected each name once"),
        ("def _a():\n    pass", "tools: found none, expected at least one function"),
        ("def a(x: int, /):\n    'A.\\n\\nArgs:\\n    x: One.'", "tool a: 'x' parameter is pos"),
        ("def a(*x: int):\n    'A.\\n\\nArgs:\\n    x: Some.'", "tool a: got an unexpected key"),
        ("1 / 0", "tools.py can't be run: ZeroDivisionError: division by zero"),
    ],
)
def test_files_that_have_no_tools(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(text)
    with pytest.raises(LorafoldError, match=told):  # before a model is looked for
        lf.train(
            GRPO, model="none", data=ROWS, out="none", rewards=letters,
            environment=f"tools:{tmp_path}/tools.py",
        )  # fmt: skip


@pytest.mark.parametrize("name", ["turns.py", "turns.py:", "0.5*turns.py:f", "regex:a", "tools:x"])
def test_names_of_no_environment(name: str) -> None:
    expected = "expected FILE.py:NAME or tools:FILE.py"
    with pytest.raises(LorafoldError, match=expected), environment_of(name, DEFAULT_CALLS):
        pass
    with pytest.raises(LorafoldError, match=f"environment no.py:f: there is no file {Path.cwd()}"):
        lf.train(GRPO, model="none", data=ROWS, out="none", environment="no.py:f")
    with pytest.raises(LorafoldError, match="turns: found no environment, expected one"):
        lf.train(TURNS_ALONE, model="none", data=ROWS, out="none", rewards=letters)
    with pytest.raises(LorafoldError, match="found no reward, expected at least one"):
        lf.train(GRPO, model="none", data=ROWS, out="none", environment=[add])
    with (
        pytest.raises(LorafoldError, match="tool partial: functools"),
        environment_of([partial(add, 1)], DEFAULT_CALLS) as played,
    ):
        played(start())
    with pytest.raises(LorafoldError, match="environment: not used by the objective sft"):
        lf.train(lf.Recipe(), model="none", data=ROWS, out="none", environment="no.py:f")


GRPO = lf.Recipe(objective="grpo")
TURNS_ALONE = lf.Recipe(objective="grpo", objective_options={"turns": 5})


def test_calls_of_a_template_go_on(smollm2) -> None:
    tokenizer = lf.load_tokenizer(str(smollm2))
    set_template(tokenizer, "tools")
    episode = Episode(tokenizer, TokenizedPrompt((1,), {"prompt": "Go."}, "row 1", 999), 9, 50)
    first, tools = [{"role": "user", "content": "Add 1 and 2."}], [get_json_schema(add)]
    episode.next_turn({"messages": first, "tools": tools, "max_tokens": None})
    ids, problem = tuple(episode.ids), "the call of add has arguments that are not JSON"
    for arguments in ('{"a":1,  "b": 2}', '{"a": 1,'):  # spaced otherwise than the template does
        text = f'<tool_call>\n{{"name": "add", "arguments": {arguments}}}\n</tool_call><|im_end|>'
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        reply = episode.add_turn(tokens, [0.0] * len(tokens), True)
        if "b" not in arguments:
            assert reply["problem"].startswith(problem)
            break
        [one] = reply["message"]["tool_calls"]
        assert one["function"] == {"name": "add", "arguments": {"a": 1, "b": 2}}
        result = {"role": "tool", "content": "<|im_end|> 3"}
        messages = [*first, reply["message"], result]
        new, most = episode.next_turn({"messages": messages, "tools": tools, "max_tokens": 7})
        assert (most, new[: len(ids) + len(tokens)]) == (7, (*ids, *tokens))
        seen = tokenizer.decode(new[len(ids) + len(tokens) :])
        assert "<|im_end|> 3" in seen
        assert seen.endswith("<|im_start|>assistant\n")
        assert seen.count("<|im_end|>") == 2  # that of the text is no token
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert new[len(ids) + len(tokens) :].count(end) == 1


@pytest.mark.parametrize("name", names())
def test_a_family_goes_on_or_is_refused_by_name(name: str) -> None:
    tokenizer, row = tokenizer_of(name), {"prompt": "Where is Rome?"}
    episode = Episode(tokenizer, TokenizedPrompt((1,), row, "row 1", 9999), 9, 50)
    first = {"role": "user", "content": "Where is Rome, then?"}
    talk = [first, {"role": "assistant", "content": "In Italy."}, first | {"content": "And Oslo?"}]
    request = {"messages": [first], "tools": [], "max_tokens": None}
    try:
        whole = render(talk, tokenizer, True)
    except LorafoldError:
        with pytest.raises(LorafoldError, match="chat template"):
            episode.next_turn(request)
        return
    episode.next_turn(request)
    rendered = ConversationRenderings(Conversation(talk), tokenizer)
    turn = rendered.turn(1)
    assert turn is not None
    text = turn.completion + rendered.end(1, turn)
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    reply = episode.add_turn(tokens, [0.0] * len(tokens), True)
    request["messages"] = [first, reply["message"], talk[2]]
    with suppress(EpisodeOver):
        episode.next_turn(request)
    if episode.refused:
        assert "the chat template renders an earlier turn as" in episode.refused
        assert name in REFUSED or not whole.startswith(turn.text[: turn.start] + text)
    else:
        assert tokenizer.decode(episode.ids) == whole


REFUSED = {  # although their templates keep turns: they add what the model generates
    "cohere2", "muse_glimmer", "Kimi-K3", "meetkai-functionary-medium-v3.2", "muse-glimmer",
    "unsloth-Apriel-1.5", "upstage-Solar-Open-100B", "unsloth-Apriel-1.5 add_thoughts=true",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use enable_thinking=true", "cohere2_training",
    "muse_glimmer_training",
}  # fmt: skip


def test_many_rollouts_ask_at_once(talker) -> None:
    async def asks(policy: Any, row: Any) -> float:
        client = AsyncOpenAI(base_url=policy.url, api_key="none", max_retries=0)
        async with client:
            found = await client.chat.completions.create(model="any", messages=policy.messages)
        return len(found.choices)

    with rollouts_of(talker, asks) as (_, tokenizer, rollouts):
        groups = rollouts.sample(prompts(tokenizer), 0, group=50)
        assert [one.rewards["environment"] for group in groups for one in group] == [1.0] * 200


def test_a_call_that_its_caller_gave_up_ends_nothing(talker) -> None:
    async def impatient(policy: Any, row: Any) -> float:
        with suppress(TimeoutError):
            await asyncio.wait_for(policy.achat(policy.messages), 1e-9)
        return 1.0

    with rollouts_of(talker, impatient) as (_, tokenizer, rollouts):
        [first, *_], *_ = rollouts.sample(prompts(tokenizer), 0)
        assert first.rewards == {"environment": 1.0}


def test_what_ignores_its_cancellation_keeps_nobody_waiting() -> None:
    async def stubborn(policy: Any, row: Any) -> float:
        while True:
            with suppress(asyncio.CancelledError):
                await policy.achat(policy.messages)
                await asyncio.sleep(99)

    with environment_of(stubborn, DEFAULT_CALLS) as played:
        assert len(played(start([{"role": "user", "content": "Go."}]))) == 1
