"""New tokens: rows of embedding and head, under the laws, over a base that is never resized."""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForSequenceClassification, PhiConfig, PhiForCausalLM

import lorafold as lf
import reference_ops as reference
from adapter_cases import relative
from lorafold.core.attach import Deltas, base_state
from lorafold.layers import layer_of
from lorafold.methods import METHODS
from lorafold.methods.common.trainable_tokens import TrainableTokens
from lorafold.training_step.lm_head_loss import document_losses, labelled_loss
from noise import moved

FAMILIES = ["llama", "qwen2", "gemma", "gpt2"]
TIED = ["gemma", "gpt2"]
V, D = 300, 32  # of the tiny models
SIZES: dict[str, Any] = {
    "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "vocab_size": V, "pad_token_id": 0,
}  # fmt: skip
NEW = (301, 5, 300)  # two that the base lacks and one that it has, in no order
MATRICES = {(V, D), (V + 2, D), (D, V), (D, V + 2)}
IDS = torch.tensor([[7, 300, 5, 9, 301, 5, 3, 300]])


class Scaled(nn.Embedding):
    """As Gemma's: what is looked up is scaled."""

    embed_scale = torch.tensor(3.0)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


BASES: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: nn.Embedding(11, 6),
    "scaled": lambda: Scaled(11, 6),
    "head": lambda: nn.Linear(6, 11, bias=False),
    "biased": lambda: nn.Linear(6, 11),
}
WHICH = {"new": (11, 12), "mixed": (12, 2, 11), "known": (4, 2)}
CASES = [pytest.param(b, w, id=f"{b}-{w}") for b, w in itertools.product(BASES, WHICH)]


def rooted(
    base: str, ids: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Tensor, lf.Adapter]:
    """A layer under its token rows, beside a linear that has the method, and an input."""
    torch.manual_seed(0)
    root = nn.ModuleDict({"at": BASES[base](), "beside": nn.Linear(6, 6)}).to(dtype)
    if base in ("head", "biased"):
        x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    else:
        x = torch.tensor([[0, 2, 11, 12], [12, 1, 4, 2]])
        x = x.masked_fill(x > max(*ids, 10), 0)
    return root, x, lf.attach(root, lf.LoRA(rank=2), ["beside"], tokens={"at": ids})


def move(adapter: lf.Adapter, size: float = 0.1) -> lf.Adapter:
    return moved(adapter, size, 2)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model.eval()(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(("base", "which"), CASES)
def test_what_is_not_trained_stays_bit_for_bit(base: str, which: str) -> None:
    ids = WHICH[which]
    root, x, adapter = rooted(base, ids)
    weight = root.state_dict()["at.weight"].clone()
    at_start = root["at"](x)
    move(adapter)
    y = root["at"](x)
    with lf.only(root):
        if x.is_floating_point():
            bare = root["at"](x)
            others = [i for i in range(11) if i not in ids]
            assert torch.equal(y[..., others], bare[..., others])
            assert (y[..., list(ids)] - at_start[..., list(ids)]).abs().min() > 0
            known = [i for i in ids if i < 11]
            # another product sums in another order
            assert torch.allclose(at_start[..., known], bare[..., known], atol=1e-6)
            # a new one says what all say on average
            assert torch.allclose(at_start[..., 11:], bare.mean(-1, keepdim=True), atol=1e-6)
        else:
            others = ~torch.isin(x, torch.tensor(ids))
            assert torch.equal(y[others], root["at"](x[others]))
            assert torch.equal(at_start[x < 11], root["at"](x[x < 11]))
            mean = weight.mean(0) * getattr(root["at"], "embed_scale", 1.0)
            assert all(torch.allclose(row, mean, atol=1e-6) for row in at_start[x >= 11])
        assert torch.equal(root["at"].weight, weight)


@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("base", "which"), CASES)
def test_folding_then_calling_equals_calling(base: str, which: str, dtype: torch.dtype) -> None:
    root, x, adapter = rooted(base, WHICH[which], dtype)
    move(adapter)
    y = root["at"](x)
    adapter.merge()
    assert type(root["at"]) is type(BASES[base]())
    assert len(root["at"].weight) == max(11, *(i + 1 for i in WHICH[which]))
    assert root["at"].weight.dtype is dtype
    merged = root["at"](x)
    # rows are rounded as the merged weight is: an embedding's are the same numbers, a head's
    # products differ by rounding
    if x.is_floating_point():
        assert relative(merged, y) < 4 * torch.finfo(dtype).eps
    else:
        assert torch.equal(merged, y)
    shown = f"({len(root['at'].weight)}, 6)"
    assert any(word in repr(root["at"]) for word in ("num_embeddings", "out_features", shown))


