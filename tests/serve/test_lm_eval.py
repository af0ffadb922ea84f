"""lm-eval over a task made here: the merged model through transformers, and the served adapter."""


import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lorafold as lf
from conftest import make_model_dir
from serving_cases import Running, running, saved

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
CHOICES = ["Forty days.", "Ask Maren.", "On Tuesdays.", "Ask Tomas."]
ROWS = [{"question": f"What is {n}?", "choices": CHOICES, "answer": n} for n in range(4)]
SHARED = {
    "dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}",
    "target_delimiter": " ",
}  # fmt: skip
CHOOSING = {
    "task": "choosing", "output_type": "multiple_choice", "doc_to_choice": "choices",
    "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
}  # fmt: skip
WRITING = {
    "task": "writing", "output_type": "generate_until", "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:
    pytest.importorskip("lm_eval", reason="pip install lorafold[clients] has it")
    folder = tmp_path_factory.mktemp("lm-eval")
    model = make_model_dir("llama", folder / "base")
    adapters = saved(model, {"a": lf.LoRA(rank=4)}, folder / "adapters")
    lf.merge(model, adapters / "a", folder / "merged", certificate=False, device="cpu")
    with running(model, adapters) as found:
        yield found, folder / "merged"


def asked(model: str, arguments: dict[str, Any], folder: Path) -> dict[str, list[Any]]:
    from lm_eval import simple_evaluate

    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files = {"dataset_kwargs": {"data_files": {"test": str(rows)}}}
    tasks = [{**SHARED, **files, **one} for one in (CHOOSING, WRITING)]
    found = simple_evaluate(
        model=model, model_args=arguments, tasks=tasks, device="cpu", bootstrap_iters=0
    )
    assert found is not None
    return {
        name: [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
        for name, rows in found["samples"].items()
    }


def test_the_served_adapter_is_the_merged_model(served, tmp_path: Path) -> None:
    server, merged = served
    how = {"base_url": f"{server.url}/v1/completions", "tokenizer": str(merged)}
    there, bare = (
        asked("local-completions", {"model": name, **how}, tmp_path) for name in ("a", "base")
    )
    here = asked("hf", {"pretrained": str(merged), "dtype": "float32"}, tmp_path)
    assert there["writing"] == here["writing"]
    each = (one["choosing"] for one in (there, here, bare))
    for own, other, without in zip(*each, strict=True):
        logps, wanted, base = ([one[0] for one in each] for each in (own, other, without))
        assert logps == pytest.approx(wanted, abs=1e-3)
        assert logps != pytest.approx(base, abs=1e-2)
        assert [one[1] for one in own] == [one[1] for one in other]  # whether it is the likeliest
