"""What files hold is computed on a GPU as on the CPU: codes, MXFP4 experts, convolutions."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from device_cases import Case, apart, lfm2
from lorafold.models.loading import load_model
from lorafold.models.quantizations import Storage
from mxfp4_cases import make_gpt_oss, make_mxfp4
from quantized_cases import KINDS, make_compressed, make_fine_grained

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.1}, "dora": {"dropout": 0.0}, "vera": {"dropout": 0.0}, "loha": {},
    "ia3": {}, "houlsby": {},
}  # fmt: skip
STORED = {name: KINDS[name][3] for name in ("fp8", "fp8-block", "int4", "int8-packed")}
STORED |= {"fine-grained": "fp8", "mxfp4": "mxfp4"}


@pytest.fixture(scope="module")
def released(tiny_model_dir, tmp_path_factory):
    """Directory of a tiny model in a format. Read only."""

    @cache
    def made(kind: str) -> Path:
        out = tmp_path_factory.mktemp("q") / kind
        if kind == "mxfp4":
            return make_mxfp4(make_gpt_oss(tmp_path_factory.mktemp("plain") / "gpt-oss"), out)
        plain = tiny_model_dir("llama-wide")
        if kind == "fine-grained":
            return make_fine_grained(plain, out)
        return make_compressed(plain, out, kind)

    return made


@pytest.mark.few(2)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", STORED)
def test_codes_of_files(kind: str, method: str, released) -> None:
    path, storage = released(kind), Storage(torch.float32, STORED[kind])
    case = Case(method, METHODS[method], "fp32", loaded=lambda: load_model(path, storage))
    found, expected = case.both()
    assert apart(found, expected) <= 1e-5


@pytest.mark.few(2)
@pytest.mark.parametrize("method", [*METHODS, "lokr", "adalora", "bitfit", "full"])
def test_convolutions(method: str) -> None:
    if method == "houlsby":
        pytest.skip("it adapts no convolutions")
    options = {"feedforward": []} if method == "ia3" else METHODS.get(method, {})
    targets = {} if method in ("full", "bitfit") else {"targets": ["conv.conv"]}
    case = Case(method, options, "fp32", lfm2(), packed=False, beside=targets)
    found, expected = case.both()
    assert apart(found, expected) <= 1e-5