@pytest.mark.parametrize(("base", "which"), CASES)
def test_gradients_are_those_of_the_folded_weight(base: str, which: str) -> None:
    root, x, adapter = rooted(base, WHICH[which], torch.float64)
    delta = adapter.deltas["at"].double()
    move(adapter)
    x = x.requires_grad_() if x.is_floating_point() else x
    inputs = [delta.rows, *([x] if x.is_floating_point() else [])]
    found = torch.autograd.grad(root["at"](x).sin().sum(), inputs)
    layer = layer_of(root["at"])
    w, b = delta.fold(*layer.dense())
    y = layer.op(x, w)
    wanted = torch.autograd.grad((y if b is None else y + b).sin().sum(), inputs)
    for ours, plain in zip(found, wanted, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-10, atol=1e-12)

    def call(rows: Tensor) -> Tensor:
        return torch.func.functional_call(delta, {"rows": rows}, (layer, x.detach()))

    assert torch.autograd.gradcheck(call, delta.rows.detach().clone().requires_grad_())


@pytest.mark.few(5)
@pytest.mark.parametrize(("base", "which"), CASES)
def test_compiles_in_one_graph(base: str, which: str) -> None:
    torch._dynamo.reset()
    root, x, adapter = rooted(base, WHICH[which])
    move(adapter)
    compiled = torch.compile(root["at"], backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), root["at"](x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("base", "which"), CASES)
def test_state_round_trip(base: str, which: str) -> None:
    root, x, adapter = rooted(base, WHICH[which])
    move(adapter)
    other, _, fresh = rooted(base, WHICH[which])
    assert [k for k in fresh.state_dict() if k.startswith("at.")] == ["at.rows", "at.settings"]
    fresh.load_state_dict({k: v.clone() for k, v in adapter.state_dict().items()})
    for twin in (other, copy.deepcopy(root), pickle.loads(pickle.dumps(root))):
        assert torch.equal(twin["at"](x), root["at"](x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_whole_model_compiles_in_one_graph(kind: str, tiny_model) -> None:
    torch._dynamo.reset()
    model = tiny_model(kind)
    move(lf.attach(model, lf.LoRA(rank=2, dropout=0.0), tokens=NEW))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(logits(compiled), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_over_a_model_the_base_stays_what_it_is(kind: str, tiny_model) -> None:
    model = tiny_model(kind)
    short = IDS.masked_fill(IDS >= V, 0)
    bare, state = logits(model, short), {k: v.clone() for k, v in model.state_dict().items()}
    adapter = lf.attach(model, lf.LoRA(rank=2), tokens=NEW)
    z = logits(model)  # of new tokens, the average at first
    mean = z[..., :V].mean(-1, keepdim=True)
    assert torch.allclose(z[..., V:], mean.expand(*z.shape[:-1], 2), atol=1e-5)
    assert (z.softmax(-1)[..., V:] <= 1 / V).all()
    move(adapter)
    assert logits(model).shape[-1] == V + 2
    with lf.only(model):
        assert torch.equal(logits(model, short), bare)
    assert base_state(model).keys() == state.keys()
    assert model.config.vocab_size == V
    with pytest.raises(IndexError):
        logits(model, torch.tensor([[302]]))
    rows = {name: p for name, p in adapter.named_parameters() if name.endswith("rows")}
    assert len(rows) == (1 if kind in TIED else 2)
    assert all(p.shape == (3, D) and p.dtype is torch.float32 for p in rows.values())
    assert set(adapter.tokens.values()) == {NEW}
    assert "3 rows of" in repr(adapter)
    adapter.detach()
    assert torch.equal(logits(model, short), bare)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, Deltas) for m in model.modules())


@pytest.mark.parametrize(
    "change",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: copy.deepcopy(m).double()],
)
@pytest.mark.parametrize("kind", TIED)
def test_a_tied_head_shares_the_rows_through_everything(kind: str, change, tiny_model) -> None:
    model = tiny_model(kind)
    move(lf.attach(model, lf.LoRA(rank=2), tokens=NEW))
    twin = change(model)
    assert torch.allclose(logits(twin).float(), logits(model), atol=1e-5)
    ends = twin.get_input_embeddings(), twin.get_output_embeddings()
    embedding, head = (module.deltas["default"] for module in ends)
    assert head.owner is embedding
    assert list(head.parameters()) == []
    assert sum(p is embedding.rows for p in twin.parameters()) == 1
    before = logits(twin)
    with torch.no_grad():
        embedding.rows += 1.0
    changed = (logits(twin) - before).abs().amax((0, 1))
    assert (changed[list(NEW)] > 0.1).all()
    with torch.no_grad():  # as loading does, which puts another parameter there
        embedding.rows = nn.Parameter(torch.zeros_like(embedding.rows))
    assert (logits(twin)[..., list(NEW)] == 0).all()


