"""What comes with an adapter is read in processes that can be killed, and what they say holds."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken

import lorafold as lf
from adapter_files import CONFIG, RECORD, WEIGHTS, change, json_of, tensors_of
from adapter_files import configure as changed
from lorafold.data.chat_template import template_of
from lorafold.data.render import render
from lorafold.data.tool_calls import parse_calls
from lorafold.errors import Busy, LorafoldError
from lorafold.files.contents import Contents
from lorafold.identity import of_adapter
from lorafold.models.tokenizer import load_tokenizer
from lorafold.peft.adapter_directory import FILES
from lorafold.serving.rendering import Renderer
from lorafold.verification import worker_pool
from lorafold.verification.adapter_tokenizer import MAX_CRASHES, AdapterTokenizer
from lorafold.verification.checks import CPU_SECONDS, Sandbox, VerifiedFiles
from lorafold.verification.worker_pool import CheckFailed, WorkerPool
from serving_cases import TOOL_TEMPLATE, saved

ASK = [{"role": "user", "content": "Hello"}]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
NAMES = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qkvo"]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}{{ ns.x }}"
)


@pytest.fixture(scope="module")
def base(tiny_model_dir) -> Any:
    return load_tokenizer(tiny_model_dir("llama"))


@pytest.fixture(scope="module")
def sandbox(base) -> Iterator[Sandbox]:
    found = Sandbox(lambda: NAMES, base)
    yield found
    found.close()


@pytest.fixture
def adapter(tiny_model_dir, tmp_path) -> Path:
    return saved(tiny_model_dir("llama"), {"a": lf.LoRA(rank=2)}, tmp_path / "in") / "a"


def verified(sandbox: Sandbox, path: Path) -> VerifiedFiles:
    return sandbox.verify(path, FILES, CONFIG, RECORD, ("base", "over"))


def opened(
    sandbox: Sandbox, base: Any, folder: Path, template: str, *words: str
) -> AdapterTokenizer | None:
    """The tokenizer of the base with another template, and new words."""
    own = load_tokenizer(base.name_or_path)
    own.chat_template = template
    if words:
        own.add_tokens(list(words), special_tokens=True)
    own.save_pretrained(folder)
    return sandbox.open(Contents(folder, TOKENIZER))


def test_files_are_named_by_their_digest_and_their_form(sandbox, adapter) -> None:
    first = verified(sandbox, adapter)
    assert first.digest_of(FILES) == of_adapter(adapter, words=False) == of_adapter(adapter)
    assert set(first.files) == {*FILES, "manifest.json"}
    change(adapter, lambda tensors: [t.add_(1) for t in tensors.values()])
    other = verified(sandbox, adapter)
    assert other.digest_of(FILES) != first.digest_of(FILES)
    assert other.form == first.form
    changed(adapter, lora_alpha=3)
    assert verified(sandbox, adapter).form != first.form


def test_what_is_wrong_is_told_in_one_line(sandbox, adapter) -> None:
    for fields, told in (
        ({"lora_alpha": float("nan")}, "found NaN, expected a finite number"),
        ({"target_modules": "(q_proj"}, "target_modules: found an invalid regular expression"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: found an invalid regular expression"),
    ):
        changed(adapter, **fields)
        with pytest.raises(LorafoldError, match=told):
            verified(sandbox, adapter)
        changed(adapter, lora_alpha=8, target_modules=["q_proj"], rank_pattern={})
    config = (adapter / CONFIG).read_text()
    (adapter / CONFIG).write_text('{"a":' + "[" * 100_000)
    with pytest.raises(LorafoldError, match="nested"):
        verified(sandbox, adapter)
    (adapter / CONFIG).write_text(config)
    name, tensor = next(iter(tensors_of(adapter).items()))
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for value, dtype in product((float("nan"), float("-inf")), dtypes):
        spoiled = tensor.to(dtype).clone()
        spoiled.view(-1)[-1] = value
        change(adapter, lambda tensors, spoiled=spoiled: tensors.update({name: spoiled}))
        with pytest.raises(LorafoldError, match="found NaN or infinity"):
            verified(sandbox, adapter)


def test_a_pattern_that_never_ends_is_ended(adapter, base, monkeypatch) -> None:
    monkeypatch.setitem(CPU_SECONDS, "verify", 0.5)
    sandbox = Sandbox(lambda: ["a" * 60], base)
    changed(adapter, target_modules="(a|a)*b")
    begun = time.process_time()
    with pytest.raises(LorafoldError, match="time limit exceeded"):
        verified(sandbox, adapter)
    assert time.process_time() - begun < 1  # it is the child that worked
    changed(adapter, target_modules=["q_proj"])
    assert verified(sandbox, adapter).digest_of(FILES) == of_adapter(adapter)
    sandbox.close()


def test_processes_import_no_torch_and_end_with_the_screen(sandbox, adapter) -> None:
    verified(sandbox, adapter)
    process = sandbox._verifying._idle[0]
    maps = Path(f"/proc/{process.id}/maps").read_text()
    assert "libtorch" not in maps
    others = WorkerPool(lambda: {"modules": []}, 1)
    given = {"path": "/nowhere", "files": [], "config": "c", "record": "r", "read_by": []}
    with pytest.raises(CheckFailed, match="found no c"):
        others.call("verify", (5, 1 << 29), **given)
    own = others._idle[0]
    others.close()
    assert not own.is_alive


def test_a_template_renders_as_it_would_here(sandbox, base, tmp_path) -> None:
    found = opened(sandbox, base, tmp_path, TOOL_TEMPLATE, "<|new|>")
    assert found is not None
    here = load_tokenizer(base.name_or_path)
    here.chat_template = TOOL_TEMPLATE
    here.add_tokens(["<|new|>"], special_tokens=True)
    assert render(ASK, found, True) == render(ASK, here, True)
    text = "<|new|> Hello"
    ids = found(text, add_special_tokens=False).input_ids
    assert ids == here(text, add_special_tokens=False).input_ids
    assert found.decode(ids) == here.decode(ids)
    assert len(found) == len(here) == len(base) + 1


def test_the_base_s_own_tokenizer_is_the_base_s(sandbox, base, tmp_path) -> None:
    assert opened(sandbox, base, tmp_path, base.chat_template) is None


def test_reading_an_answer_back_asks_no_process(sandbox, base, tmp_path) -> None:
    found = opened(sandbox, base, tmp_path, TOOL_TEMPLATE)
    assert found is not None
    Renderer(found, frozenset(), found.variables)
    found.stop_caching()

    def nothing(do: str, **_: Any) -> None:
        raise AssertionError(f"{do} was asked for")

    found._ask = nothing
    said = '<tool_call>\n{"name": "look", "arguments": {"x": "y"}}\n</tool_call>'
    (call,) = parse_calls(said, found)  # type: ignore[arg-type]
    assert call["function"] == {"name": "look", "arguments": {"x": "y"}}
    assert template_of(found).block.closing == "</think>"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (ENDLESS, "time limit exceeded|crashed"),  # probes come first, some of which die
        pytest.param(DOUBLING, "memory|time limit exceeded|crashed", marks=pytest.mark.slow),
    ],
)
def test_a_template_that_never_ends_is_ended_and_after_some_not_asked(
    sandbox, base, tmp_path, template, told
) -> None:
    found = opened(sandbox, base, tmp_path, template)
    assert found is not None
    found.stop_caching()
    with pytest.raises(LorafoldError, match=told):
        render(ASK, found)
    found._crashes.extend([time.monotonic()] * MAX_CRASHES)
    with pytest.raises(LorafoldError, match=r"crashed .* processes within"):
        render(ASK, found)


def test_a_rendering_has_its_time_in_a_process_that_just_began_too(
    sandbox, base, tmp_path, monkeypatch
) -> None:
    """What is counted is the rendering's, neither what is imported nor opening the tokenizer."""
    found = opened(sandbox, base, tmp_path, TOOL_TEMPLATE)
    assert found is not None
    found.stop_caching()
    monkeypatch.setitem(CPU_SECONDS, "render", 0.2)  # importing transformers takes more
    monkeypatch.setitem(CPU_SECONDS, "tokens", 0.2)
    for ask in (lambda: render(ASK, found), lambda: found("Hello").input_ids):
        while sandbox._rendering._idle:
            sandbox._rendering._idle.pop().kill()
        assert ask()


