"""Rewards: functions, patterns, schemas and verifiers, and the messages where one fails."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

import lorafold as lf
from lorafold.errors import LorafoldError
from lorafold.rewards import Calls, Judged, Reward, Rewards, reward_of
from lorafold.rewards.judge import seconds_of

FILE = '''
import os, signal, sys, time
from beside import FACTOR

def one(prompt, completion, wanted=2, *, note=None):
    """What the completion asks for."""
    print("a line on standard output")
    acts = {"exit": lambda: os._exit(3), "killed": lambda: os.kill(os.getpid(), signal.SIGKILL)}
    acts |= {"slow": lambda: time.sleep(99), "stop": lambda: sys.exit(4), "read": input}
    acts |= {"torch": lambda: "torch" in sys.modules, "id": os.getpid, "group": group}
    if completion in acts:
        return acts[completion]()
    return eval(completion, {"wanted": wanted, "prompt": prompt, "note": note, "f": FACTOR})

def group():
    import subprocess
    child = subprocess.Popen(["sleep", "99"])
    with open("child", "w") as file:
        file.write(str(child.pid))
    time.sleep(99)

def every(prompt, completion, **row):
    return len(row) + sum(row.values())

def batch(prompts, completions, wanted, extra=0.5):
    import numpy as np
    if completions[0].startswith("!"):
        return eval(completions[0][1:])
    return np.array([len(c) - w for c, w in zip(completions, wanted)], np.float32)

def lists(completions, **row):
    return [len(row["prompts"]) + (0 if a is None else a) for a in row["a"]]

def positional(prompt, completion, /, wanted):
    return wanted

def other(text):
    return 1.0

def other_one(completion):
    return 5 if completion == "note" else None

NUMBER = 1
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards")
    (path / "given.py").write_text(FILE)
    (path / "beside.py").write_text("FACTOR = 3\n")
    return path


@pytest.fixture(scope="module")
def one(folder: Path) -> Iterator[Rewards]:
    """The function that does what the completion says; a kill starts its process again."""
    with Rewards.of(f"{folder}/given.py:one", calls=Calls(3)) as rewards:
        yield rewards


@pytest.fixture(scope="module")
def batch(folder: Path) -> Iterator[Rewards]:
    with Rewards.of(f"{folder}/given.py:batch", calls=Calls(2)) as rewards:
        yield rewards


def judged(*completions: str, **row: Any) -> list[Judged]:
    found = enumerate(completions, 1)
    return [Judged("ask", text, row, f"rows.jsonl row 7, completion {n}") for n, text in found]


def fails(rewards: Callable[[list[Judged]], Any], *completions: str, **row: Any) -> str:
    """The line of a failure, from the place of its completion on."""
    with pytest.raises(LorafoldError) as failed:
        rewards(judged(*completions, **row))
    assert "\n" not in str(failed.value)
    assert str(failed.value).startswith("reward ")
    return str(failed.value).partition("rows.jsonl row 7, ")[2]


def test_a_function_gets_what_it_names_and_gives_numbers(one: Rewards, folder: Path) -> None:
    texts = ["wanted * f", "prompt == 'ask'", "False", "0.1", "note is None", "-7"]
    sums, each = one(judged(*texts, wanted=5, unknown=object))
    assert sums == [15.0, 1.0, 0.0, 0.1, 1.0, -7.0]
    assert each == {f"{folder}/given.py:one": sums}
    assert all(type(value) is float for value in sums)
    assert one(judged("wanted"))[0] == [2.0]
    assert one([])[0] == []


def test_a_function_with_every_field_one_with_positions_and_a_batch(folder, batch) -> None:
    every, positional, lists = (
        reward_of(f"{folder}/given.py:{name}") for name in ("every", "positional", "lists")
    )
    assert every(judged("x", a=4, b=5)) == [11.0]
    assert positional(judged("x", "y", wanted=6)) == [6.0, 6.0]
    assert lists([*judged("x", a=4), *judged("y", b=1)]) == [6.0, 2.0]
    assert batch([*judged("abc", wanted=1), *judged("abcd", wanted=9)])[0] == [2.0, -5.0]
    for reward in (every, positional, lists):
        assert isinstance(reward, Reward)
        reward.close()


def test_the_process_has_no_torch_and_prints_to_standard_error(one, capfd) -> None:
    assert one(judged("torch"))[0] == [0.0]
    one.close()  # the process has the standard error of when it was started
    assert one(judged("1"))[0] == [1.0]
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == "a line on standard output\n"


@pytest.mark.slow
def test_a_process_lives_over_calls_and_is_started_again_after_its_end(one: Rewards) -> None:
    first = one(judged("id", "id"))[0]
    assert first == one(judged("id", "id"))[0]
    begun = time.monotonic()
    message = fails(one, "1", "slow", "1")
    assert 3 <= time.monotonic() - begun < 20
    assert message.startswith("completion 2: took more than 3 s (1 done of 3 completions)")
    again = one(judged("id"))[0]
    assert again[0] != first[0]
    os.kill(int(again[0]), 9)  # between two calls, where no completion is to blame
    time.sleep(0.1)
    assert one(judged("1"))[0] == [1.0]


@pytest.mark.parametrize(
    ("completion", "told"),
    [
        ("float('nan')", r"returned nan \(float\), expected a finite number"),
        ("1e999", r"returned inf \(float\)"),
        ("10 ** 400", r"returned 10+ \.\.\. and 321 more characters \(int\)"),
        ("10 ** 5000", "returned a value of type int"),
        ("'1.0'", r"returned '1.0' \(str\)"),
        ("[1.0]", r"returned \[1.0\] \(list\)"),
        (
            "1 / 0",
            "raised ZeroDivisionError: division by zero .line 13 of given.py: return eval",
        ),
        ("float('a\\nb')", r"raised ValueError: could not convert string to float: 'a\\nb'"),
        ("1 +", r"raised SyntaxError: .* \(line 13 of given.py: return eval"),
        ("read", "raised EOFError: EOF when reading a line"),
        ("stop", r"raised SystemExit: 4 \(line 9 of given.py"),
        ("exit", "its process ended with exit code 3$"),
        ("killed", "its process was killed by SIGKILL, perhaps because memory ran out"),
        ("-1e200", r"returned -1e\+200 .float., expected at most 1e\+150 in magnitude"),
    ],
)
def test_what_is_wrong_names_the_completion(one: Rewards, completion: str, told: str) -> None:
    assert re.match(f"completion 2: {told}", fails(one, "1", completion, "2"))
    assert one(judged("4"))[0] == [4.0]  # the next call is answered as if nothing had been


def test_what_a_killed_function_started_is_killed_too(folder, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    with Rewards.of(f"{folder}/given.py:one", calls=Calls(1)) as rewards:
        assert "took more than 1 s" in fails(rewards, "group")
    assert ends(int((tmp_path / "child").read_text()), 5)


def ends(process: int, seconds: float) -> bool:
    """Whether a process is gone, or a zombie, within so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            about = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            return True
        if about.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def test_a_process_ends_when_the_one_that_asks_is_killed(folder: Path) -> None:
    script = (
        "import os, threading; from lorafold.rewards import *\n"
        f"reward = reward_of({f'{folder}/given.py:one'!r})\n"
        "print(int(reward([Judged('', 'id', {}, '')])[0]), flush=True)\n"
        "threading.Timer(0.2, lambda: os.kill(os.getpid(), 9)).start()\n"
        "reward([Judged('', 'slow', {}, '')])"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert ends(int(done.stdout), 20)


@pytest.mark.parametrize(
    ("completion", "told"),
    [
        ("![1.0]", "completion 1 to rows.jsonl row 7, completion 2: returned 1 rewards, expect"),
        ("!1.0", "completion 1 to rows.jsonl row 7, completion 2: returned 1.0 .float., expect"),
        ("!'ab'", "completion 1 to rows.jsonl row 7, completion 2: returned 'ab' .str., expect"),
        ("![1, '2']", r"completion 2: returned '2' \(str\), expected a finite number"),
        ("!1/0", "completion 1 to rows.jsonl row 7, completion 2: raised ZeroDivisionError"),
        ("!time.sleep(99)", "completion 1 to rows.jsonl row 7, completion 2: took more than 4"),
    ],
)
def test_what_is_wrong_with_a_batch(batch: Rewards, completion: str, told: str) -> None:
    assert re.match(told, fails(batch, completion, "b", wanted=1))


def test_rows_that_lack_a_field_or_cannot_be_sent(batch: Rewards) -> None:
    rows = [*judged("a", wanted=1), *judged("b", "c", other=2)[1:]]
    with pytest.raises(LorafoldError, match=r"completion 2: needs .* wanted; the row .* other$"):
        batch(rows)
    assert "completion 1: the row can't be pickled" in fails(batch, "a", wanted=lambda: 1)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("no.py:f", None, r"there is no file .*no.py$"),
        ("a.py:f", "def f(:", r"a.py can't be run: SyntaxError: .* \(line 1 of a.py\)"),
        ("b.py:f", "\nimport none_such", r"b.py can't be run: ModuleNotFound.*\(line 2 of b.py"),
        ("c.py:f", "exit(3)", r"c.py can't be run: SystemExit: 3 \(line 1 of c.py"),
        ("d.py:f", "import os; os._exit(5)", r"while loading, its process ended with ex"),
        ("given.py:no", None, "expected a function no in given.py, found none; the file has one"),
        ("given.py:NUMBER", None, "expected a function NUMBER in given.py, found a int"),
        ("given.py:other", None, "found the parameters text; expected prompt or completion or"),
        ("e.py:f", "def f(prompt, completions): 1", "found the parameters prompt, completions; "),
        ("regex:(", None, "not a regular expression: missing .* at position 0"),
        ("schema:no.json", None, "the file can't be read: No such file"),
        ("schema:a.json", "{", "the file is not JSON: Expecting property name"),
        ("schema:b.json", '{"not": {}}', r"the file is not a supported JSON schema: .*\[\"not\"\]"),
        ("reasoning-gym:none_such", None, "reasoning-gym can't be imported|unknown task 'none_s"),
    ],
)
def test_what_cannot_judge_is_told_at_the_door(
    name: str, content: str | None, told: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if content is not None:
        Path(re.split(r"(?:schema:)?([\w.]+)", name)[1]).write_text(content)
    if name == "schema:b.json":
        pytest.importorskip("llguidance")
    with pytest.raises(LorafoldError, match=f"^reward {re.escape(name)}: ({told})"):
        reward_of(name)


@pytest.mark.parametrize("name", ["count", "a.py", "regex:", "a.py:f g", "2*", "x:y", ""])
def test_a_name_of_no_form(name: str) -> None:
    with pytest.raises(LorafoldError, match=r"expected FILE\.py:fn, regex:PATTERN, schema"):
        reward_of(name)


def test_sums_with_weights_and_patterns_over_lines(one: Rewards, folder: Path) -> None:
    names = ["-0.5*regex:a.*b", ".25 * " + f"{folder}/given.py:every", "1e1*regex:[ab]+"]
    with Rewards.of(*names) as rewards:
        sums, each = rewards(judged("a\nb", "ab", "abc", n=2))
        assert list(rewards.weights.values()) == [-0.5, 0.25, 10.0]
    assert each["regex:a.*b"] == [1.0, 1.0, 0.0]
    assert each["regex:[ab]+"] == [0.0, 1.0, 0.0]
    assert sums == [-0.5 + 0.75, -0.5 + 0.75 + 10.0, 0.75]


def test_none_is_a_reward_that_does_not_apply(one: Rewards, batch: Rewards, folder: Path) -> None:
    """As in TRL it has no part in the sum, and without any other there is none."""
    assert batch([*judged("![3, None]", wanted=1), *judged("b", wanted=1)])[0] == [3.0, None]
    names = [f"2*{folder}/given.py:one", f"-1*{folder}/given.py:other_one"]
    with Rewards.of(*names) as rewards:
        sums, each = rewards(judged("None", "1", "note", note=None))
    assert each[f"{folder}/given.py:one"] == [None, 1.0, None]
    assert each[f"{folder}/given.py:other_one"] == [None, None, 5.0]
    assert sums == [None, 2.0, -5.0]


def test_a_sum_that_weights_make_too_large(one: Rewards, folder: Path) -> None:
    with Rewards.of(f"1e149*{folder}/given.py:one", "regex:a") as rewards:
        assert rewards(judged("1"))[0] == [1e149]
        told = fails(rewards, "1", "99")
        most = "expected at most 1e+150 in magnitude"
        assert told == f"completion 2: the weighted sum is 9.9e+150, {most}"


def test_a_pattern_that_backtracks_for_ever_is_ended() -> None:
    with Rewards.of("regex:(a+)+b", calls=Calls(0.5)) as rewards:
        assert "completion 2: took more than 0.5 s" in fails(rewards, "ab", "a" * 60)
        assert rewards(judged("aab"))[0] == [1.0]


def test_a_schema(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object", "required": ["n"], "additionalProperties": False,
        "properties": {"name": {"type": "string"}, "n": {"type": "integer", "minimum": 0}},
    }  # fmt: skip
    (tmp_path / "s.json").write_text(json.dumps(schema))
    fits = ['{"n": 1}', '{"name": "é", "n": 12}', ' \n{\n  "n":3}\n']
    unfit = ['{"n": 1', '{"n": -1}', '{"n": 1} yes', '{"name": "x"}', '{"n": 1, "b": 2}', "", "1"]
    with Rewards.of(f"schema:{tmp_path}/s.json") as rewards:
        assert rewards(judged(*fits, *unfit))[0] == [1.0] * len(fits) + [0.0] * len(unfit)


def test_functions_of_this_process() -> None:
    known = object()

    def scored(completion: str, mark: object) -> Any:
        return np.float32(0.5) if mark is known else np.bool_(True)

    rewards = Rewards.of(scored, lambda completions: np.arange(len(completions)))
    sums, each = rewards(judged("a", "b", mark=known))
    assert sums == [0.5, 1.5]
    assert list(each) == ["scored", "<lambda>"]
    numbered = Rewards.of(lambda completion: 1, lambda completion: 2, lambda completion: 4)
    assert list(numbered.weights) == ["<lambda>", "<lambda> 2", "<lambda> 3"]
    assert numbered(judged("a"))[0] == [7.0]
    assert rewards(judged("a", mark=1))[0] == [1.0]
    assert re.match("completion 1: needs the fields mark; the row has none", fails(rewards, "a"))
    failing = Rewards.of(lambda completion: float(completion))
    told = r"completion 2: raised ValueError: .* \(line \d+ of test_rewards.py: failing = "
    assert re.match(told, fails(failing, "1", "x"))


def test_what_is_known_of_a_completion_is_given_where_it_is_named(folder: Path) -> None:
    def long(completion: str, tokens: int, ended: str, step: int | None) -> float:
        return -tokens if ended == "length" else step or 0.5

    sampled = {"tokens": 3, "ended": "length", "step": 7}
    ends = [sampled, sampled | {"ended": "stop"}, sampled | {"ended": "stop", "step": None}]
    given = [Judged("ask", "x", {}, "row 1", sampled=one) for one in ends]
    assert Rewards.of(long)(given)[0] == [-3.0, 7.0, 0.5]
    assert Rewards.of(lambda tokens: -tokens)(given)[0] == [-3.0] * 3
    with Rewards.of(f"{folder}/given.py:every") as rewards:  # ** is for fields of rows
        assert rewards(given)[0] == [0.0] * 3
    own = [Judged("ask", "x", {"tokens": 9}, "row 1", sampled=one) for one in ends]
    assert Rewards.of(lambda completions, tokens: tokens)(own)[0] == [9.0] * 3


TRIES, RUNNING = Counter[str](), [0, 0]  # calls of each completion; calls now, and at most


async def slowly(completion: str) -> float | None:
    """Fails as often as the completion says, after which it is its length."""
    RUNNING[0] += 1
    RUNNING[1] = max(RUNNING)
    TRIES[completion] += 1
    try:
        await asyncio.sleep(99 if completion == "stuck" else 0.02)
    finally:
        RUNNING[0] -= 1
    if completion == "exit":
        sys.exit(3)
    if TRIES[completion] <= completion.count("!"):
        raise ConnectionError("no route")
    return len(completion) if completion else None


LOCK = asyncio.Lock()


async def one_by_one(completion: str) -> int:
    async with LOCK:  # belongs to the loop of its first use, as clients of libraries do
        await asyncio.sleep(0.01)
    if completion == "cancel":
        raise asyncio.CancelledError
    return len(completion)


class Lately:
    async def __call__(self, completions: list[str]) -> list[int]:
        await asyncio.sleep(0)
        return [*map(len, completions)]


def test_asynchronous_functions_run_at_once_and_again() -> None:
    TRIES.clear()
    RUNNING[:] = 0, 0
    texts = [str(n) * n for n in range(1, 40)]
    rewards = Rewards.of(slowly, calls=Calls(concurrency=7))
    assert rewards(judged(*texts, "", "ab!!"))[0] == [*map(len, texts), None, 4.0]
    assert RUNNING == [0, 7]
    assert TRIES["ab!!"] == 3
    told = r"completion 2: raised ConnectionError: no route \(line \d+ of .*\) \(tries: 3\)"
    assert re.match(told, fails(rewards, "c", "d!!!"))
    quick = Rewards.of(slowly, calls=Calls(0.2, retries=0))
    assert fails(quick, "c", "stuck").startswith("completion 2: took more than 0.2 s (tries: 1)")
    assert "raised SystemExit: 3" in fails(quick, "exit")
    assert Rewards.of(Lately())(judged("a", "bc"))[0] == [1.0, 2.0]
    with Rewards.of((0.5, one_by_one)) as halves:
        assert [halves(judged("a", "bc"))[0] for _ in range(3)] == [[0.5, 1.0]] * 3
        assert re.match("completion 2: raised CancelledError", fails(halves, "a", "cancel"))
        assert halves(judged("abc"))[0] == [1.5]
    told = "completion 1: returned a coroutine; declare the function with async def"
    assert fails(Rewards.of(lambda completion: slowly(completion)), "a") == told

    async def in_a_notebook() -> Any:  # whose thread runs an event loop
        return [Rewards.of(one)(judged("abc"))[0] for one in (slowly, Lately())]

    assert asyncio.run(in_a_notebook()) == [[3.0], [3.0]]


def test_an_asynchronous_function_of_a_file_lacks_a_field(tmp_path: Path) -> None:
    text = "async def one(completion, wanted):\n    return wanted\n"
    (tmp_path / "late.py").write_text(text)
    with Rewards.of(f"{tmp_path}/late.py:one") as rewards:
        assert rewards(judged("a", "b", wanted=2))[0] == [2.0, 2.0]
        assert fails(rewards, "a", "b") == "completion 1: needs the fields wanted; the row has none"


class Service(BaseHTTPRequestHandler):
    """A judge that scores a text by its letters, after answers that its model names for texts of a
    multiple of so many letters: a status, a type of content, or none in time.
    """

    protocol_version, asked = "HTTP/1.1", list[dict[str, Any]]()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        wrong, every = body["model"].split("/")
        question = body["messages"][0]["content"]
        again = every != "1" and question in [one["messages"][0]["content"] for one in self.asked]
        self.asked.append(body | {"key": self.headers["authorization"]})
        text = question.partition("Answer: ")[2].strip()
        said = {"minus": "\u2212{}", "of": "**{}/10**", "apart": "{} / 10"}.get(wrong, "no, {},0.")
        ended = "length" if wrong == "cut" else "stop"
        choice = {"message": {"content": said.format(len(text))}, "finish_reason": ended}
        answer = json.dumps({"choices": [choice]})
        status = 200
        fails = wrong.isdigit() or wrong in ("html", "silent", "slow")
        if fails and len(text) % int(every) == 0 and not again:
            status = int(wrong) if wrong.isdigit() else 200
            answer = {"html": "<html>", "silent": '{"choices": []}'}.get(wrong, wrong)
            time.sleep(3 * (wrong == "slow"))
        self.send_response(status)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        with suppress(OSError):  # whoever asked may have gone
            self.wfile.write(answer.encode())

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def service() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        Service.asked.clear()
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def rubric(folder: Path, url: str, model: str = "none/1", more: str = "") -> str:
    (folder / "judge.yaml").write_text(
        f"url: {url}\nmodel: {model}\nscale: 10\n{more}\n"
        "rubric: 'How well does it {{ prompt }} for {{ who }}? Answer: {{ completion }}'\n"
    )
    return f"judge:{folder}/judge.yaml"


@pytest.mark.parametrize("model", ["none/1", "503/5", "429/4"])
def test_a_judge_scores_by_its_rubric(model: str, service: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    name = rubric(tmp_path, service, model, "key: JUDGE_KEY\noptions: {temperature: 0}")
    texts = ["x" * n for n in range(1, 33)]
    with Rewards.of(f"0.5*{name}") as rewards:
        sums, each = rewards(judged(*texts, who="me"))
    assert each == {name: [len(text) / 10 for text in texts]}
    assert sums == [len(text) / 20 for text in texts]
    assert len(Service.asked) > len(texts) or model == "none/1"
    first = Service.asked[0]
    assert (first["key"], first["temperature"]) == ("Bearer secret", 0)
    assert "How well does it ask for me? Answer: x" in first["messages"][0]["content"]


@pytest.mark.usefixtures("unestimated")
def test_a_busy_judge_changes_no_run(service: str, tiny_model_dir, tmp_path: Path) -> None:
    rows = [{"prompt": text, "who": "me"} for text in ("Name a tree.", "And a lake?")]
    options = {"group": 4, "max_new_tokens": 6, "reward_concurrency": 3}
    recipe = lf.Recipe(
        objective="grpo", steps=3, batch=2, max_length=96, storage="fp32", objective_options=options
    )
    for model in ("none/1", "503/2"):
        judge = (0.5, rubric(tmp_path, service, model))
        out = tmp_path / model.replace("/", "-")
        lf.train(recipe, data=rows, rewards=[judge], out=out, model=tiny_model_dir("llama"))
    weights = [path.read_bytes() for path in sorted(tmp_path.glob("*/adapter_model.safetensors"))]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("500/1", r"answered 500: '500' \(tries: 3\)"),
        ("401/1", "answered 401: '401', expected a chat completion"),
        ("307/1", "answered 307: '307', expected a chat completion"),
        ("html/1", "answered 200: '<html>', expected a chat completion"),
        ("silent/1", "expected a chat completion"),
        ("slow/1", r"took more than 0.5 s \(tries: 3\)"),
    ],
)
def test_a_judge_that_fails(model: str, told: str, service: str, tmp_path: Path) -> None:
    with Rewards.of(rubric(tmp_path, service, model), calls=Calls(0.5)) as rewards:
        assert re.search(told, fails(rewards, "abc", who="me"))