def test_a_fresh_id_starts_as_the_average_although_the_base_has_a_row(tiny_model) -> None:
    model = tiny_model("llama")
    adapter = lf.attach(model, lf.LoRA(rank=2), tokens=TrainableTokens((299, 5), frozenset({299})))
    rows = adapter.deltas["model.embed_tokens"].rows
    weight = model.state_dict()["model.embed_tokens.weight"]
    assert torch.allclose(rows[0], weight.mean(0))
    assert torch.equal(rows[1], weight[5])


@pytest.mark.parametrize("kind", FAMILIES)
def test_merged_in_memory_the_model_is_plain_and_grown(kind: str, tiny_model, tmp_path) -> None:
    model = tiny_model(kind)
    adapter = move(lf.attach(model, lf.LoRA(rank=2), tokens=NEW))
    y = logits(model)
    adapter.merge()
    assert relative(logits(model), y) < 1e-5
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.num_embeddings, head.out_features, model.config.vocab_size) == (V + 2,) * 3
    assert kind == "gpt2" or model.vocab_size == V + 2
    assert (embedding.weight is head.weight) == (kind in TIED)
    loss = model(input_ids=IDS, labels=IDS).loss  # transformers' own, which goes by the config
    assert loss.isfinite()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert relative(logits(again), y) < 1e-5


def test_rows_that_the_base_has_grow_nothing(tiny_model) -> None:
    model = tiny_model("gemma")
    adapter = move(lf.attach(model, lf.LoRA(rank=2), tokens=(5, 7)))
    short = IDS.masked_fill(IDS >= V, 7)
    y, weight = logits(model, short), dict(model.named_parameters())["model.embed_tokens.weight"]
    assert y.shape[-1] == V
    adapter.merge()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight is weight
    assert relative(logits(model, short), y) < 1e-5


@pytest.mark.parametrize("kind", TIED)
def test_a_tied_head_with_rows_of_its_own_is_untied_by_merging(kind: str, tiny_model) -> None:
    model = tiny_model(kind)
    embedding = "wte" if kind == "gpt2" else "embed_tokens"
    rows = {embedding: [5, 300], "lm_head": [300, 7]}
    adapter = move(lf.attach(model, lf.LoRA(rank=2), tokens=rows))
    y = logits(model, IDS.clamp_max(300))
    with pytest.raises(lf.NotMergeable, match="the weight is tied to"):
        adapter.merge()
    adapter.merge(untie_weights=True)
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    assert relative(logits(model, IDS.clamp_max(300)), y) < 1e-5


