"""`lorafold inspect` over a model without a tokenizer: all but the tables of tokens."""


import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from adapter_cases import make_adapter
from command_cases import words
from lorafold.cli import app
from lorafold.errors import LorafoldError, NoTokenizer
from lorafold.inspecting.inspect import inspect
from lorafold.models.tokenizer import load_tokenizer
from lorafold.peft.adapter_directory import open_all
from lorafold.resolve import Base

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def without(base: Path, out: Path, *names: str) -> Path:
    shutil.copytree(base, out, ignore=lambda _, found: [name for name in found if name in names])
    return out


# transformers makes an empty tokenizer of the one and fails with the other
@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("names", [TOKENIZER, TOKENIZER[:1]], ids=["no file", "no vocabulary"])
def test_the_tables_of_tokens_are_left_out(
    kind: str, names: tuple[str, ...], tiny_model_dir, tmp_path: Path
) -> None:
    base = without(tiny_model_dir(kind), tmp_path / "base", *names)
    make_adapter(base, tmp_path / "a")
    save_file({"probe": torch.ones(32)}, tmp_path / "f.safetensors")
    own = {"directions": tmp_path / "f.safetensors", "html": tmp_path / "page.html"}
    arguments = words("inspect", tmp_path / "a", model=base, **own)
    asked = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    found: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    line = (
        f"The tables of tokens are left out: model {base}: it has no tokenizer (found no file with"
        " a vocabulary)."
    )
    assert found["tokens_left_out"] == line
    assert line in asked.stderr.splitlines()
    assert f"<h2>What it reads and writes</h2><p>{line}</p>" in (tmp_path / "page.html").read_text()
    assert not any(verb in site for site in found["sites"].values() for verb in ("reads", "writes"))
    # all else is there, the user's own vectors too, as with the tokenizer
    assert any("reads_vectors" in site for site in found["sites"].values())
    whole = inspect(Base(tiny_model_dir(kind)), open_all([tmp_path / "a"])).as_json()
    assert whole["tokens_left_out"] is None
    assert whole["whole"] == found["whole"]
    assert any("reads" in site for site in whole["sites"].values())
    printed = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert line in printed.stderr.splitlines()
    assert "directions for 95% on average" in printed.stdout


def test_an_adapter_s_own_tokenizer_names_them(tiny_model_dir, tmp_path: Path) -> None:
    base = without(tiny_model_dir("llama"), tmp_path / "base", *TOKENIZER)
    make_adapter(base, tmp_path / "a")
    load_tokenizer(tiny_model_dir("llama")).save_pretrained(tmp_path / "a")
    found = inspect(Base(base), open_all([tmp_path / "a"])).as_json()
    assert found["tokens_left_out"] is None
    assert any("reads" in site for site in found["sites"].values())


def test_a_tokenizer_that_cannot_be_read_is_still_an_error(tiny_model_dir, tmp_path: Path) -> None:
    base = without(tiny_model_dir("llama"), tmp_path / "base")
    make_adapter(base, tmp_path / "a")
    (base / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(LorafoldError, match="transformers can't load it") as error:
        inspect(Base(base), open_all([tmp_path / "a"]))
    assert not isinstance(error.value, NoTokenizer)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma", "qwen2"])
def test_no_command_takes_an_empty_tokenizer_for_the_model_s(
    kind: str, tiny_model_dir, tmp_path: Path
) -> None:
    base = without(tiny_model_dir(kind), tmp_path / "base", *TOKENIZER)
    with pytest.raises(NoTokenizer, match="it has no tokenizer"):
        load_tokenizer(base)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Book", "completion": "a table"}\n')
    for command in (["generate", "--prompt", "Book"], ["eval", "--data", str(rows)]):
        with pytest.raises(NoTokenizer, match="it has no tokenizer"):
            CliRunner().invoke(app, [*command, "--model", str(base)], catch_exceptions=False)
