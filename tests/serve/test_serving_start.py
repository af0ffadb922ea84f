"""A server listens at once, verifies adapters meanwhile and sees new ones; `lorafold serve` as a
process.
"""

import json
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

import lorafold as lf
from conftest import lorafold
from engine_cases import evict, with_large_weights
from lorafold.engine import Engine
from lorafold.errors import Busy, LorafoldError
from lorafold.serving import verifier
from lorafold.serving.backend import AdapterFiles
from lorafold.serving.registry import STATE_FILE, DirectoryWatcher, ServerState
from lorafold.serving.run import bound_socket
from lorafold.serving.settings import Settings, read_if_exists, read_settings
from lorafold.serving.verifier import VerifiedCache
from lorafold.verification import worker_pool
from serving_cases import ADMIN, counted, no_descriptors, running, saved, until

pytest_plugins = ["serving_fixtures"]


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return saved(llama, {"a": lf.LoRA(rank=2), "b": lf.IA3()}, tmp_path / "in")


def arrives(folder: Path, like: str, name: str) -> None:
    shutil.copytree(folder / like, folder.parent / name)
    (folder.parent / name).rename(folder / name)


def test_it_serves_before_anything_was_verified(folder, llama, monkeypatch) -> None:
    monkeypatch.setattr(DirectoryWatcher, "begin", lambda self: None)
    with running(llama, folder) as server:
        assert server.parts.registry.adapters == {}
        listed = {one["id"]: one for one in server.ask("/v1/models").json["data"]}
        assert (listed["a"]["state"], listed["b"]["state"]) == ("unverified", "unverified")
        assert server.text("b", "Hello")
        assert set(server.parts.registry.adapters) == {"b"}
        assert server.ask("/admin/adapters", key=ADMIN).json["unverified"] == ["a"]
        assert server.ask("/v1/models/a").json["method"] == "lora"


def test_what_is_known_is_not_read_again_unless_it_was_touched(
    folder, llama, tiny_model_dir, monkeypatch
) -> None:
    monkeypatch.setattr("lorafold.files.contents.FRESH_SECONDS", -1.0)
    names = counted(monkeypatch)
    with running(llama, folder) as server:
        texts = [server.text(name, "Hello") for name in "ab"]
        first = {name: found.digest for name, found in server.parts.registry.adapters.items()}
    assert sorted(names) == ["a", "b"]
    with running(llama, folder) as server:
        assert [server.text(name, "Hello") for name in "ab"] == texts
        assert {n: found.digest for n, found in server.parts.registry.adapters.items()} == first
    assert sorted(names) == ["a", "b"]
    (folder / "b" / "README.md").write_text("new")
    with running(llama, folder):
        assert sorted(names) == ["a", "b", "b"]
    other = tiny_model_dir("llama-wide")  # what was found for one base is not for another
    with running(other, folder) as server:
        assert sorted(server.parts.registry.rejected) == ["a", "b"]


def test_two_that_write_what_is_known_at_once_lose_nothing(tmp_path, monkeypatch) -> None:
    file, write, threads = tmp_path / "seen.json", verifier.write_text, list[threading.Thread]()
    known = VerifiedCache(file, "this base")

    def put(name: str) -> None:
        numbers = {"old": "0" * 64, "digest": "0" * 64, "manifest": True, "stack": ()}
        known.put(AdapterFiles(name=name, path=tmp_path, method="lora", **numbers), {})
        known.save()

    def overtaken(path: Path, text: str) -> None:
        if not threads:
            threads.append(threading.Thread(target=put, args=("b",)))
            threads[0].start()
            threads[0].join(0.5)  # it ends, unless it waits for this one
        write(path, text)

    monkeypatch.setattr(verifier, "write_text", overtaken)
    put("a")
    threads[0].join()
    assert set(VerifiedCache(file, "this base").digests) == {"a", "b"}
    file.unlink()
    file.mkdir()  # what can't be written is written later
    put("c")
    file.rmdir()
    known.save()
    assert set(VerifiedCache(file, "this base").digests) == {"a", "b", "c"}
    other = VerifiedCache(file, "another base")  # for which nothing was verified
    assert other.adapters["c"].marks == {}


