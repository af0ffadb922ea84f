"""Models while they are fused: what is fused, what is left alone, and what a step dispatches."""

import copy
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import lorafold as lf
from fused_cases import adapted, assert_same_step, model_of, seeded_step, together
from lorafold.data.batches import collate
from lorafold.data.examples import Example
from lorafold.methods import METHODS, make_spec
from lorafold.models.loading import load_model
from lorafold.models.quantizations import Storage
from lorafold.training_step.fused_modules import ROTARY, fused
from lorafold.training_step.gradient_checkpointing import enable_gradient_checkpointing
from lorafold.training_step.lm_head_loss import labelled_loss
from lorafold.training_step.packed_attention import packed
from sequence_cases import GROUPED, VOCAB, loss_and_gradients, rows

ALL = ("MLP", "norms", "rotary embedding")
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi3", "gpt2"]
LACKING: dict[str, tuple[str, ...]] = {"phi3": ("MLP",), "gpt2": ALL}


def apart() -> list[dict[str, Tensor]]:
    return [collate([row], packed=False, pad_id=0) for row in rows()]


def state(model: nn.Module) -> dict[str, Any]:
    """What `with fused` may not leave a trace in."""
    own = {name: (sorted(vars(m)), m.training, type(m)) for name, m in model.named_modules()}
    files = {type(m).__module__ for m in model.modules()}
    return own | {file: getattr(sys.modules[file], ROTARY, None) for file in files}


@contextmanager
def both(model: tf.PreTrainedModel) -> Iterator[None]:
    with fused(model), packed(model) as isolated:
        assert isolated
        yield


@pytest.mark.parametrize("name", FAMILIES)
def test_the_report_and_the_model_before_and_after(name: str) -> None:
    model = model_of(name)
    adapted(model)
    # one block's mode is its own
    model.get_submodule(next(n for n, m in model.named_modules() if n.endswith(".0"))).eval()
    before, random = state(model), torch.get_rng_state()
    flags = [m.training for m in model.modules()]
    with fused(model) as found:
        lacking = LACKING.get(name, ())
        assert (found.fast, found.blocks, found.plain) == (0 if lacking else 2, 2, lacking)
        assert [m.training for m in model.modules()] == flags
        assert state(model) != before
        own = [path for path, module in model.named_modules() if "forward" in vars(module)]
        assert (own == ["lm_head"]) is (name == "gpt2")
    assert torch.equal(torch.get_rng_state(), random)
    assert state(model) == before
    words = f"; not fused: {', '.join(found.plain)}" if found.plain else ""
    assert str(found) == f"fast path: {found.fast} of 2 blocks{words}"


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = model_of("llama").requires_grad_(False)
    before = state(model)
    with pytest.raises(RuntimeError, match="in the middle"), fused(model):
        raise RuntimeError("in the middle")
    assert state(model) == before


@pytest.mark.few(5)
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_each_document_alone(name: str) -> None:
    """Sequences are longer than the window of models that have one."""
    model = model_of(name)
    adapted(model, lf.LoRA(rank=4, dropout=0.0))
    expected = loss_and_gradients(model, apart())
    with both(model):
        assert_same_step(loss_and_gradients(model, together()), expected)
    assert_same_step(loss_and_gradients(model, apart()), expected)


# those are dense, and have a preparation
@pytest.mark.few(7)
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("lt-sft", "fish")])
def test_every_method_lies_over_it(method: str) -> None:
    """With the dropout that it has: fusing draws no random numbers of its own."""
    model = model_of("llama")
    adapted(model, make_spec(method))
    with packed(model) as isolated:
        assert isolated
        expected = seeded_step(model, together())
        with fused(model):
            assert_same_step(seeded_step(model, together()), expected)


@pytest.mark.few(7)
@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gpt2"])
def test_in_bf16_it_errs_no_more_than_the_models_own_code(name: str) -> None:
    model = model_of(name).bfloat16().eval()
    exact = copy.deepcopy(model).double()
    errors: dict[str, list[float]] = {"own": [], "fused": []}
    with torch.no_grad():
        for seed in range(6):
            ids = torch.randint(1, VOCAB, (4, 24), generator=torch.Generator().manual_seed(seed))
            true = exact(input_ids=ids, use_cache=False).logits
            for form in errors:
                with ExitStack() as stack:
                    if form == "fused":
                        stack.enter_context(fused(model))
                    logits = model(input_ids=ids, use_cache=False).logits
                errors[form].append(((logits.double() - true).norm() / true.norm()).item())
    assert 1e-4 < sum(errors["fused"]) <= 1.05 * sum(errors["own"])


@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_inside_is_bit_equal(dtype: torch.dtype) -> None:
    found = []
    for checkpointed in (False, True):
        model = model_of("llama").to(dtype)
        adapted(model)
        if checkpointed:
            enable_gradient_checkpointing(model)
        with both(model):
            found.append(seeded_step(model, together()))
    (loss, grads), (again, replayed) = found
    assert torch.equal(loss, again)
    assert grads.keys() == replayed.keys()
    assert all(torch.equal(g, replayed[name]) for name, g in grads.items())


