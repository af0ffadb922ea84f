"""The loss at labelled positions, on heads of every make."""

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import lorafold as lf
import reference_ops as reference
from lorafold.errors import LorafoldError
from lorafold.ops import cross_entropy
from lorafold.ops.cross_entropy import LinearHead, head_cross_entropy, head_losses
from lorafold.training_step import lm_head_loss as head_of_step
from lorafold.training_step.lm_head_loss import document_losses, labelled_loss, linear_form
from sequence_cases import GROUPED, VOCAB

B, T = 2, 11
pytestmark = pytest.mark.usefixtures("each_form")
COMMON = GROUPED | {"num_hidden_layers": 1, "initializer_range": 0.2, "pad_token_id": 0}
MOE = {"num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
MOE |= {"head_dim": 8, "num_experts_per_tok": 2}
CONFIGS = {
    "llama": tf.LlamaConfig(**COMMON),
    "tied": tf.Qwen2Config(**COMMON, tie_word_embeddings=True),
    "capped": tf.Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=3.0),
    "scaled": tf.CohereConfig(**COMMON, logit_scale=0.25),
    "divided": tf.GraniteConfig(**COMMON, logits_scaling=4.0),
    "biased": tf.PhiConfig(**COMMON),
    "gpt2": tf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=VOCAB, initializer_range=0.2),
    "moe": tf.Qwen3MoeConfig(**COMMON, **MOE),
}


@pytest.fixture(autouse=True)
def chunks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    # the 13 labelled positions below then take several chunks, the last one short
    monkeypatch.setattr(cross_entropy, "CHUNK", 4)


