"""`lorafold serve` as a process: what it refuses to start with, its messages, its end."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path

import pytest

import lorafold as lf
from conftest import lorafold
from lorafold.errors import LorafoldError
from lorafold.serving.registry import STATE, ServerState
from lorafold.serving.settings import read_if_exists, read_settings
from serving_cases import saved

HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]


@pytest.fixture(scope="module")
def adapters(tiny_model_dir, tmp_path_factory) -> Path:
    """Two good ones, one that is wrong, and a directory that is none."""
    folder = tmp_path_factory.mktemp("command")
    specs = {"a": lf.LoRA(rank=2), "b": lf.LoRA(rank=2)}
    found = saved(tiny_model_dir("llama"), specs, folder / "adapters")
    (found / "wrong").mkdir()
    (found / "wrong" / "adapter_config.json").write_text('{"peft_type": "LOHA?"}')
    (found / "notes").mkdir()
    return found


def refused(*arguments: str) -> str:
    done = lorafold("serve", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_what_it_does_not_start_with(tiny_model_dir, adapters, tmp_path):
    model = str(tiny_model_dir("llama"))
    both = ("--model", model, "--adapters", str(adapters))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}: 127.0.0.1 can't be listened at" in refused(*both, "--port", port)
    assert "keys are needed" in refused(*both, "--host", "0.0.0.0")
    assert "--adapters" in refused("--model", model)
    nowhere = str(tmp_path / "nowhere")
    assert "found no directory" in refused("--model", model, "--adapters", nowhere)
    assert nowhere in refused("--model", nowhere, "--adapters", str(adapters), "--port", "0")
    assert "can't be read" in refused(*both, "--keys", nowhere)
    assert "can't be read" in refused(*both, "--admin-key-file", nowhere)
    (tmp_path / "short").write_text("abc")
    assert "expected 16" in refused(*both, "--admin-key-file", str(tmp_path / "short"))
    config = tmp_path / "serve.yaml"
    for text, told in {
        "slot: 4": "slot: unknown, expected one of host, port",
        "limits: {queues: 4}": "limits.queues: unknown, expected one of body_bytes",
        "slots: 0": "slots: found 0",
        "slots: many": "slots: found 'many'",
        "- 1": "expected settings by name",
        "a: [": "not YAML",
    }.items():
        config.write_text(text)
        assert told in refused(*both, "--config", str(config))


def test_options_win_over_the_file(tmp_path):
    config = tmp_path / "serve.yaml"
    config.write_text("port: 1234\nslots: 3\nlimits: {choices: 2}\nweights: {gold: 2}\n")
    found = read_settings(config, {"port": 5, "host": None})
    assert (found.port, found.slots, found.host) == (5, 3, "127.0.0.1")
    assert (found.limits.choices, found.weights) == (2, {"gold": 2.0})
    with pytest.raises(LorafoldError, match="port: found 70000"):
        read_settings(None, {"port": 70000})


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[str], int]]:
    """The command in a process, what it printed until it listened, and its port."""
    command = [sys.executable, "-m", "lorafold", "serve", *arguments, "--port", "0"]
    few = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (256, HARD))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=few) as running:
        try:
            lines: list[str] = []
            assert running.stderr is not None
            while not (lines and "  python -m webbrowser http" in lines[-1]):
                line = running.stderr.readline()
                assert line, lines
                lines.append(line.rstrip())
            port = int(lines[-1].rsplit(":", 1)[1].strip("/"))
            for _ in range(200):
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield running, lines, port
        finally:
            running.kill()


def stream(port: int, tokens: int) -> HTTPConnection:
    at = HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"model": "a", "prompt": "The", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    at.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return at


def test_it_says_what_it_serves_and_drains(tiny_model_dir, adapters, tmp_path):
    (tmp_path / "serve.yaml").write_text("length: 160\n")
    options = ("--adapters", str(adapters), "--config", str(tmp_path / "serve.yaml"))
    with process(*options, "--storage", "fp32", "--json-logs") as (running, lines, port):
        told = "\n".join(lines)
        # which it takes again, whatever comes
        own = read_if_exists(adapters / STATE, ServerState).base
        assert own is not None
        assert own.name == str(tiny_model_dir("llama"))
        limits = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
        assert limits == (HARD, HARD)
        assert "3 adapters: a, b, wrong" in told
        assert "no adapters: notes" in told
        assert f"listening at http://127.0.0.1:{port}" in told
        curl = lines[-3].strip()
        answer = subprocess.run(curl, shell=True, capture_output=True, text=True, check=True)
        assert json.loads(answer.stdout)["object"] == "chat.completion"
        client = lines[-2].strip().replace(" python ", f" {sys.executable} ")
        subprocess.run(client, shell=True, capture_output=True, text=True, check=True)
        at = stream(port, 120)
        response = at.getresponse()
        first = response.readline()
        running.send_signal(signal.SIGTERM)
        rest = response.read().decode()
        assert first.startswith(b"data: ")
        assert rest.rstrip().endswith("data: [DONE]")  # what ran was let end
        out = running.communicate(timeout=60)[1]
        assert running.returncode == 0
        logged = [json.loads(line) for line in out.splitlines()]
        why = "not served: wrong: adapter_config.json: peft_type 'LOHA?'"
        assert [line for line in logged if line["message"].startswith(why)]
        asked = [line for line in logged if line.get("path") == "/v1/completions"]
        assert asked[0]["outcome"] == "ok"
        assert asked[0]["tokens"] == 120
        assert not any("prompt" in line or "The" in line.get("message", "") for line in logged)


@pytest.mark.slow
def test_while_it_drains_nothing_new_begins_and_a_second_signal_ends_it(tiny_model_dir, adapters):
    options = ("--model", str(tiny_model_dir("llama")), "--adapters", str(adapters))
    with process(*options, "--storage", "fp32") as (running, _, port):
        held = [stream(port, 500) for _ in range(16)]
        held[0].getresponse().readline()
        running.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        ready = HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            ready.request("GET", "/readyz")
            assert ready.getresponse().status == 503
        except ConnectionError:
            pytest.fail("it stopped listening before what runs had ended")
        running.send_signal(signal.SIGTERM)
        assert running.wait(10) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_process_that_was_paused_answers(tiny_model_dir, adapters, tmp_path):
    config = tmp_path / "serve.yaml"
    config.write_text("heartbeat_seconds: 1.5\n")
    options = ("--model", str(tiny_model_dir("llama")), "--adapters", str(adapters))
    with process(*options, "--config", str(config)) as (running, _, port):
        running.send_signal(signal.SIGSTOP)
        time.sleep(3)
        running.send_signal(signal.SIGCONT)
        assert stream(port, 2).getresponse().status == 200


@pytest.mark.slow
def test_texts_are_logged_only_if_asked_for(tiny_model_dir, adapters, tmp_path):
    config = tmp_path / "serve.yaml"
    config.write_text("log_texts: true\njson_logs: true\n")
    options = ("--model", str(tiny_model_dir("llama")), "--adapters", str(adapters))
    with process(*options, "--storage", "fp32", "--config", str(config)) as (running, _, port):
        stream(port, 4).getresponse().read()
        os.kill(running.pid, signal.SIGINT)
        out = running.communicate(timeout=60)[1]
        assert running.returncode == 0
        (line,) = [json.loads(one) for one in out.splitlines() if "completions" in one]
        assert line["prompt"] == "The"
        assert len(line["completions"]) == 1