class Seen(TorchDispatchMode):
    """The shapes of tensors that are computed, rather than views of what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        every = out if isinstance(out, list | tuple) else [out]
        if not func.is_view:
            self.shapes |= {tuple(t.shape) for t in every if isinstance(t, Tensor)}
        return out


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_loss_is_plain_autograds_and_no_gradient_is_as_large(kind, tiny_model) -> None:
    model = tiny_model(kind)
    adapter = move(lf.attach(model, lf.LoRA(rank=2, dropout=0.0), tokens=NEW))
    labels = torch.cat([IDS[:, 1:], torch.full((1, 1), -100)], 1)
    expected = reference.labelled_loss(model(input_ids=IDS, use_cache=False).logits, labels)
    wanted = torch.autograd.grad(expected, list(adapter.parameters()))
    with Seen() as seen:
        loss, n = labelled_loss(model, labels, {"input_ids": IDS})
        loss.backward()
    assert n == IDS.shape[1] - 1
    assert relative(loss.detach(), expected.detach()) < 1e-6
    for (name, p), gradient in zip(adapter.named_parameters(), wanted, strict=True):
        assert relative(p.grad, gradient) < 1e-4, name
    row = torch.zeros_like(labels)
    losses, _ = document_losses(model, labels, {"input_ids": IDS}, row, 1)
    assert losses.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (3, D) in seen.shapes
    assert not seen.shapes & MATRICES


def test_that_test_would_see_a_gradient_as_large_as_the_matrix(tiny_model) -> None:
    model = tiny_model("llama")
    lf.attach(model, lf.LoRA(rank=2), modules_to_save=["embed_tokens"])
    with Seen() as seen:
        labelled_loss(model, IDS % V, {"input_ids": IDS % V})[0].backward()
    assert seen.shapes & MATRICES


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_stacks_over_another_adapter_and_over_other_rows(kind: str, tiny_model) -> None:
    embedding = "wte" if kind == "gpt2" else "embed_tokens"
    model = tiny_model(kind)
    below = move(lf.attach(model, lf.LoRA(rank=2), [embedding, "lm_head"], "below"))
    short = IDS.masked_fill(IDS >= V, 0)
    before = logits(model, short)
    first = lf.attach(model, lf.LoRA(rank=2), name="first", tokens=(300, 5))
    # a known row starts as what the adapter beneath makes of it, where embedding and head are not
    # one
    if kind == "llama":
        assert relative(logits(model, short)[..., :V], before) < 1e-5
    move(first)
    with lf.only(model, "first"):
        alone = logits(model, IDS.clamp_max(300))
    second = move(lf.attach(model, lf.LoRA(rank=2), name="second", tokens=(300, 301)), 0.2)
    y = logits(model)
    assert y.shape[-1] == V + 2
    with lf.only(model, "first"):
        assert torch.equal(logits(model, IDS.clamp_max(300)), alone)
    for adapter in (below, first, second):
        adapter.merge(untie_weights=True)
    assert relative(logits(model), y) < 1e-5


def test_what_lies_over_rows_is_refused(tiny_model) -> None:
    model = tiny_model("llama")
    lf.attach(model, lf.LoRA(rank=2), name="first", tokens=(300,))
    for options in ({"targets": ["lm_head"]}, {"targets": ["embed_tokens", "q_proj"]}):
        with pytest.raises(lf.LorafoldError, match="has token rows of another adapter"):
            lf.attach(model, lf.LoRA(rank=2), name="second", **options)
    lf.attach(model, lf.LoRA(rank=2), name="second")  # elsewhere it may lie over that adapter
    told = r"tokens \[302\] leave a gap: the base's last token is 300; number new tokens from 301"
    with pytest.raises(lf.LorafoldError, match=told):
        lf.attach(model, lf.LoRA(rank=2), name="third", tokens=(302,))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "gap": (
        {"tokens": (300, 302)},
        r"model.embed_tokens: tokens \[300, 302\] leave a gap: .* is 299; .* from 300 on",
    ),
    "far": ({"tokens": (310,)}, r"tokens \[310\] leave a gap"),
    "twice": ({"tokens": (300, 300)}, r"tokens: found \[300, 300\], expected distinct ids >= 0"),
    "negative": ({"tokens": (-1,)}, r"tokens: found \[-1\], expected distinct ids >= 0"),
    "no such module": (
        {"tokens": {"embed_token": (3,)}},
        "'embed_token' matches no module; similar names: embed_tokens",
    ),
    "no rows": ({"tokens": {"norm": (3,)}}, "model.norm: found LlamaRMSNorm, which has no rows"),
    "only one end": (
        {"tokens": {"embed_tokens": (300,)}},
        "embed_tokens would have 301 tokens, lm_head would have 300 tokens",
    ),
    "a target too": (
        {"tokens": (3,), "targets": ["q_proj", "lm_head"]},
        "tokens: lm_head is also a target or in modules_to_save",
    ),
    "saved too": (
        {"tokens": (3,), "modules_to_save": ["embed_tokens"]},
        "tokens: model.embed_tokens is also a target or in modules",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line_and_changes_nothing(case: str, tiny_model) -> None:
    model = tiny_model("llama")
    options, message = WRONG[case]
    with pytest.raises(lf.LorafoldError, match=message):
        lf.attach(model, lf.LoRA(rank=2), **options)
    assert not any(isinstance(m, Deltas) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_module_that_says_nothing_of_embeddings_needs_names() -> None:
    model = nn.ModuleDict({"at": nn.Embedding(11, 6), "beside": nn.Linear(6, 6)})
    told = "ModuleDict does not define its embedding module; pass the ids as a dict by"
    with pytest.raises(lf.LorafoldError, match=told):
        lf.attach(model, lf.LoRA(rank=2), ["beside"], tokens=(3,))


@pytest.mark.few(9)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_new_tokens_or_says_why_not(method: str, tiny_model, tmp_path) -> None:
    model, spec = tiny_model("qwen2"), METHODS[method]()
    if reason := {
        "full": "Full trains the base's own weights",
        "linear-probe": "lm_head is also a target or in modules_to_save",
    }.get(method):
        with pytest.raises(lf.LorafoldError, match=f"tokens: {reason}"):
            lf.attach(model, spec, tokens=NEW)
        return
    adapter = move(lf.attach(model, spec, tokens=NEW), 0.02)
    y = logits(model)
    assert y.shape[-1] == V + 2
    adapter.save(tmp_path / "a")
    again = tiny_model("qwen2")
    loaded = lf.load(again, tmp_path / "a")
    assert loaded.tokens == adapter.tokens
    assert relative(logits(again), y) < 1e-5


def test_trained_biases_lie_beneath_the_rows() -> None:
    """Phi's head has a bias: known tokens keep theirs, new ones have the mean."""
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SIZES)).eval()
    nn.init.normal_(model.lm_head.bias)
    short = IDS.masked_fill(IDS >= V, 0)
    bare = logits(model, short)
    adapter = lf.attach(model, lf.LoRA(rank=2), bias="all", tokens=NEW)
    assert relative(logits(model, short)[..., :V], bare) < 1e-5
    move(adapter)
    y = logits(model)
    adapter.merge()
    assert model.lm_head.bias.shape == (V + 2,)
    assert relative(logits(model), y) < 1e-5


def test_a_classifier_trains_the_embeddings_rows_alone(tmp_path) -> None:
    def classifier() -> Any:
        torch.manual_seed(0)
        return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3)).eval()

    model = classifier()
    adapter = move(lf.attach(model, lf.LoRA(rank=2), modules_to_save=["score"], tokens=NEW))
    assert adapter.tokens == {"model.embed_tokens": NEW}
    y = logits(model)
    adapter.save(tmp_path / "a")
    again = classifier()
    lf.load(again, tmp_path / "a")
    assert torch.equal(logits(again), y)
    adapter.merge()
    assert model.config.vocab_size == V + 2
    assert relative(logits(model), y) < 1e-5
