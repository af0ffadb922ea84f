"""`name@digest` pins all that changes an answer: whatever changes on the disk and is loaded has
another digest.
"""

import json
import logging
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import lorafold as lf
from engine_cases import save_adapters
from fresh_models import fresh_model
from lorafold.errors import LorafoldError
from lorafold.identity import joined, of_adapter
from lorafold.models.tokenizer import load_tokenizer, write_tokenizer
from lorafold.verification.checks import Sandbox
from serving_cases import ADMIN, Running, counted, running, saved

pytest_plugins = ["serving_fixtures"]
OLD = ("adapter_config.json", "adapter_model.safetensors", "lorafold.json", "manifest.json")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def edited(name: str, **fields: Any) -> Callable[[Path], None]:
    def alter(at: Path) -> None:
        content = json.loads((at / name).read_text())
        (at / name).write_text(json.dumps(content | fields))

    return alter


def written(name: str, text: str) -> Callable[[Path], None]:
    def alter(at: Path) -> None:
        (at / name).parent.mkdir(exist_ok=True)
        (at / name).write_text(text)

    return alter


def spaced(at: Path) -> None:
    """A tokenizer that gives other tokens: none of what was split before the space."""
    content = json.loads((at / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (at / "tokenizer.json").write_text(json.dumps(content))


def one_weight(at: Path) -> None:
    tensors = load_file(at / OLD[1])
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 8
    save_file(tensors, at / OLD[1], metadata={"format": "pt"})


CHANGES = {
    "a weight": one_weight,
    "alpha": edited(OLD[0], lora_alpha=77),
    "a key": edited(OLD[0], inference_mode=False),
    "the record": edited(OLD[2], note="another"),
    "the template": written("chat_template.jinja", TEMPLATE),
    "another template": written("additional_chat_templates/more.jinja", TEMPLATE),
    "the tokenizer": spaced,
    "the tokenizer's configuration": edited("tokenizer_config.json", padding_side="left"),
}


def make(folder: Path, model_dir: Path) -> Path:
    """`own` has a tokenizer, `high` lies over `low`; none has a manifest, so all may be edited."""
    base = Path(shutil.copytree(model_dir, folder / "base"))
    adapters, model = folder / "adapters", fresh_model(base)
    save_adapters(model, adapters, {"own": lf.LoRA(rank=2), "low": lf.LoRA(rank=2)})
    lf.load(model, adapters / "low", "low")
    save_adapters(model, adapters, {"high": lf.LoRA(rank=3)})
    write_tokenizer(load_tokenizer(base), adapters / "own")
    for file in adapters.glob("*/manifest.json"):
        file.unlink()
    return adapters


@pytest.fixture(scope="module")
def server(llama, tmp_path_factory):
    adapters = make(tmp_path_factory.mktemp("versions"), llama)
    with running(adapters.parent / "base", adapters) as found:
        yield found


def loaded(server: Running, name: str) -> str:
    answer = server.load(name)
    assert answer.status == 200, answer.content
    return answer.json["digest"]


def said(server: Running, model: str) -> tuple[int, Any]:
    """The status of a chat completion, and its prompt and text."""
    how = {"max_tokens": 8, "temperature": 0, "return_token_ids": True}
    answer = server.chat(model, **how)
    if answer.status != 200:
        return answer.status, answer.code
    choice = answer.json["choices"][0]
    return 200, (answer.json["prompt_token_ids"], choice["message"]["content"])


def digest_in_the_old_form(path: Path) -> str:
    """Over the four files by name, size and content, as versions had it before."""
    files = [path / name for name in OLD if (path / name).is_file()]
    lines = [(f.name, f.stat().st_size, sha256(f.read_bytes()).hexdigest()) for f in files]
    return sha256("".join("{} {} {}\n".format(*line) for line in lines).encode()).hexdigest()


@pytest.mark.few(3)
@pytest.mark.parametrize("what", CHANGES)
def test_another_version_has_another_digest(what: str, server: Running) -> None:
    before = server.ask("/v1/models/own").json["digest"]
    pinned = f"own@{before[:12]}"
    assert before == of_adapter(server.folder / "own")
    answer = said(server, pinned)
    CHANGES[what](server.folder / "own")
    assert said(server, pinned) == answer  # what was read goes on
    after = loaded(server, "own")
    assert after == of_adapter(server.folder / "own") != before
    assert said(server, pinned) == (404, "model_not_found")
    assert said(server, f"own@{after[:12]}") == said(server, "own")
    assert said(server, "own")[0] == 200
    same = ("a key", "the record", "another template", "the tokenizer's configuration")
    assert (said(server, "own") == answer) == (what in same)


def in_words(at: Path) -> None:
    write_tokenizer(load_tokenizer(at.parents[1] / "base"), at)
    (at / "chat_template.jinja").write_text(TEMPLATE)


@pytest.mark.parametrize("alter", [in_words, edited(OLD[2], note="another")])
def test_an_adapter_below_belongs_to_the_version(alter, server: Running) -> None:
    folder, before = server.folder, server.parts.registry.adapters["high"].digest
    assert before == joined([of_adapter(folder / "low"), of_adapter(folder / "high")])
    answer = said(server, f"high@{before[:12]}")
    alter(folder / "low")
    after = loaded(server, "high")
    assert after == joined([of_adapter(folder / "low"), of_adapter(folder / "high")]) != before
    assert said(server, f"high@{before[:12]}") == (404, "model_not_found")
    assert said(server, f"high@{after[:12]}")[0] == answer[0] == 200
    assert (said(server, "high") == answer) == (alter is not in_words)


def test_what_lies_below_has_to_be_what_it_was_trained_over(server: Running) -> None:
    weights = server.folder / "low" / OLD[1]
    content, before = weights.read_bytes(), said(server, "high")
    one_weight(server.folder / "low")
    refused = server.load("high")
    assert (refused.status, refused.code) == (400, "adapter_refused")
    assert "trained on top of" in refused.json["error"]["message"]
    assert said(server, "high") == before
    weights.write_bytes(content)
    loaded(server, "high")


def test_what_was_verified_is_what_is_opened(server: Running, monkeypatch) -> None:
    """A template changes just after the process looked at it."""
    verify, template = Sandbox.verify, server.folder / "own" / "chat_template.jinja"
    before = said(server, "own")

    def then_changed(self: Sandbox, *arguments: Any) -> Any:
        found = verify(self, *arguments)
        template.write_text(TEMPLATE + "{# changed #}")
        return found

    monkeypatch.setattr(Sandbox, "verify", then_changed)
    with pytest.raises(LorafoldError, match="changed while it was read"):
        server.parts.registry.load("own")
    assert said(server, "own") == before


def test_digests_of_the_old_form_are_understood(llama, tmp_path, caplog) -> None:
    """By requests, aliases, and quarantines that were kept; the log says what to use instead."""
    caplog.set_level(logging.WARNING, "lorafold")
    adapters = make(tmp_path, llama)
    files = tmp_path / "adapters-files"
    files.mkdir()
    written("chat_template.jinja", TEMPLATE)(adapters / "low")  # which the old form leaves out
    for name in ("own", "high"):
        written("manifest.json", "{}")(adapters / name)  # of another tool
    old = {name: digest_in_the_old_form(adapters / name) for name in ("own", "low", "high")}
    kept = {
        "aliases": {"it": {"targets": [{"adapter": "own", "digest": old["own"]}]}},
        "quarantined": {"low": [old["low"], "by hand"], "high": ["0" * 64, "by hand"]},
    }
    (files / "state.json").write_text(json.dumps(kept))
    with running(tmp_path / "base", adapters) as server:
        found = server.parts.registry.adapters
        assert said(server, f"own@{old['own'][:8]}") == said(server, "own")
        assert said(server, "it") == said(server, "own")
        assert said(server, "low") == (423, "adapter_quarantined")
        assert said(server, "high")[0] == 200  # other files were in quarantine
        target = {"target": f"high@{old['high']}"}
        assert server.ask("/admin/aliases/other", target, ADMIN, "PUT").status == 200
        assert said(server, "other") == said(server, "high")
        assert said(server, "own@00000000") == (404, "model_not_found")
        one_weight(adapters / "own")
        loaded(server, "own")
        assert said(server, f"own@{old['own'][:8]}") == said(server, "it")
        assert said(server, "it") == (404, "model_not_found")
        keys = {name: one.key for name, one in found.items()}
    told = [r.getMessage() for r in caplog.records if "old format" in r.getMessage()]
    assert len(told) == 3  # once for each version
    assert f"high@{old['high'][:12]} is a digest in the old format" in told[-1]
    assert told[-1].endswith(f"use {keys['high']}")


def test_a_stack_is_known_by_the_files_below_too(llama, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("lorafold.files.contents.FRESH_SECONDS", -1.0)
    adapters, names = make(tmp_path, llama), counted(monkeypatch)
    with running(tmp_path / "base", adapters) as server:
        before = server.parts.registry.adapters["high"].digest
    first = len(names)
    edited(OLD[2], note="another")(adapters / "low")
    with running(tmp_path / "base", adapters) as server:
        after = server.parts.registry.adapters["high"].digest
        assert said(server, f"high@{before[:12]}") == (404, "model_not_found")
        assert said(server, f"high@{after[:12]}")[0] == 200
    assert before != after
    assert sorted(names[first:]) == ["high", "low", "low"]


def test_what_is_known_and_the_fingerprint_are_of_the_base(llama, tmp_path, monkeypatch) -> None:
    """Not of its name: a copy is the same base, and another template or storage is another one."""
    monkeypatch.setattr("lorafold.files.contents.FRESH_SECONDS", -1.0)
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    names = counted(monkeypatch)
    adapters = saved(base, {"own": lf.LoRA(rank=2)}, tmp_path / "adapters")
    shutil.copytree(tmp_path / "base", tmp_path / "copy")

    def fingerprints(base: str, **options: Any) -> list[str]:
        names.clear()
        with running(tmp_path / base, adapters, **options) as server:
            asked = {"prompt": "Hello", "max_tokens": 1}
            both = [server.ask("/v1/completions", asked | {"model": m}).json for m in (base, "own")]
            own = both[1]["system_fingerprint"]
            assert server.chat("own", max_tokens=1).json["system_fingerprint"] == own
            assert own.startswith(f"{server.parts.registry.adapters['own'].key}+")
        return [one["system_fingerprint"].partition("+")[2] for one in both]

    first, second = fingerprints("base")
    assert len(first) == 12
    assert first == second
    assert names != []
    assert fingerprints("copy") == [first, first]
    assert names == []
    assert fingerprints("copy", storage="bf16")[0] != first
    assert names != []
    (tmp_path / "copy" / "chat_template.jinja").write_text(TEMPLATE)
    assert fingerprints("copy")[0] != first
    assert names != []


def test_a_digest_that_may_be_of_another_version_stands_for_nothing(
    llama, tmp_path, caplog
) -> None:
    """Without a manifest an old digest is that which a version without a tokenizer has today."""
    adapters = make(tmp_path, llama)
    with running(tmp_path / "base", adapters) as server:
        digest = server.ask("/v1/models/low").json["digest"]
        assert digest == digest_in_the_old_form(adapters / "low")
        plain = said(server, f"low@{digest[:12]}")
        target = {"target": f"low@{digest}"}
        assert server.ask("/admin/aliases/it", target, ADMIN, "PUT").status == 200
        assert said(server, "it") == plain
        write_tokenizer(load_tokenizer(tmp_path / "base"), adapters / "low")
        written("chat_template.jinja", TEMPLATE)(adapters / "low")
        loaded(server, "low")
        assert said(server, "low") != plain
        assert said(server, f"low@{digest[:12]}") == (404, "model_not_found")
        assert said(server, "it") == (404, "model_not_found")
        key = server.parts.registry.adapters["low"].key
    told = [r.getMessage() for r in caplog.records if "old format" in r.getMessage()]
    assert told == [
        f"low@{digest[:12]} is a digest in the old format, which is ambiguous without a manifest"
        f" and therefore selects no version; use {key}"
    ]
