"""Packed documents: batches, and whole models against each document alone."""

import copy
from itertools import product
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import masking_utils
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.inkling import modeling_inkling

import lorafold as lf
import reference_ops as reference
from fused_cases import assert_same_step
from lorafold.core.expert_matrices import module_at, parameter_path
from lorafold.data.batches import collate
from lorafold.ops.attention import document_attention
from lorafold.ops.packed_documents import Documents
from lorafold.training_step.fused_modules import fused
from lorafold.training_step.packed_attention import NAME, attend, document_mask, isolates, packed
from lorafold.training_step.shared_prefixes import sharing_prefixes
from noise import moved
from sequence_cases import (
    CONFIGS,
    GROUPED,
    LEAKY,
    Row,
    assert_close,
    build,
    heads,
    loss_and_gradients,
    rows,
)


@pytest.mark.few(5)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.usefixtures("each_form")
def test_attention_over_long_documents_in_fp32(window: int | None, softcap: float | None) -> None:
    # the form in C++ takes 512 keys at a time; the largest scores are in the first block for some
    # queries and in a later one for others
    lens = (1300, 40)
    qkv = [t.detach().mul(2).float().requires_grad_() for t in heads(1340, (20, 36), 2, 1)]

    def run(function: Any, leaves: list[Tensor]) -> list[Tensor]:
        out = function(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    docs = Documents(lens, window)
    found = run(lambda q, k, v: document_attention(q, k, v, docs, 0.5, softcap), qkv)
    expected = run(
        lambda q, k, v: reference.document_attention(q, k, v, docs, 0.5, softcap),
        [t.detach().double().requires_grad_() for t in qkv],
    )
    for ours, true in zip(found, expected, strict=True):
        assert_close(ours, true)


@pytest.mark.parametrize("window", [None, 4])
def test_dense_mask_shows_the_documents(window: int | None) -> None:
    seen = Documents((3, 5, 8), window).dense(2, torch.device("cpu"))
    document = [[0] * 3 + [1] * 5, [2] * 8]
    for b, i, j in product(range(2), range(8), range(8)):
        near = 0 <= i - j < (window or 8)
        assert seen[b, 0, i, j].item() == (document[b][i] == document[b][j] and near)


def test_collate_shifts_inside_each_document() -> None:
    examples = [Row([5, 6, 7], [-100, 6, 7]), Row([8, 9], [8, 9])]
    batch = collate(examples, packed=True, pad_id=0)
    assert {k: v.tolist() for k, v in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "labels": [[6, 7, -100, 9, -100]],
    }
    batch = collate(examples, packed=False, pad_id=0)
    assert {k: v.tolist() for k, v in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[6, 7, -100], [9, -100, -100]],
    }


@pytest.mark.few(9)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("each_form")
def test_packed_equals_each_document_alone(name: str, checkpointed: bool) -> None:
    model, examples = build(name), rows()
    model.set_attn_implementation("eager")  # softcaps need it, and it is the longest way round
    expected = loss_and_gradients(
        model, [collate([e], packed=False, pad_id=0) for e in examples]
    )
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([e.ids])).logits[0] for e in examples])
    if checkpointed:
        model.activation_checkpointing_enable()
    batch = collate(examples, packed=True, pad_id=0)
    with packed(model) as apart:
        assert apart
        assert model.config._attn_implementation == NAME
        assert model.training
        found = loss_and_gradients(model, [batch])
        with torch.no_grad():
            inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
            assert_close(model(**inputs, use_cache=False).logits[0], alone)
    assert model.config._attn_implementation == "eager"
    assert_same_step(found, expected)


@pytest.mark.few(5)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("method", ["lora", "loha"])
@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_adapters_of_experts_learn_the_same_from_packed_rows(name, method, checkpointed) -> None:
    """Against torch's own backward through the folded weights, by the fused parts."""
    model, plain, examples = build(name), build(name), rows()
    spec = lf.LoRA(rank=3, dropout=0.0) if method == "lora" else lf.LoHa(rank=2)
    adapter = lf.attach(model, spec)
    moved(adapter)
    assert any(path.endswith("experts.gate_up_proj") for path in adapter.matches.paths)
    folded = {}
    for path, delta in adapter.own_deltas.items():
        weight = parameter_path(module_at(model, path), path, "weight")
        folded[weight] = plain.get_parameter(weight).detach() + delta.delta()
    expected = torch.zeros(())
    for e in examples:
        given = {"input_ids": torch.tensor([e.ids]), "use_cache": False}
        z = functional_call(plain, folded, kwargs=given).logits[0, :-1]
        expected = expected + cross_entropy(z, torch.tensor(e.labels[1:]), reduction="sum")
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = {names[id(p)]: p for p in adapter.parameters()}
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    if checkpointed:
        model.activation_checkpointing_enable()
    with fused(model), packed(model) as apart:
        assert apart
        found = loss_and_gradients(model, [collate(examples, packed=True, pad_id=0)])
    assert_same_step(found, (expected.detach(), dict(zip(parameters, gradients, strict=True))))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mistral"])