@pytest.mark.parametrize(
    ("model", "reward"), [("minus/1", -0.3), ("of/1", 0.3), ("apart/1", 0.3), ("cut/1", None)]
)
def test_scores_as_judges_write_them(model, reward, service: str, tmp_path: Path) -> None:
    with Rewards.of(rubric(tmp_path, service, model)) as rewards:
        assert rewards(judged("abc", who="me"))[0] == [reward]


def test_a_time_to_wait_is_a_number_or_a_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert 50 < seconds_of(date) <= 60
    assert [seconds_of(text) for text in ("1.5", "", "\u00b2", "soon")] == [1.5, 0, 0, 0]


def test_a_judge_without_a_number_has_no_reward(service: str, tmp_path: Path) -> None:
    with Rewards.of(rubric(tmp_path, service, more="pattern: '[A-F]$'")) as rewards:
        assert rewards(judged("abc", who="me"))[0] == [None]
        assert "rubric: 'who' is undefined" in fails(rewards, "abc")
    with Rewards.of(rubric(tmp_path, service, more="pattern: '[a-z]+'")) as rewards:
        assert fails(rewards, "abc", who="me").endswith("pattern: found 'no', expected a number")
    with Rewards.of(rubric(tmp_path, "http://127.0.0.1:1/v1"), calls=Calls(retries=0)) as rewards:
        told = "completion 1: http://127.0.0.1:1/v1/chat/completions: All connection attempts"
        assert fails(rewards, "abc", who="me").startswith(told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("url: u\nmodel: m\nrubric: x", "url: String should match pattern"),
        ("url: http://u\nmodel: m\nrubric: x", r"rubric: found no \{\{ completion \}\} in judge"),
        ("url: http://u\nmodel: m\nrubric: '{{ completion }}'\npattern: (a)(b)", "found 2 groups"),
        ("url: http://u\nmodel: m", "rubric: Field required, in judge.yaml"),
        ("url: http://u\nmodel: m\nrubric: x\nprompt: y", "prompt: Extra inputs are not permitted"),
        ("url: http://u\nmodel: m\nrubric: '{{'", "judge.yaml can't be used: unexpected"),
        ("url: http://u\nmodel: m\nrubric: x\npattern: '('", "judge.yaml can't be used: missing"),
        ("url: http://u\nmodel: m\nrubric: x\nkey: NO_SUCH", "key: found no environment var"),
        ("- url", "the file: Input should be a valid dictionary"),
        ("url: [", "judge.yaml can't be used: while parsing"),
        (None, "judge.yaml can't be used: .*No such file"),
    ],
)
def test_a_judge_that_is_not_one(text: str | None, told: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "judge.yaml").write_text(text)
    with pytest.raises(LorafoldError, match=told):
        reward_of(f"judge:{tmp_path}/judge.yaml")


