"""The command `estimate`, and the docs' sentence about rules of thumb."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import refused
from lorafold.memory import cheatsheet
from lorafold.memory.estimate import TERMS
from lorafold.models.sources import _embedded_gguf, read_configuration
from typed_commands import done, result, write_rows

PAGE = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()


def test_a_shape_alone() -> None:
    found = result("estimate --params 7b --mode inference --max-length 4096")
    assert found["total"] == sum(found[name] for name in TERMS)
    assert found["weights"] == pytest.approx(2 * 6.738e9, rel=1e-3)
    assert found["kv_cache"] == 2 * 32 * 32 * 128 * 4096 * 2
    assert found["fits"] is None


@pytest.mark.slow
def test_a_verdict_and_a_page(tiny_model_dir: Any, tmp_path: Path) -> None:
    page, model = tmp_path / "page.html", tiny_model_dir("llama")
    asked = f"estimate --model {model} --mode lora --device-memory 1MB --measure --html {page}"
    found = result(asked)
    assert found["total"] == pytest.approx(found["measured"], rel=0.05)
    assert found["fits"] is (found["spare"] >= 0)
    text = page.read_text()
    assert all(f"{name.replace('_', ' ')}</td>" in text for name in TERMS if found[name])
    assert "<script" not in text
    assert "does not fit: " in text


@pytest.mark.slow
def test_a_gguf_file_by_its_header() -> None:
    found, unpacked = read_configuration(str(_embedded_gguf())), read_configuration("smollm2")
    for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_key_value_heads",
                 "vocab_size", "tie_word_embeddings"):  # fmt: skip
        assert getattr(found, name) == getattr(unpacked, name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--params 6b", "params 6b: expected one of 7b, "),
        ("--params 7b --measure", "--measure: needs a model with weights; replace --params 7b by"),
        ("--params 7b --model m", "--params: found --params 7b and --model m, expected"),
        ("--device-memory lots", "expected a size"),
        ("--mode nosuch", "unknown method 'nosuch'"),
        ("--model no/such/model/here", "no/such/model/here"),
        ("--model LLAMA --revision main", "is only for models from the Hub"),
        ("--model LLAMA --device foo", "device: found 'foo'"),
        ("--gpus 2 --strategy zero", "--strategy: found zero, expected one of fsdp, ddp"),
        ("--gpus 2 --mode inference", "--gpus: can't be combined with --mode inference: the"),
        ("--gpus 2 --measure", "--gpus: can't be combined with --measure: the estimate is for a"),
    ],
)
def test_what_is_refused(arguments: str, message: str, tiny_model_dir: Any) -> None:
    words = arguments.replace("LLAMA", str(tiny_model_dir("llama"))).split()
    assert message in refused("estimate", *words)


def test_rules_of_thumb_give_what_they_say() -> None:
    found = [*map(cheatsheet.result, cheatsheet.EXAMPLES.values())]
    assert found == [14.0e9, 2147483648, 0.64e9, 112.0e9]


@pytest.mark.slow
def test_the_rules_are_as_far_from_the_estimates_as_the_page_states() -> None:
    _, *rows = cheatsheet.table()
    ratios = {(row[0], row[1]): float(row[5].rstrip("%")) / 100 for row in rows}
    near = [key for key in ratios if key[0] != "7B" or "lora" not in key[1]]
    assert all(0.85 <= ratios[key] <= 1.15 for key in near)
    assert "They hold within 15%" in PAGE
    assert "without gradient checkpointing the estimate is 2.3 and 4 times the rule" in PAGE
    for method, plain in ("lora", 2.3), ("qlora", 4.0):
        assert ratios["7B", method] == pytest.approx(plain, rel=0.01)
        assert ratios["7B", f"{method}, checkpointing"] == pytest.approx(0.7, abs=0.02)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tiny_model_dir: Any, tmp_path: Path) -> Path:
    """A model whose code comes with it."""
    path = shutil.copytree(tiny_model_dir("llama"), tmp_path / "own")
    (path / "own.py").write_text(CODE)
    config = json.loads((path / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": auto}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_code_of_a_model_that_is_trusted_runs_without_a_question(own_code: Path) -> None:
    asked = f"estimate --model {own_code} --mode lora --max-length 16"
    assert result(f"{asked} --trust-remote-code")["total"] > 0
    assert "allow it with --trust-remote-code" in refused(*asked.split())


def test_a_run_on_code_that_is_trusted_prints_its_result_alone(own_code, tmp_path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    asked = f"train --model {own_code} --data {rows} --out {tmp_path / 'out'} --device cpu"
    told = done(f"{asked} --storage fp32 --steps 1 --batch 2 --trust-remote-code --json")
    assert json.loads(told.stdout)["steps"] == 1
    assert "memory" in told.stderr


SHARED = "--params 7b --max-length 256 --gradient-checkpointing on"


def of_each(arguments: str) -> dict[str, Any]:
    found = result(f"estimate {SHARED} {arguments}")
    assert found["total"] == sum(found[name] for name in TERMS)
    return found


@pytest.mark.parametrize("mode", ["full", pytest.param("qlora", marks=pytest.mark.slow)])
def test_what_each_of_several_processes_holds_and_sends(mode: str) -> None:
    """By the page's formulas, for the blocks, the tables and the norms of a Llama of 7b."""
    w, m, rank, widths = 4096, 11008, 16, 4 * (4096 + 4096) + 3 * (4096 + 11008)
    one, eight = (of_each(f"--mode {mode} --gpus {n}") for n in ("1", "8"))
    assert eight["weights"] == -(-one["weights"] // 8)
    assert one["exchanged"] == 0
    assert {"sent", "bandwidth"}.isdisjoint(one)
    if mode == "full":
        block, outside = 4 * (4 * w * w + 3 * w * m + 2 * w), 4 * (2 * 32000 * w + w)
        largest, divides, passes = 2 * block, 8, 4
        sent = 7 / 8 * (2 * 32 * block + 1.5 * outside + 32 * block + outside)
    else:
        outside = 2 * (2 * 32000 * w + w)
        block = (one["weights"] - outside) // 32
        largest, divides, passes = outside / 2, 1, 3
        # gradients are summed, and each process sends the vectors that it stepped
        sent = 7 / 8 * (2 * 32 * block + outside + (2 + 1) * 32 * 4 * rank * widths)
    assert eight["adapter"] == -(-one["adapter"] // divides)
    assert eight["optimizer"] == -(-one["optimizer"] // 8)  # an adapter's moments are divided too
    assert eight["exchanged"] == pytest.approx(largest, rel=1e-4)
    assert eight["sent"] == pytest.approx(sent, rel=1e-4)
    # a pass computes what the forward pass does; attention, head and factors come on top, and the
    # last products of a block are not repeated
    products = 32 * passes * 2 * 256 * (4 * w * w + 3 * w * m)
    assert 0.8 <= eight["bandwidth"] / (sent * 4e14 / products) <= 1.1
    slow = of_each(f"--mode {mode} --gpus 8 --tflops 40")
    assert slow["bandwidth"] == pytest.approx(eight["bandwidth"] / 10)


@pytest.mark.slow
def test_ddp_holds_all_and_sends_gradients_alone() -> None:
    one, four = of_each("--mode lora"), of_each("--mode lora --gpus 4 --strategy ddp")
    assert 0 < four["exchanged"] <= 2**26
    others = [name for name in TERMS if name != "exchanged"]
    assert [four[name] for name in others] == [one[name] for name in others]
    assert four["sent"] == int(2 * 3 / 4 * one["adapter"])