@pytest.mark.slow
def test_files_that_were_written_just_now_are_not_taken_for_known(
    folder, llama, monkeypatch
) -> None:
    monkeypatch.setattr("lorafold.files.contents.FRESH_SECONDS", 600.0)
    names = counted(monkeypatch)
    for _ in range(2):
        with running(llama, folder):
            pass
    assert sorted(names) == ["a", "a", "b", "b"]


def test_new_directories_and_mended_ones_are_seen(folder, llama, caplog) -> None:
    caplog.set_level(logging.WARNING, "lorafold")
    with running(llama, folder) as server:
        assert server.complete("c", "Hello").code == "model_not_found"
        arrives(folder, "a", "c")
        until(lambda: server.complete("c", "Hello").status == 200)
        assert server.text("c", "Hello") == server.text("a", "Hello")
        shutil.copytree(folder / "b", folder.parent / "d")
        config = folder.parent / "d" / "adapter_config.json"
        right = config.read_bytes()
        config.write_text("{")
        (folder.parent / "d").rename(folder / "d")
        until(lambda: "d" in server.parts.registry.rejected)
        assert server.complete("d", "Hello").code == "model_not_found"
        (folder / "d" / "adapter_config.json").write_bytes(right)
        until(lambda: "d" in server.parts.registry.adapters)
        assert server.text("d", "Hello") == server.text("b", "Hello")
    assert any(r.getMessage().startswith("adapter d is not served: ") for r in caplog.records)


def test_what_comes_while_nothing_can_be_opened_is_seen_afterwards(folder, llama, caplog) -> None:
    shutil.copytree(folder / "a", folder.parent / "c")
    with running(llama, folder) as server:
        with no_descriptors():
            (folder.parent / "c").rename(folder / "c")
            os.utime(folder, (10**9, 10**9))  # as if that was long ago
            until(lambda: "the directory of adapters can't be read" in caplog.text)
        until(lambda: server.complete("c", "Hello").status == 200, 5)


def test_a_file_that_comes_late_makes_an_entry_an_adapter(folder, llama) -> None:
    config = folder / "c" / "adapter_config.json"
    shutil.copytree(folder / "a", folder / "c", ignore=lambda *_: [config.name])
    os.utime(folder, (10**9, 10**9))
    with running(llama, folder) as server:
        assert "c" not in server.parts.registry.names()
        shutil.copy(folder / "a" / config.name, config)
        until(lambda: "c" in server.parts.registry.adapters, 5)


def test_what_the_machine_lacks_is_no_verdict(folder, llama, monkeypatch, caplog) -> None:
    """Neither file descriptors nor time on its processor."""
    with running(llama, folder) as server:
        registry, wait = server.parts.registry, worker_pool.MIN_WALL_SECONDS
        monkeypatch.setattr(worker_pool, "MIN_WALL_SECONDS", 0.0)
        monkeypatch.setattr(worker_pool, "WALL_FACTOR", 0.0)
        for process in registry.verifier._sandbox._verifying._idle:
            os.kill(process.id, signal.SIGSTOP)
        arrives(folder, "a", "c")
        until(lambda: "c can't be verified now: the machine is busy" in caplog.text)
        refused = server.complete("c", "Hello")
        assert (refused.status, refused.code) == (503, "machine_busy")
        assert int(refused.headers["retry-after"]) > 0
        assert "c" not in registry.rejected
        monkeypatch.setattr(worker_pool, "MIN_WALL_SECONDS", wait)
        until(lambda: server.complete("c", "Hello").status == 200)
    monkeypatch.setattr(DirectoryWatcher, "begin", lambda self: None)
    with running(llama, folder) as server:
        assert "c" in server.parts.registry.names()
        with no_descriptors(), pytest.raises(Busy):
            server.parts.registry.find("c")
        assert server.text("c", "Hello")


def test_an_adapter_that_names_another_base_is_served_and_told(folder, llama, caplog) -> None:
    caplog.set_level(logging.WARNING, "lorafold")
    path = folder / "a"
    for file in ("lorafold.json", "manifest.json"):  # as PEFT's have none
        (path / file).unlink()
    config = json.loads((path / "adapter_config.json").read_text())
    named = config | {"base_model_name_or_path": "somebody/another-base"}
    (path / "adapter_config.json").write_text(json.dumps(named))
    with running(llama, folder) as server:
        assert server.text("a", "Hello")
        notes = server.ask("/admin/adapters", key=ADMIN).json["notes"]
    assert set(notes) == {"a"}
    assert "names the base 'somebody/another-base'" in notes["a"]
    assert any("somebody/another-base" in record.getMessage() for record in caplog.records)