class Lengths:
    """A reward that others wrote, and that is wrong at times."""

    name, weight = "lengths", 2.0

    def __call__(self, judged: list[Judged]) -> list[Any]:
        found = [len(one.completion) for one in judged]
        return [None if n == 1 else n for n in found if n]

    def close(self) -> None:
        """Nothing runs."""


def test_rewards_of_others_and_what_is_wrong_with_several(one: Rewards) -> None:
    rewards = Rewards.of(Lengths())
    assert rewards(judged("ab", "abc"))[0] == [4.0, 6.0]
    assert fails(rewards, "ab", "").endswith("returned 1 rewards, expected 2, one per completion")
    assert rewards(judged("ab", "a"))[0] == [4.0, None]
    for make, told in [
        (lambda: Rewards.of(len, len), "found the parameters obj"),
        (lambda: Rewards([Lengths(), Lengths()]), "rewards: found lengths more than once"),
        (lambda: Rewards([Lengths()], calls=Calls(0)), "rewards: found a time limit of 0 s"),
        (lambda: Rewards([Lengths()], calls=Calls("3")), "rewards: found a time limit of '3', exp"),
        (lambda: reward_of("nan*regex:a"), "found weight nan, expected a finite number"),
    ]:
        with pytest.raises(LorafoldError, match=told):
            make()


