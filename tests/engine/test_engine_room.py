"""Files that are larger than they were, or than there is memory for, are refused before they are
read.
"""

from __future__ import annotations

import os
import shutil
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import lorafold as lf
from engine_cases import evict, prompt, save_adapters, with_large_weights
from lorafold.engine import Engine, Request
from lorafold.errors import LorafoldError

LARGE, LITTLE = 64 << 20, 4 << 20  # bytes


@pytest.fixture(scope="module")
def model(tiny_model) -> Any:
    return tiny_model("llama")


@pytest.fixture
def adapter(model, tmp_path) -> Path:
    return save_adapters(model, tmp_path, {"a": lf.LoRA(rank=2)})["a"]


@contextmanager
def taking_little() -> Iterator[None]:
    """What is done here takes little memory at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < LITTLE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "lorafold.json", "manifest.json"])
def test_what_grew_since_it_was_verified_is_not_read(model, adapter, name) -> None:
    with Engine(model, slots=1, length=32) as engine:
        engine.load("a", adapter)
        assert evict(engine.adapters, "a")
        os.truncate(adapter / name, LARGE)
        stream = engine.submit(Request("1", prompt(3, 0), 2, adapter="a"))
        with taking_little():
            engine.run()
    assert stream.result().reason == "failed"
    assert f"found more with {name}; if it changed, load it again" in stream.result().message


def test_weights_that_memory_has_no_room_for_are_not_read(model, adapter, tmp_path) -> None:
    large = shutil.copytree(adapter, tmp_path / "large")
    with_large_weights(large, LARGE // 4)
    with Engine(model, slots=1, length=32, adapter_bytes=LARGE // 2) as engine:
        engine.load("a", adapter)
        told = f"found {LARGE // 4:,} numbers, expected at most {LARGE // 8:,}"
        with taking_little(), pytest.raises(LorafoldError, match=told):
            engine.load("large", large)
        assert engine.adapters.names() == ("a",)
