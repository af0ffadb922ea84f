"""A model's anatomy: what it finds in each kind of model, once, and again after a change."""

import copy
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import ref

import pytest
from torch import nn

import lorafold as lf
from architectures import ARCHITECTURES
from lorafold.core.anatomy import Anatomy
from lorafold.core.expert_matrices import Matrices
from mixtures import mixture

ROWS = [{"prompt": f"{i} and {i}", "completion": f"{2 * i}"} for i in range(8)]


def parts(model: nn.Module) -> dict[str, Any]:
    """What stands in every anatomy."""
    own = Anatomy.of(model)
    paths = "embedding", "head", "decoder", "language", "encoders_and_connectors"
    return {name: getattr(own, name) for name in paths} | {"blocks": len(own.blocks)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", ("model.embed_tokens", "lm_head", "model", "", (), 2)),
        ("whisper", ("model.decoder.embed_tokens", "proj_out", "model.decoder", "", (), 4)),
        ("bert", ("bert.embeddings.word_embeddings", None, "bert", "", (), 2)),
        (
            "llava",
            (
                *("model.language_model.embed_tokens", "lm_head", "model.language_model"),
                *("model.language_model", ("model.vision_tower", "model.multi_modal_projector"), 4),
            ),
        ),
    ],
)
def test_parts_of_each_kind_of_model(name: str, expected: tuple[Any, ...], tiny_model: Any) -> None:
    model = tiny_model(name) if name == "llama" else ARCHITECTURES[name].model()
    assert tuple(parts(model).values()) == expected
    assert Anatomy.of(model) is Anatomy.of(model)
    assert not Anatomy.of(model).experts
    assert not Anatomy.of(model).routers


def test_experts_and_routers_of_a_mixture() -> None:
    model = mixture("qwen2-moe")
    own = Anatomy.of(model)
    mlps = [f"model.layers.{n}.mlp" for n in range(2)]
    assert own.experts == {f"{mlp}.experts": {8} for mlp in mlps}
    assert own.routers == {f"{mlp}.{r}" for mlp in mlps for r in ("gate", "shared_expert_gate")}
    matrices = [path for path, m in own.modules if isinstance(m, Matrices)]
    assert matrices == [f"{m}.experts.{n}" for m in mlps for n in ("gate_up_proj", "down_proj")]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_deltas_leave_it_as_it_is(name: str, tiny_model: Any) -> None:
    model = mixture(name) if name == "mixtral" else tiny_model(name)
    own = Anatomy.of(model)
    paths = [path for path, _ in own.modules]
    adapter = lf.attach(model, lf.LoRA(rank=2))
    assert Anatomy.of(model) is own
    assert [path for path, _ in own.modules] == paths
    modules = dict(own.modules)
    assert all(modules[path] is site for path, site in adapter.sites.items())
    adapter.merge()
    assert Anatomy.of(model) is own
    assert dict(own.modules).keys() == modules.keys()


def test_it_follows_every_change_of_the_modules(tiny_model: Any) -> None:
    model = tiny_model("llama")
    before = Anatomy.of(model)
    assert before.head == "lm_head"
    model.resize_token_embeddings(model.config.vocab_size + 8)
    ends = [dict(Anatomy.of(model).modules)[path] for path in Anatomy.of(model).vocabulary_ends]
    assert ends == [model.get_input_embeddings(), model.get_output_embeddings()]
    model.lm_head = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 300))
    assert "lm_head.1" in dict(Anatomy.of(model).modules)
    model.lm_head = None
    assert parts(model)["head"] is None
    del model.model.layers[1]
    assert Anatomy.of(model).blocks == ["model.layers.0"]
    assert Anatomy.of(model) is not before


def test_a_copy_has_its_own(tiny_model: Any) -> None:
    model = tiny_model("llama")
    assert Anatomy.of(model).blocks
    other = copy.deepcopy(model)
    assert all(m is other.get_submodule(path) for path, m in Anatomy.of(other).modules)


def test_it_keeps_no_module() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert len(Anatomy.of(model).modules) == 3
    replaced, whole = ref(model[0]), ref(model)
    model[0] = nn.Identity()
    assert replaced() is None
    del model
    assert whole() is None


def test_a_run_makes_it_once_and_hardly_asks_about_experts(tmp_path, tiny_model_dir) -> None:
    """It looked 11 times for the blocks, and 27% of all calls asked about experts."""
    made: list[nn.Module] = []
    calls = Counter[str]()
    root = str(Path(lf.__file__).parent)

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root):
            calls[code.co_qualname] += 1
            if code is Anatomy.__init__.__code__:
                made.append(frame.f_locals["model"])

    recipe = lf.Recipe(steps=2, batch=2, rank=2, storage="fp32", max_length=64)
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        lf.train(recipe, model=str(tiny_model_dir("llama")), data=ROWS, out=tmp_path / "a")
    finally:
        sys.setprofile(before)
    assert made
    assert len(made) == len({id(model) for model in made})
    asked = sum(calls[name] for name in ("expert_counts", "expert_parameters", "matrices_of"))
    assert asked + calls["form_of"] <= calls.total() / 100
