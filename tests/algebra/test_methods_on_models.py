"""Every method of the table on whole tiny transformers."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM

import lorafold as lf
import noise
from conftest import ALIKE
from lorafold.methods import METHODS
from method_cases import IDS, NO_IDENTITY, attached, moved

KINDS = ["llama", "gpt2", "qwen2"]
ALL_KINDS = [*KINDS, "gemma"]


def loss_of(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(adapter: lf.Adapter, model: nn.Module) -> dict[str, Tensor]:
    for p in adapter.parameters():
        p.grad = None
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}


def every(
    kinds: list[str] = KINDS, slow: tuple[str, ...] = (), lora_on_all: bool = False
) -> Callable:
    return pytest.mark.parametrize(
        ("method", "kind"),
        [
            pytest.param(m, k, id=f"{m}-{k}", marks=[pytest.mark.slow] if m in slow else [])
            for m in METHODS
            for k in (ALL_KINDS if m == "lora" and lora_on_all else kinds)
        ],
    )


@pytest.mark.few(20)
@every()
def test_it_starts_as_the_base_and_detaching_gives_it_back(method, kind, tiny_model) -> None:
    model = tiny_model(kind)
    with torch.no_grad():
        bare = model(IDS).logits
        adapter = attached(model, method)
        start = model(IDS).logits
        assert (
            torch.equal(start, bare) if method not in NO_IDENTITY else not torch.equal(start, bare)
        )
        if method == "full":
            return
        moved(adapter)
        assert not torch.equal(model(IDS).logits, bare)
        with lf.only(model):
            assert torch.equal(model(IDS).logits, bare)
        adapter.detach()
        assert torch.equal(model(IDS).logits, bare)


@pytest.mark.few(20)
@every(lora_on_all=True)
def test_gradients_are_complete_and_the_same_under_checkpointing(method, kind, tiny_model) -> None:
    model = tiny_model(kind).train()
    adapter = moved(attached(model, method))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    plain = gradients(adapter, model)
    # a bias of the keys shifts all scores of a query alike, so it has no gradient to receive
    missing = [
        name for name, p in adapter.named_parameters() if name not in plain or not plain[name].any()
    ]
    assert [name for name in missing if "k_proj" not in name] == []
    model.activation_checkpointing_enable()
    checkpointed = gradients(adapter, model)
    assert checkpointed.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.few(14)
@every(["llama"])
@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same_and_are_independent(method, kind, twin_of, tiny_model) -> None:
    model = tiny_model(kind)
    adapter = moved(attached(model, method))
    with torch.no_grad():
        twin = twin_of(model)
        y = model(IDS).logits
        own = twin(IDS).logits
        # a copy lies elsewhere in memory, where a kernel may sum in another order
        torch.testing.assert_close(own, y, rtol=1e-5, atol=1e-6)
        moved(adapter)
        assert torch.equal(twin(IDS).logits, own)
        assert not torch.equal(model(IDS).logits, y)


@every(["gpt2"])
def test_the_state_carries_over(method: str, kind: str, tiny_model) -> None:
    model, other = tiny_model(kind), tiny_model(kind)
    adapter, fresh = moved(attached(model, method)), attached(other, method)
    fresh.load_state_dict({k: v.clone() for k, v in adapter.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, model(IDS).logits)


@pytest.mark.few(27)
@pytest.mark.usefixtures("each_arithmetic")
@every(["llama", "qwen2"])
def test_a_bf16_base_computes_and_trains(method: str, kind: str, tiny_model) -> None:
    model = tiny_model(kind)
    twin = copy.deepcopy(model).bfloat16()
    wide, narrow = moved(attached(model, method)), attached(twin, method)
    state = {k: v.clone() for k, v in wide.state_dict().items()}
    narrow.load_state_dict(state)
    assert all(p.dtype == torch.float32 or method == "full" for p in narrow.parameters())
    with torch.no_grad():
        exact, found = model(IDS).logits, twin(IDS).logits
        with lf.only(model), lf.only(twin):
            # what bf16 costs without an adapter
            floor = (twin(IDS).logits.float() - model(IDS).logits).norm()
    assert found.dtype == torch.bfloat16
    # the adapter's own products are as many again
    assert (found.float() - exact).norm() <= 3 * max(floor, 4e-3 * exact.norm())
    grads = gradients(narrow, twin)
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert any(g.any() for g in grads.values())


@pytest.mark.few(1)
@every(["llama"], slow=ALIKE, lora_on_all=True)
def test_the_compiled_model_computes_the_same(method: str, kind: str, tiny_model) -> None:
    torch._dynamo.reset()
    model = tiny_model(kind)
    moved(attached(model, method))
    with torch.no_grad():
        y = model(IDS, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, y, rtol=1e-4, atol=1e-5)


@every(["qwen2"])
def test_it_lies_over_another_method(method: str, kind: str, tiny_model) -> None:
    model = tiny_model(kind)
    below = moved(lf.attach(model, lf.LoRA(rank=2, dropout=0.0), name="below"))
    if method in ("full", "linear-probe"):
        pytest.skip("trains the module itself, or a copy of it")
    with torch.no_grad():
        under = model(IDS).logits
        adapter = attached(model, method)
        if method not in NO_IDENTITY:
            torch.testing.assert_close(model(IDS).logits, under, rtol=1e-5, atol=1e-6)
        moved(adapter)
        assert not torch.allclose(model(IDS).logits, under)
        with lf.only(model, "below"):
            assert torch.equal(model(IDS).logits, under)
    assert all(p.requires_grad for p in below.parameters())


FAMILIES = ["llama", "qwen2", "gemma", "gpt2"]
ROWS = torch.randint(3, 290, (2, 12), generator=torch.Generator().manual_seed(0))


def with_lora(model: torch.nn.Module, **options) -> lf.Adapter:
    return noise.moved(lf.attach(model, lf.LoRA(rank=4, dropout=0.0), **options))


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_linear_leaves_head_and_embeddings_alone(kind: str, tiny_model) -> None:
    sites = with_lora(tiny_model(kind)).sites
    per_block = 4 if kind == "gpt2" else 7
    assert len(sites) == 2 * per_block
    assert not [s for s in sites if "head" in s or "embed" in s or "wte" in s]


def test_falcons_own_linear_class_is_a_linear() -> None:
    torch.manual_seed(0)
    model = FalconForCausalLM(
        FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ).eval()
    adapter = with_lora(model)
    found = {path.rpartition(".")[2] for path in adapter.sites}
    assert found == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    with torch.no_grad():
        y = model(ROWS).logits
        adapter.merge()
        torch.testing.assert_close(model(ROWS).logits, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_generate_merge_and_save(kind: str, tiny_model, tmp_path: Path) -> None:
    model = tiny_model(kind)
    bare = model(ROWS).logits
    adapter = with_lora(model)
    logits = model(ROWS).logits
    greedy = {"attention_mask": torch.ones_like(ROWS), "max_new_tokens": 5, "do_sample": False}
    answer = model.generate(ROWS, **greedy)
    model.save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert type(plain).__name__ == type(model).__name__
    assert torch.equal(plain(ROWS).logits, bare)
    with lf.only(model):
        assert torch.equal(model(ROWS).logits, bare)
    adapter.merge()
    assert (model(ROWS).logits - logits).norm() <= 1e-5 * logits.norm()
    assert torch.equal(model.generate(ROWS, **greedy), answer)


def test_embedding_tied_to_the_head_is_untied_on_request(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("gemma")
    adapter = with_lora(model, targets=["embed_tokens", "q_proj"])
    logits = model(ROWS).logits
    with pytest.raises(lf.NotMergeable, match=r"model.embed_tokens: the weight is tied to lm_head"):
        adapter.merge()
    adapter.merge(untie_weights=True)
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (again(ROWS).logits - logits).norm() <= 1e-5 * logits.norm()


def test_trained_biases_and_modules_are_deltas_too(tiny_model) -> None:
    model = tiny_model("qwen2")
    bare = model(ROWS).logits
    adapter = with_lora(model, bias="lora_only", modules_to_save=["lm_head", "norm"])
    logits = model(ROWS).logits
    kinds = {type(d).__name__ for _, d in adapter.parts()}
    assert kinds == {"LoRADelta", "BiasDelta", "ReplaceDelta"}
    with lf.only(model):
        assert torch.equal(model(ROWS).logits, bare)
    adapter.merge(untie_weights=True)
    assert (model(ROWS).logits - logits).norm() <= 1e-5 * logits.norm()
    assert not [n for n, _ in model.named_parameters() if "deltas" in n]