@pytest.mark.parametrize("other", ["llama", "gemma"])
def test_two_models_nest(other: str) -> None:
    models = [model_of("llama"), model_of(other)]
    for model in models:
        adapted(model)
    before = [state(model) for model in models]
    expected = [seeded_step(model, together()) for model in models]
    with fused(models[0]) as outer:
        with fused(models[1]) as inner:
            assert outer.fast == inner.fast == 2
            for model, step in zip(models, expected, strict=True):
                assert_same_step(seeded_step(model, together()), step)
        assert_same_step(seeded_step(models[0], together()), expected[0])
        assert ("forward" in vars(models[1].model.layers[0].mlp)) is False
    assert [state(model) for model in models] == before


@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("targets", ["all-linear", "attention"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_base(kind: str, targets: str, tiny_model_dir: Any) -> None:
    """Its MLPs hold no floating-point parameter where no delta lies on them."""
    model = load_model(tiny_model_dir("llama-wide"), Storage(torch.bfloat16, kind)).train()
    adapted(model, lf.LoRA(rank=4), targets=targets)
    ids = torch.arange(5, 29)[None]
    with torch.no_grad():
        own = model.eval()(input_ids=ids, use_cache=False).logits
        with fused(model) as found:
            logits = model(input_ids=ids, use_cache=False).logits
    assert (found.fast, found.blocks) == (2, 2)
    assert (logits - own).float().norm() <= 0.02 * own.float().norm()


def test_a_model_without_blocks_is_no_error() -> None:
    with fused(nn.Sequential(nn.Linear(4, 4))) as found:
        assert (found.fast, found.blocks) == (0, 0)


def test_a_norm_that_is_trained() -> None:
    norms = {"modules_to_save": ["input_layernorm", "post_attention_layernorm"]}
    for options in ({"spec": lf.Full()}, {"spec": lf.LoRA(rank=4), **norms}):
        model = model_of("llama")
        adapted(model, **options)
        with packed(model):
            expected = seeded_step(model, together())
            with fused(model) as found:
                assert (found.fast, found.plain) == (0, ("norms",))
                assert_same_step(seeded_step(model, together()), expected)
        assert any("layernorm" in name for name in expected[1])


def test_a_weight_that_is_trained_without_an_adapter() -> None:
    model = model_of("llama").requires_grad_(False)
    model.model.layers[0].input_layernorm.requires_grad_(True)
    expected = loss_and_gradients(model, together())
    with fused(model):
        assert "forward" not in vars(model.model.layers[0].input_layernorm)
        assert "forward" in vars(model.model.layers[1].input_layernorm)
        assert_same_step(loss_and_gradients(model, together()), expected)


@pytest.mark.parametrize("word", ["houlsby", "pfeiffer"])
def test_a_module_that_carries_a_delta(word: str) -> None:
    """A bottleneck lies over the whole MLP: its delta must run."""
    model = model_of("llama")
    adapted(model, make_spec(word))
    with packed(model):
        expected = seeded_step(model, together())
        with fused(model) as found:
            lacking = ("MLP",) if word == "pfeiffer" else ("MLP", "rotary embedding")
            assert (found.fast, found.plain) == (0, lacking)
            assert_same_step(seeded_step(model, together()), expected)


def test_another_model_of_the_same_family_is_left_alone() -> None:
    ours, other = (model_of("llama").requires_grad_(False) for _ in range(2))
    plain = modeling_llama.apply_rotary_pos_emb
    with fused(ours) as found:
        assert found.plain == ()
        assert modeling_llama.apply_rotary_pos_emb is plain
        assert not any("forward" in vars(module) for module in other.modules())
    assert not any("forward" in vars(module) for module in ours.modules())


class Shifted(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + 0.01


class Gated(LlamaRMSNorm):
    """As Mamba's: with a second input, which may be missing."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states if gate is None else hidden_states * gate)


class Needy(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        return super().forward(hidden_states) * gate.sigmoid()


class Called(nn.Module):
    """Gives the norm its second input."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.norm(hidden_states, hidden_states)


@pytest.mark.parametrize("kind", [Shifted, Gated, Needy])
def test_a_norm_that_is_another(kind: type[LlamaRMSNorm]) -> None:
    model = model_of("llama")
    plain = model.model.layers[1].input_layernorm
    norm = kind(len(plain.weight), 1e-5)
    norm.load_state_dict(plain.state_dict())
    model.model.layers[1].input_layernorm = norm if kind is Shifted else Called(norm)
    adapted(model)
    expected = seeded_step(model, together())
    with fused(model):
        assert "forward" not in vars(norm)
        assert "forward" in vars(model.model.layers[1].post_attention_layernorm)
        assert_same_step(seeded_step(model, together()), expected)


def test_a_forward_that_someone_else_put_there() -> None:
    """It answers as the module does, and does more."""
    model = model_of("llama").requires_grad_(False)
    norm, seen = model.model.layers[0].input_layernorm, []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return LlamaRMSNorm.forward(norm, x)

    norm.forward = watched
    with fused(model):
        assert norm.forward is watched
    assert norm.forward is watched
    assert seen == []


def test_a_delta_that_changes_nothing_yet() -> None:
    """At the start a norm trained whole, and a bottleneck, answer as what they lie over."""
    model = model_of("llama")
    lf.attach(model, make_spec("houlsby"), modules_to_save=["input_layernorm"])
    with fused(model) as found:
        assert (found.fast, found.plain) == (0, ("MLP", "rotary embedding"))
        for layer in model.model.layers:
            assert not {"forward"} & (vars(layer.mlp).keys() | vars(layer.input_layernorm).keys())
        loss_and_gradients(model, together())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(model.get_parameter(name).grad is not None for name in trained)


class PartlyGated(nn.Module):
    """The names of a gated MLP, and another function."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj", "act_fn"):
            setattr(self, name, getattr(mlp, name))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (1 + self.up_proj(x)))


@pytest.mark.parametrize("change", ["function", "activation"])
def test_an_mlp_that_is_another(change: str) -> None:
    model = model_of("llama")
    for layer in model.model.layers:
        if change == "function":
            layer.mlp = PartlyGated(layer.mlp)
        else:
            layer.mlp.act_fn = nn.ReLU()
    adapted(model)
    with fused(model) as found:
        assert (found.fast, found.plain) == (0, ("MLP",))


def test_a_rotary_embedding_of_a_part_of_each_head() -> None:
    """Phi3 turns the first half of each head and passes the rest: its own function does that."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    model = model_of("phi3", rope_parameters=rope)
    adapted(model)
    expected = seeded_step(model, together())
    with fused(model):
        assert_same_step(seeded_step(model, together()), expected)


def test_a_rotary_embedding_that_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        q, k = (torch.stack(x.chunk(2, -1), -1).flatten(-2) for x in (q, k))
        return plain(q, k, cos, sin, unsqueeze_dim)

    plain = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, ROTARY, interleaved)
    with fused(model_of("llama").requires_grad_(False)) as found:
        assert (found.fast, found.plain) == (0, ("rotary embedding",))
        assert modeling_llama.apply_rotary_pos_emb is interleaved


def test_a_mixture_of_experts_is_itself() -> None:
    model = model_of("qwen3-moe")
    adapted(model)
    expected = seeded_step(model, together())
    with fused(model) as found:
        assert found.plain == ()
        assert_same_step(seeded_step(model, together()), expected)


def test_a_linear_attention_whose_norm_takes_a_gate_is_itself() -> None:
    size = GROUPED | {"head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    size |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    layers = {"layer_types": ["linear_attention", "full_attention"], "mlp_only_layers": [0, 1]}
    config = tf.Qwen3NextConfig(**size, **layers, num_experts=0, initializer_range=0.2)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).train()
    ids = torch.randint(1, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=ids, use_cache=False).logits
    model.requires_grad_(False)
    with fused(model):
        found = model(input_ids=ids, use_cache=False).logits
    assert (found - expected).norm() <= 1e-5 * expected.norm()


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 97}  # fmt: skip
COPIES = {"aten._to_copy.default", "aten.copy_.default", "aten.clone.default"}
VIEWS = ("view", "t", "transpose", "permute", "slice", "select", "split", "unsqueeze", "expand",
         "detach", "alias", "unbind", "as_strided", "_unsafe_view", "_reshape_alias")  # fmt: skip
# operations and copies of one block, forward and backward; before the operators in C++ 232 and 56,
# 258 and 67, 442 and 91
BUDGETS = {
    "lora": (lf.LoRA(rank=4, dropout=0.0), 144, 28),
    "lora-dropout": (lf.LoRA(rank=4, dropout=0.05), 163, 32),
    "dora": (lf.DoRA(lf.LoRA(rank=4, dropout=0.0)), 277, 42),
}


class Counted(TorchDispatchMode):
    """Counts what is dispatched, by name, but views, which compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).split(".")[1] not in VIEWS:
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def dispatched(spec: Any, blocks: int) -> Counter[str]:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_hidden_layers=blocks)).bfloat16()
    adapter = lf.attach(model, spec)
    rows = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(1)).tolist()
    batch = collate([Example(tuple(r), tuple(r)) for r in rows], packed=True, pad_id=0)
    labels = batch.pop("labels")
    model.train()
    with packed(model) as apart, fused(model):
        assert apart

        def run() -> None:
            labelled_loss(model, labels, batch)[0].backward()
            for p in adapter.parameters():
                p.grad = None

        run()
        with Counted() as counted:
            run()
    return counted.calls


@pytest.mark.parametrize("name", BUDGETS)
def test_a_block_dispatches_no_more_than_its_budget(name: str, each_form: str) -> None:
    if each_form == "plain":
        pytest.skip("the budget is that of the native form")
    spec, operations, copies = BUDGETS[name]
    one, two = (dispatched(spec, blocks) for blocks in (1, 2))
    block = two - one
    assert block.total() <= operations
    assert sum(block[c] for c in COPIES) <= copies