def test_an_adapter_that_was_trained_on_other_weights_is_told(folder, llama) -> None:
    model = lf.load_model(llama, storage="nf4")
    lf.attach(model, lf.LoRA(rank=2)).save(folder / "q")
    with running(llama, folder) as server:
        assert server.text("q", "Hello")
        notes = server.ask("/admin/adapters", key=ADMIN).json["notes"]
    assert notes == {"q": "trained on nf4 weights but served on fp32 ones, so outputs differ"}


def test_adapters_that_differ_in_values_alone_are_checked_against_the_base_once(
    folder, llama, monkeypatch
) -> None:
    for i in range(4):
        shutil.copytree(folder / "a", folder / f"a{i}")
    checked, verify = list[str](), Engine.verify

    def count(self: Engine, entry: Any) -> None:
        checked.append(entry.name.partition("@")[0])
        verify(self, entry)

    monkeypatch.setattr(Engine, "verify", count)
    with running(llama, folder, processes=3) as server:
        assert set(server.parts.registry.adapters) == {"a", "b", *(f"a{i}" for i in range(4))}
        assert server.text("a", "Hello") == server.text("a3", "Hello")
    assert 2 <= len(checked) <= 3  # two forms, with one of which both threads may begin


def test_what_memory_has_no_room_for_is_refused_by_its_header(folder, llama) -> None:
    with_large_weights(shutil.copytree(folder / "a", folder / "large"), 1 << 24)
    with running(llama, folder, adapter_bytes=32 << 20) as server:
        told = server.ask("/admin/adapters", key=ADMIN).json["wrong"]
        assert told.keys() == {"large"}
        assert "found 16,777,216 parameters, expected at most 8,388,608" in told["large"]
        assert server.text("a", "Hello")


def test_what_grew_is_not_read_and_the_log_says_why(folder, llama, caplog) -> None:
    with running(llama, folder) as server:
        before, key = server.text("a", "Hello"), server.parts.registry.adapters["a"].key
        weights = folder / "a" / "adapter_model.safetensors"
        size = weights.stat().st_size
        assert evict(server.engine.adapters, key)
        os.truncate(weights, 64 << 20)
        answer = server.complete("a", "Hello")
        assert (answer.status, answer.code) == (503, "adapter_unavailable")
        assert "found more with adapter_model.safetensors" in caplog.text
        os.truncate(weights, size)
        assert server.text("a", "Hello") == before


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
        assert f"--port {port}: can't listen on 127.0.0.1" in refused(*both, "--port", port)
    assert "keys are required" in refused(*both, "--host", "0.0.0.0")
    assert "--adapters" in refused("--model", model)
    nowhere = str(tmp_path / "nowhere")
    assert "not an existing directory" in refused("--model", model, "--adapters", nowhere)
    assert nowhere in refused("--model", nowhere, "--adapters", str(adapters), "--port", "0")
    assert "can't be read" in refused(*both, "--keys", nowhere)
    assert "can't be read" in refused(*both, "--admin-key-file", nowhere)
    (tmp_path / "short").write_text("abc")
    assert "expected at least 16" in refused(*both, "--admin-key-file", str(tmp_path / "short"))
    config = tmp_path / "serve.yaml"
    for text, told in {
        "slot: 4": "slot: unknown setting, expected one of host, port",
        "limits: {queues: 4}": "limits.queues: unknown setting, expected one of body_bytes",
        "slots: 0": "slots: found 0",
        "slots: many": "slots: found 'many'",
        "- 1": "expected a mapping of settings",
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
        own = read_if_exists(adapters / STATE_FILE, ServerState).base
        assert own is not None
        assert own.name == str(tiny_model_dir("llama"))
        limits = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
        assert limits == (HARD, HARD)
        assert "3 adapters: a, b, wrong" in told
        assert "ignored (no adapter_config.json): notes" in told
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
        why = "adapter wrong is not served: adapter_config.json: peft_type 'LOHA?'"
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


def test_what_is_sent_does_not_wait_for_acknowledgements() -> None:
    with bound_socket(Settings(port=0)) as at, socket.create_connection(at.getsockname()):
        connection, _ = at.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