def test_a_verifier_of_reasoning_gym() -> None:
    gym = pytest.importorskip("reasoning_gym")
    entries = list(gym.create_dataset("chain_sum", size=3, seed=1))
    answers = [entry["answer"] for entry in entries]
    with Rewards.of("reasoning-gym:chain_sum") as rewards:

        def scored(text: str, row: dict[str, Any]) -> float:
            return rewards([Judged("q", text, row, "rows.jsonl row 7, completion 1")])[0][0]

        for entry, answer in zip(entries, answers, strict=True):
            row = {"answer": answer, "metadata": json.dumps(entry["metadata"])}
            assert scored(answer, row) == scored(f" {answer}\n", {"entry": entry}) == 1.0
            assert scored(f"So <answer> {answer} </answer>", {"entry": json.dumps(entry)}) == 1.0
            assert scored(str(int(answer) + 1), row) < 0.1
        assert "found no answer and metadata in the row" in fails(rewards, "1")
        other = {"answer": "1", "metadata": {"source_dataset": "maze"}}
        assert "found an entry of the task maze" in fails(rewards, "1", **other)
    with pytest.raises(LorafoldError, match=r"unknown task 'chain_sums', .* chain_sum"):
        reward_of("reasoning-gym:chain_sums")


MANY = {  # an answer of each task whose entries have none, as many are right; and what it is worth
    "boxnet": ("[]", 0.05), "graph_color": (None, 1.0), "propositional_logic": (None, 0.25),
    "rubiks_cube": (None, 1.0), "rush_hour": ("F+1", 0.01),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("task", MANY)
def test_a_verifier_of_a_task_with_many_right_answers(task: str) -> None:
    gym = pytest.importorskip("reasoning_gym")
    entry = gym.create_dataset(task, size=1, seed=3)[0]
    assert entry["answer"] is None
    about, (answer, score) = entry["metadata"], MANY[task]
    known = about.get("possible_answer") or about.get("example_correct_answer")
    text = answer or (known if isinstance(known, str) else json.dumps(known))
    own = {"metadata": json.dumps(about)}
    with Rewards.of(f"reasoning-gym:{task}") as rewards:
        for row in ({"entry": json.dumps(entry)}, own, own | {"answer": None}):
            found = rewards([Judged("q", text, row, "row 1"), Judged("q", "no", row, "row 1")])[0]
            assert found[0] >= score >= found[1]
        assert "found no metadata in the row" in fails(rewards, "1")
