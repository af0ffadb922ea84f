"""One adapter, one question: lorafold's server and llama.cpp answer alike."""

from pathlib import Path

import pytest

import lorafold as lf
from gguf_models import moved, quietly, saved
from lorafold.exporting.engines import ask
from lorafold.exporting.gguf_model import write_model
from lorafold.exporting.proof import last, parting, prompts_of
from lorafold.models.tokenizer import load_tokenizer
from serving_cases import running

pytestmark = pytest.mark.slow
LONG = 16  # tokens of an answer


def test_the_server_and_llama_cpp_answer_alike(tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base")
    adapter = moved(base, tmp_path / "adapters" / "a", lf.LoRA(rank=4))
    lf.export(base, adapter, tmp_path / "out", to="gguf", prove=False, device="cpu")
    write_model(base, tmp_path / "base.gguf", "F32", quietly)
    prompts = prompts_of(load_tokenizer(base))
    files = {"base": tmp_path / "base.gguf", "adapter": tmp_path / "out" / "adapter.gguf"}
    job = {
        "ids": prompts.ids, "texts": prompts.texts, "chats": prompts.chats, "greedy": LONG,
        "ends": [], **{name: str(file) for name, file in files.items()},
    }  # fmt: skip
    wanted = [list(row) for row in ask("llamacpp", job).greedy]
    with running(base, tmp_path / "adapters") as server:

        def answered(model: str) -> list[list[int]]:
            body = {"model": model, "max_tokens": LONG, "temperature": 0}
            body |= {"ignore_eos": True, "return_token_ids": True}
            asked = [{**body, "prompt": list(ids)} for ids in prompts.ids]
            told = [server.ask("/v1/completions", one) for one in asked]
            return [one.json["choices"][0]["token_ids"] for one in told]

        found, bare = answered("a"), answered("base")
    model = lf.load_model(base, storage="fp32", device="cpu")
    lf.load(model, adapter)
    for ids, own, other in zip(prompts.ids, found, wanted, strict=True):
        if own != other:  # only where two tokens are as likely
            first, second = last(model, [*ids, *own[: parting(own, other)]]).topk(2).values
            assert first - second < 0.01
    assert sum(own == other for own, other in zip(bare, wanted, strict=True)) < len(wanted) // 2