def test_padding_and_rows_of_a_batch_take_the_same_values(name: str) -> None:
    """Two rows of documents, and a padded batch, under the packed attention."""
    model, examples = build(name).eval(), rows([8, 8, 11, 5])
    alone = [model(input_ids=torch.tensor([e.ids])).logits[0] for e in examples]
    ids = torch.tensor([examples[0].ids + examples[1].ids, examples[2].ids + examples[3].ids])
    positions = torch.tensor([[*range(8), *range(8)], [*range(11), *range(5)]])
    padded = collate(examples, packed=False, pad_id=0)
    del padded["labels"]
    with packed(model) as apart, torch.no_grad():
        assert apart
        two = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        right = model(**padded, use_cache=False).logits
    assert_close(two.flatten(0, 1), torch.cat(alone))
    for row, expected in zip(right, alone, strict=True):
        assert_close(row[: len(expected)], expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "qwen3-moe"])
def test_generate_goes_on_working(name: str) -> None:
    model = build(name).eval()
    prompt = torch.tensor([rows([11])[0].ids, rows([11, 11])[1].ids])
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **settings)
    with packed(model):
        found = model.generate(prompt, **settings)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mask", ["documents", "boolean", "added"])
@pytest.mark.parametrize("extra", ["sinks", "position_bias"])
def test_sinks_and_biases_take_the_general_path(extra: str, mask: str) -> None:
    """Against eager attention: GPT-OSS has sinks, Inkling a position bias."""
    draw = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, h, 12, 8, generator=draw) for h in (4, 2, 2))
    docs = Documents((5, 7, 12), window=4)
    seen = docs.dense(2, torch.device("cpu"))
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    if extra == "sinks":
        module.sinks = torch.randn(4, generator=draw)
        given, peer, also = {"s_aux": module.sinks}, modeling_gpt_oss, {}
    else:
        given = also = {"position_bias": torch.randn(1, 4, 12, 12, generator=draw)}
        peer = modeling_inkling
    expected, _ = peer.eager_attention_forward(module, q, k, v, added, scaling=0.3, **also)
    given_mask = {"documents": docs, "boolean": seen, "added": added}[mask]
    found, _ = attend(module, q, k, v, given_mask, scaling=0.3, **given)
    assert_close(found, expected)


@pytest.mark.parametrize("name", LEAKY)
@pytest.mark.filterwarnings("ignore")
def test_a_leak_is_detected_and_the_model_left_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(copy.deepcopy(LEAKY[name])).train()
    before = model.config._attn_implementation
    with packed(model) as apart, sharing_prefixes(model) as branches:
        assert (apart, branches.packs, branches.shares) == (False, False, False)
        assert model.config._attn_implementation == before
    examples = rows()
    alone, _ = loss_and_gradients(
        model.eval(), [collate([e], packed=False, pad_id=0) for e in examples]
    )
    padded, _ = loss_and_gradients(model.eval(), [collate(examples, packed=False, pad_id=0)])
    assert_close(padded, alone)


@pytest.mark.usefixtures("each_arithmetic")
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_a_faint_leak_in_bf16_is_detected(scale: float) -> None:
    """So faint that rounding could hide it: one layer reads one row back."""
    model = build("llama").bfloat16()
    assert isolates(model)

    def leak(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + scale * 0.2 * output.roll(12, 1)

    model.model.layers[1].mlp.down_proj.register_forward_hook(leak)
    assert not isolates(model)


def test_a_position_counted_over_the_row_is_detected() -> None:
    model = build("llama")

    def count(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + 0.1 * torch.arange(output.shape[1])[:, None]

    model.model.layers[0].mlp.down_proj.register_forward_hook(count)
    assert not isolates(model)


def test_an_error_of_the_model_on_packed_rows_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama")

    def fail(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
        raise TypeError("attend() got an unexpected keyword argument 'enable_gqa'")

    model.model.layers[1].self_attn.register_forward_hook(fail)
    assert not isolates(model)
    told = "this model does not support packed rows (TypeError: attend() got an unexpected keyword"
    assert told in caplog.text


def test_masks_that_are_no_causal_documents_stay_masks() -> None:
    def mask(function: Any) -> Any:
        return document_mask(batch_size=1, q_length=6, kv_length=6, mask_function=function)

    causal = masking_utils.causal_mask_function
    assert mask(causal) == Documents((6,))
    assert mask(masking_utils.and_masks(causal, lambda b, h, i, j: i // 2 == j // 2)) == Documents(
        (2, 2, 2)
    )
    assert mask(masking_utils.bidirectional_mask_function).all()
    two_ways = masking_utils.or_masks(
        causal, masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, -1, -1, -1]]))
    )
    assert mask(two_ways)[0, 0].sum() == 6 * 7 // 2 + 1


def test_the_question_leaves_no_trace() -> None:
    model = build("llama")
    frozen = model.model.layers[0].eval()
    state = torch.get_rng_state()
    assert isolates(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not frozen.training
    assert model.config._attn_implementation == "sdpa"


def test_attention_is_restored_after_an_error() -> None:
    model = build("llama")
    with pytest.raises(KeyboardInterrupt), packed(model):
        raise KeyboardInterrupt
    assert model.config._attn_implementation == "sdpa"


def test_a_model_without_a_head_is_not_packed_and_one_with_any_is() -> None:
    config = tf.LlamaConfig(**GROUPED, num_labels=3, pad_token_id=0)
    assert not isolates(tf.LlamaModel(config))
    assert isolates(tf.LlamaForSequenceClassification(config))