def test_a_busy_machine_is_no_mistake_of_a_template(sandbox, base, tmp_path, monkeypatch) -> None:
    found = opened(sandbox, base, tmp_path, TOOL_TEMPLATE)
    assert found is not None
    found.stop_caching()
    with monkeypatch.context() as patch:
        patch.setattr(worker_pool, "MIN_WALL_SECONDS", 0.2)
        patch.setattr(worker_pool, "WALL_FACTOR", 0.01)
        for _ in range(MAX_CRASHES):
            os.kill(sandbox._rendering._idle[-1].id, signal.SIGSTOP)
            with pytest.raises(Busy, match="the machine is busy"):
                render(ASK, found)
            sandbox._rendering._idle.append(worker_pool.Process(sandbox._rendering._first))
    assert "Hello" in render(ASK, found)


def test_a_tokenizer_that_does_not_fit_is_refused(sandbox, base, tmp_path) -> None:
    assert opened(sandbox, base, tmp_path, TOOL_TEMPLATE) is not None
    model = json_of(tmp_path, "tokenizer.json")["model"]
    vocabulary = model["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    changed(tmp_path, "tokenizer.json", model=model)
    with pytest.raises(LorafoldError, match="does not fit the base: token"):
        sandbox.open(Contents(tmp_path, TOKENIZER))
    shutil.rmtree(tmp_path)


def test_words_are_those_of_a_tokenizer_that_has_them(base):
    first, texts = len(base), ("<|new|>", "\u00e9<\u00e4>", "a b", "\u65e5\u672c")
    new = [(first + i, text, i % 2 == 0) for i, text in enumerate(texts)]
    library = deepcopy(base)
    library.add_tokens([AddedToken(t, special=s, normalized=False) for _, t, s in new])
    about = {"template": "", "special": {}, "eos": None, "variables": []}
    words = AdapterTokenizer(about | {"new": new}, base, base.added_tokens_decoder, print)
    assert (len(words), words.get_vocab()) == (len(library), library.get_vocab())
    draw = random.Random(0)
    for skip in (False, True):
        for _ in range(200):
            ids = [draw.choice((draw.randrange(first), draw.randrange(first, len(words)))) for _ in
                   range(draw.randrange(1, 8))]  # fmt: skip
            assert words.decode(ids, skip_special_tokens=skip) == library.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
    with pytest.raises(LorafoldError, match=f"expected {first}"):
        AdapterTokenizer(about | {"new": [(first + 1, "<|late|>", True)]}, base, {}, print)


@pytest.mark.parametrize(
    ("file", "before", "after", "told"),
    [
        ("adapter_config.json", '"r": 2', '"r": 2, "r": 3', "duplicate"),
        ("adapter_config.json", '"revision": null', '"revision": "\\ud800"', "unpaired surrogate"),
        ("adapter_config.json", '"r": 2', '"r": 1' + "0" * 30, "63 bits"),
        ("adapter_model.safetensors", '"F32"', '"F8_E4M3"', "dtype"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(sandbox, adapter, file, before, after, told):
    content = (adapter / file).read_bytes()
    (adapter / "manifest.json").unlink()
    if file.endswith(".safetensors"):
        size = int.from_bytes(content[:8], "little")
        head = content[8 : 8 + size].replace(before.encode(), after.encode())
        (adapter / file).write_bytes(len(head).to_bytes(8, "little") + head + content[8 + size :])
    else:
        (adapter / file).write_bytes(content.replace(before.encode(), after.encode(), 1))
    with pytest.raises(LorafoldError, match=told):
        verified(sandbox, adapter)


def test_bytes_after_the_tensors_are_refused(sandbox, adapter):
    (adapter / "manifest.json").unlink()
    with (adapter / WEIGHTS).open("ab") as file:
        file.write(bytes(64))
    with pytest.raises(LorafoldError, match="64 bytes after the last tensor"):
        verified(sandbox, adapter)


def test_closing_does_not_wait_for_what_runs(adapter):
    changed(adapter, exclude_modules="(([a-z._0-9])+)+X")
    others = WorkerPool(lambda: {"modules": NAMES}, 1)
    endless: dict[str, Any] = {"path": str(adapter), "files": FILES, "config": CONFIG}
    endless |= {"record": "", "told": []}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(others.call, "verify", (1000.0, 1 << 30), **endless)
        while not others._busy:
            time.sleep(0.01)
        assert not asked.done()
        others.close()
        with pytest.raises(CheckFailed):
            asked.result()
    with pytest.raises(CheckFailed, match="shutting down"):
        others.call("verify", (1.0, 1 << 30), **endless)
