"""Gauges of adapters, the metrics that routers read, and the reasons for a refused adapter."""

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path
from threading import Event

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from safetensors.torch import load_file, save_file

import lorafold as lf
from engine_cases import evict
from lorafold.serving import metrics
from lorafold.serving.run import _print_summary
from serving_cases import ADMIN, Running, running, saved, until

pytest_plugins = ["serving_fixtures"]
Samples = dict[tuple[str, ...], float]


@pytest.fixture
def server(serve_once) -> Running:
    return serve_once({name: lf.LoRA(rank=2) for name in "abc"}, slots=2)


def sampled(server: Running, name: str) -> Samples:
    """The values of a metric, by the values of its labels."""
    found = {}
    for family in text_string_to_metric_families(server.metrics()):
        for sample in family.samples:
            if sample.name == name:
                found[tuple(sample.labels[key] for key in sorted(sample.labels))] = sample.value
    return found


def test_every_adapter_has_its_state_time_and_tokens(server: Running) -> None:
    found = server.parts.registry.adapters
    assert evict(server.engine.adapters, found["b"].key)
    server.manage("c", "quarantine")
    server.text("a", "The")
    assert sampled(server, "lorafold_adapter_state") == {
        ("a", "resident"): 1, ("b", "cold"): 1, ("c", "quarantined"): 1,
    }  # fmt: skip
    seconds = sampled(server, "lorafold_adapter_load_seconds")
    assert seconds.keys() == {("a",), ("b",), ("c",)}
    assert all(0 < took < 60 for took in seconds.values())
    assert sampled(server, "lorafold_adapter_tokens_total")["a", "completion"] == 8
    assert sampled(server, "lorafold_adapter_first_token_seconds_count") == {("a",): 1}
    server.load("b", "unload")
    assert ("b",) not in sampled(server, "lorafold_adapter_load_seconds")


def test_many_adapters_share_a_label(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_LABELS", 1)
    assert sampled(server, "lorafold_adapter_state") == {
        ("a", "resident"): 1, ("other", "resident"): 2,
    }  # fmt: skip
    assert len(sampled(server, "lorafold_adapter_load_seconds")) == 2


def test_routers_read_which_adapters_have_requests(server: Running) -> None:
    assert list(sampled(server, "vllm:lora_requests_info")) == [("2", "", "")]
    base, engine = server.parts.registry.base, server.engine
    step, going = engine.step, Event()
    going.set()
    engine.step = lambda: going.wait() and (time.sleep(0.01) or step())  # type: ignore[method-assign]
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.complete, m, "The", max_tokens=90) for m in ("b", base)]
        until(lambda: server.parts.host.running() == 2)
        going.clear()  # however long the rest takes
        asked += [pool.submit(server.complete, m, "The", max_tokens=3) for m in "ca"]
        until(lambda: server.parts.host.waiting() == 2)
        now = time.time()
        info = sampled(server, "vllm:lora_requests_info")
        waiting = sampled(server, "vllm:num_requests_waiting")
        running = sampled(server, "vllm:num_requests_running")
        full = sampled(server, "vllm:kv_cache_usage_perc")
        going.set()
        assert all(one.result().status == 200 for one in asked)
    # labels by name: max_lora, running_lora_adapters, waiting_lora_adapters
    ((labels, stamp),) = info.items()
    assert labels == ("2", "b", "a,c")
    assert abs(stamp - now) < 5
    assert (waiting[()], running[()]) == (2, 2)
    assert 0 < full[()] <= 1
    until(server.idle)
    assert sampled(server, "vllm:kv_cache_usage_perc")[()] == 0


def test_a_long_reason_is_cut(llama: Path, tmp_path: Path) -> None:
    here, good = tmp_path / "adapters", saved(llama, {"a": lf.LoRA(rank=2)}, tmp_path / "good")
    for name in ("tensors", "options", "long"):
        shutil.copytree(good / "a", here / name)
        (here / name / "manifest.json").unlink()
    file = here / "tensors" / "adapter_model.safetensors"
    strays = {f"stray.{i}": torch.zeros(1) for i in range(3000)}
    save_file(load_file(file) | strays, file)
    many = {f"option_{i}": i for i in range(3000)}
    for name, more in {"options": many, "long": {"y" * 10**6: 1}}.items():
        config = here / name / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | more))
    with running(llama, here) as server:
        wrong = server.ask("/admin/adapters", key=ADMIN).json["wrong"]
        loaded = [server.load(name).json["error"]["message"] for name in wrong]
        told = StringIO()
        _print_summary(server.parts, "here", Console(file=told, width=10**6))
    assert wrong.keys() == {"tensors", "options", "long"}
    for text in (*wrong.values(), *loaded, *told.getvalue().splitlines()):
        assert len(text) < 2200
    assert "found 1,000,000 characters" in wrong["long"]
    assert wrong["options"].endswith("and 2,995 more")
    assert re.search(r"and [\d,]+ more", wrong["tensors"])