class Adapted(nn.Linear):
    """A head whose class was swapped: as a linear it has not all that it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.t() @ self.up.t()


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).to(dtype).eval()


def batch(labelled: int = 13) -> tuple[Tensor, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (B, T), generator=draw)
    labels = torch.randint(VOCAB, (B * T,), generator=draw)
    labels[torch.randperm(B * T, generator=draw)[labelled:]] = -100
    return labels.view(B, T), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def prepare(model: Any, state: str) -> None:
    """What is trained: `state`, or a block under a frozen head."""
    head, block = model.get_output_embeddings(), model.get_decoder()
    model.requires_grad_(state == "all")
    if state == "frozen head":
        block.requires_grad_(True)
        head.requires_grad_(False)
    elif state == "head alone":
        head.requires_grad_(True)
    elif state == "adapted head":
        head.__class__ = Adapted
        head.down = nn.Parameter(torch.randn(2, head.in_features))
        head.up = nn.Parameter(torch.randn(head.out_features, 2))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: Tensor, expected: Tensor, units: float = 100) -> None:
    """100 units of the dtype: what sums of some hundred terms cost in another order."""
    assert (found - expected).norm() <= units * torch.finfo(
        expected.dtype
    ).eps * expected.norm().clamp_min(1e-3)


@pytest.mark.few(22)
@pytest.mark.parametrize("state", ["all", "frozen head", "head alone", "adapted head"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_whole_logits(name: str, state: str) -> None:
    model = build(name)
    prepare(model, state)
    labels, inputs = batch()
    expected = reference.labelled_loss(model(**inputs, use_cache=False).logits, labels)
    wanted = gradients(model, expected / 13)
    found, n = labelled_loss(model, labels, inputs)
    assert n == 13
    assert_close(found.detach(), expected.detach())
    got = gradients(model, found / 13)
    assert got.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        assert_close(got[parameter], gradient)


@pytest.mark.parametrize("state", ["frozen head", "adapted head"])
@pytest.mark.parametrize("name", CONFIGS)
def test_row_losses_are_those_of_each_row_alone(name: str, state: str) -> None:
    model = build(name)
    prepare(model, state)
    labels, inputs = batch()
    labels[-1] = -100
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    rows = zip(logits.split(1), labels.split(1), strict=True)
    expected = torch.stack([reference.labelled_loss(*row) for row in rows])
    assert expected[-1] == 0
    assert expected[0] > 0
    row = torch.arange(len(labels))[:, None].expand_as(labels)
    losses, _ = document_losses(model, labels, inputs, row, len(labels))
    assert_close(losses.detach(), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_frozen_linear_heads_take_the_short_way(name: str) -> None:
    model = build(name).requires_grad_(False)
    _, inputs = batch()
    h = model.get_decoder()(**inputs).last_hidden_state[0, -1:]
    logits = model(**inputs).logits[0, -1:]
    assert linear_form(model, logits, h) is not None
    other = build(name).requires_grad_(False)  # what was found of a model is not asked again
    assert linear_form(other, logits * 1.01, h) is None
    model.get_output_embeddings().__class__ = Adapted
    assert linear_form(model, logits, h) is None


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["llama", "capped", "scaled"])
def test_fp64_gradcheck_of_every_way(name: str) -> None:
    model = build(name, torch.float64).requires_grad_(False)
    scale = getattr(model, "logit_scale", 1.0)
    cap = getattr(model.config, "final_logit_softcapping", None)
    linear = LinearHead(model.get_output_embeddings().weight, None, scale, cap)
    h = torch.randn(6, 32, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(VOCAB, (6,))

    def short(h: torch.Tensor) -> torch.Tensor:
        return cross_entropy.linear_cross_entropy(h, targets, linear)

    def long(h: torch.Tensor) -> torch.Tensor:
        return head_cross_entropy(h, targets, head, [], cross_entropy.chunks(len(h)))

    def again(h: torch.Tensor) -> torch.Tensor:
        return head_losses(h, targets, partial(head_of_step.head_logits, model))

    assert torch.autograd.gradcheck(short, h)
    assert torch.autograd.gradcheck(again, h)
    torch.testing.assert_close(short(h), again(h))
    with head_of_step._decoder_bypassed(model) as head:
        assert torch.autograd.gradcheck(long, h)
        torch.testing.assert_close(short(h).sum(), long(h))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_finds_no_fault_with_the_linear_heads_operation(dtype: torch.dtype) -> None:
    h, w = torch.randn(6, 32, dtype=dtype), torch.randn(VOCAB, 32, dtype=dtype)
    logits, block = torch.empty(4, VOCAB, dtype=dtype), torch.empty(4, VOCAB)
    workspace = (torch.empty_like(h), logits, block, logits.new_empty(0, 32))
    arguments = (h, torch.randint(VOCAB, (6,)), w, None, 0.5, 3.0, *workspace)
    torch.library.opcheck(torch.ops.lorafold.linear_cross_entropy.default, arguments)


@pytest.mark.few(10)
@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", ["llama", "capped", "scaled"])
def test_bf16_errs_no_more_than_whole_logits(name: str, adapted: bool) -> None:
    labels, inputs = batch()

    def run(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        model = build(name, torch.bfloat16)
        prepare(model, "adapted head" if adapted else "frozen head")
        model.get_input_embeddings().requires_grad_(True)
        model.bfloat16().to(dtype)
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: Any, output: Any) -> None:
            output.last_hidden_state.retain_grad()
            caught.append(output.last_hidden_state)

        model.get_decoder().register_forward_hook(catch)
        if ours:
            loss, _ = labelled_loss(model, labels, inputs)
        else:
            logits = model(**inputs).logits.to(torch.promote_types(dtype, torch.float32))
            loss = reference.labelled_loss(logits, labels)
        (loss / 13).backward()
        return [loss.detach().double()[None], caught[0].grad.double()]

    truth, peer = run(torch.float64, False), run(torch.bfloat16, False)
    for ours, theirs, true in zip(run(torch.bfloat16, True), peer, truth, strict=True):
        # the loss is a single number, whose error may be small by luck: a bf16 unit is granted
        # beside it
        granted = torch.finfo(torch.bfloat16).eps * true.norm() if true.numel() == 1 else 0.0
        assert (ours - true).norm() <= 1.5 * (theirs - true).norm() + granted


@pytest.mark.parametrize("state", ["all", "frozen head", "adapted head"])
def test_no_label_gives_no_loss_and_no_gradient(state: str) -> None:
    model = build("llama")
    prepare(model, state)
    labels, inputs = batch(labelled=0)
    if state == "adapted head":
        model.get_decoder().requires_grad_(True)
    loss, n = labelled_loss(model, labels, inputs)
    assert n == 0
    assert loss.item() == 0.0
    found = gradients(model, loss)
    assert found
    assert all((g == 0).all() for g in found.values())


def test_sums_over_micro_batches_add_up() -> None:
    model = build("llama")
    labels, inputs = batch()
    whole = gradients(model, labelled_loss(model, labels, inputs)[0] / 13)
    model.zero_grad()
    for b in range(B):
        part = {k: v[b : b + 1] for k, v in inputs.items()}
        (labelled_loss(model, labels[b : b + 1], part)[0] / 13).backward()
    for name, gradient in whole.items():
        assert_close(model.get_parameter(name).grad, gradient)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_router_loss_is_the_models_own(name: str, adapted: bool) -> None:
    router = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    config = {
        "qwen3-moe": tf.Qwen3MoeConfig(**COMMON, **MOE, **router),
        "mixtral": tf.MixtralConfig(**COMMON, **router, num_local_experts=4),
    }[name]
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    if adapted:
        for p in lf.attach(model, lf.LoRA(rank=2, dropout=0.0)).parameters():
            nn.init.normal_(p, std=0.1)
    labels, inputs = batch()
    inputs["attention_mask"][1, 7:] = 0
    output = model(**inputs)
    expected = reference.labelled_loss(output.logits, labels) / 13 + 0.5 * output.aux_loss
    assert output.aux_loss > 0
    wanted = gradients(model, expected)
    loss, n = labelled_loss(model, labels, inputs)
    assert_close((loss / n).detach(), expected.detach())
    for name, gradient in gradients(model, loss / n).items():
        assert_close(gradient, wanted[name])


def test_router_loss_that_is_missing_is_an_error() -> None:
    model = build("llama")
    model.config.output_router_logits = True
    with pytest.raises(LorafoldError, match="output_router_logits needs aux_loss"):
        labelled_loss(model, *batch())


def test_a_body_without_a_head_is_an_error() -> None:
    with pytest.raises(LorafoldError, match="expected a causal language model"):
        labelled_loss(tf.LlamaModel(copy.deepcopy(CONFIGS["llama"])), *batch())


class Prompted(tf.LlamaForCausalLM):
    """A root with a soft prompt, whose rows are cut from the output, or not."""

    cut = True

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> Any:  # type: ignore[override]
        kwargs.pop("attention_mask", None)
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        output = super().forward(
            inputs_embeds=torch.cat([self.prompt.expand(len(x), -1, -1), x], 1), **kwargs
        )
        if self.cut:
            output.logits = output.logits[:, self.prompt.shape[1] :]
        return output


@pytest.mark.parametrize("cut", [True, False])
def test_soft_prompts_at_the_root(cut: bool) -> None:
    model = build("llama").requires_grad_(False)
    model.__class__ = Prompted
    model.cut = cut
    model.prompt = nn.Parameter(torch.randn(1, 3, 32))
    labels, inputs = batch()
    expected = reference.labelled_loss(model(**inputs).logits[:, -T:], labels)
    wanted = gradients(model, expected)
    loss, _ = labelled_loss(model, labels, inputs)
    assert_close(loss.detach(), expected.detach())
    assert_close(gradients(model, loss)["prompt"], wanted["prompt"])


def test_the_model_is_left_as_it_was() -> None:
    model = build("llama")
    prepare(model, "adapted head")
    keys, state = set(model.get_decoder().__dict__), torch.get_rng_state()
    labelled_loss(model, *batch())[0].backward()
    labels, inputs = batch()
    with pytest.raises(IndexError):
        labelled_loss(model, labels + VOCAB, inputs)
    assert set(model.get_decoder().__dict__) == keys
    assert not model.get_decoder()._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)
    pickle.loads(pickle.dumps(model))


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    model = build("llama")
    labels, inputs = batch()
    with torch.no_grad():
        loss, _ = labelled_loss(model, labels, inputs)
    assert not loss.requires_grad
    assert_close(loss, labelled_loss(model, labels, inputs)[0].detach())


def test_autocast_trains_a_head() -> None:
    """Under autocast weights are cast once and shared by the chunks."""
    model = build("llama")
    labels, inputs = batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = reference.labelled_loss(model(**inputs).logits.float(), labels)
        wanted = gradients(model, expected)
        loss, _ = labelled_loss(model, labels, inputs)
    units = torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
    for name, gradient in gradients(model, loss).items():
        assert_close(gradient, wanted[name], units)
