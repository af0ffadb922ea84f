"""Virtual tokens of prompt and prefix tuning, against PEFT and against no cache."""

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lorafold as lf
from conftest import SIZE
from lorafold.data.batches import collate
from lorafold.data.examples import Example
from lorafold.generation import complete
from lorafold.layers import layer_of
from lorafold.training_step.lm_head_loss import labelled_loss
from lorafold.training_step.packed_attention import isolates, packed
from method_cases import IDS, classifier

N = 5
SPECS = [
    pytest.param(lf.Prompt(tokens=N), id="prompt"),
    pytest.param(lf.Prefix(tokens=N), id="prefix"),
]
KINDS = ["llama", "gpt2", "qwen2", "gemma"]
EPS = {"rtol": 1e-4, "atol": 2e-5}  # fp32, two orders of summation
GREEDY: dict[str, Any] = {
    "attention_mask": torch.ones_like(IDS), "do_sample": False, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip


def every(kinds: list[str] = KINDS) -> Any:
    def both(test: Any) -> Any:
        return pytest.mark.parametrize("spec", SPECS)(pytest.mark.parametrize("kind", kinds)(test))

    return both


def virtual(model: nn.Module, spec: Any, name: str = "default", seed: int = 0) -> lf.Adapter:
    """An adapter strong enough to be seen: tiny random models hardly attend to anything."""
    torch.manual_seed(seed)
    adapter = lf.attach(model, spec, name=name)
    with torch.no_grad():
        for p in adapter.parameters():
            p.mul_(3).add_(torch.randn(p.shape))
    return adapter


def logits(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def greedy(model: nn.Module, ids: Tensor, steps: int) -> Tensor:
    """The definition: everything computed anew for each token."""
    for _ in range(steps):
        ids = torch.cat([ids, logits(model, ids, use_cache=False)[:, -1:].argmax(-1)], 1)
    return ids


@every()
def test_logits_are_those_of_peft(spec: Any, kind: str, tiny_model) -> None:
    model = tiny_model(kind)
    config = {lf.Prompt: peft.PromptTuningConfig, lf.Prefix: peft.PrefixTuningConfig}[type(spec)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.get_peft_model(
            copy.deepcopy(model), config(task_type="CAUSAL_LM", num_virtual_tokens=N)
        ).eval()
        adapter = virtual(model, spec)
        (tensor,) = adapter.parameters()
        assert other.prompt_encoder["default"].embedding.weight.shape == tensor.shape
        other.prompt_encoder["default"].embedding.weight.data.copy_(tensor.data)
        expected = logits(other, IDS, attention_mask=torch.ones_like(IDS))[:, -IDS.shape[1] :]
    found = logits(model, IDS)
    torch.testing.assert_close(found, expected, **EPS)
    with lf.only(model):
        assert (logits(model, IDS) - expected).norm() > 1e-2 * expected.norm()


@every(["llama", "gpt2"])
def test_padding_on_either_side_changes_nothing(spec: Any, kind: str, tiny_model) -> None:
    model = tiny_model(kind)
    virtual(model, spec)
    alone = logits(model, IDS[:1, :6])
    mask = torch.ones_like(IDS)
    mask[0, 6:] = 0
    torch.testing.assert_close(logits(model, IDS, attention_mask=mask)[:1, :6], alone, **EPS)
    left = torch.cat([IDS[:, 6:], IDS[:, :6]], 1)
    positions = (mask.flip(1).cumsum(1) - 1).clamp_min(0)
    found = logits(model, left, attention_mask=mask.flip(1), position_ids=positions)[:1, 3:]
    torch.testing.assert_close(found, alone, **EPS)


@pytest.mark.few(5)
@every()
def test_generate_with_a_cache_is_the_recomputation(spec: Any, kind: str, tiny_model) -> None:
    model = tiny_model(kind)
    virtual(model, spec)
    expected = greedy(model, IDS, 8)
    scores = logits(model, expected)[:, -9:-1]
    static = {"cache_implementation": "static", "disable_compile": True}
    told = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
    for cache in ({}, {"use_cache": False}, static):
        found = model.generate(IDS, **GREEDY, **told, **cache)
        assert torch.equal(found.sequences, expected)
        torch.testing.assert_close(torch.stack(found.logits, 1), scores, **EPS)
    with lf.only(model):
        assert (logits(model, expected)[:, -9:-1] - scores).norm() > 1e-2 * scores.norm()


@pytest.mark.few(3)
@every(["llama", "gpt2"])
def test_a_left_padded_batch_generates_as_each_row(spec, kind, tiny_model, tiny_model_dir) -> None:
    from lorafold.models.tokenizer import load_tokenizer

    model, tokenizer = tiny_model(kind), load_tokenizer(str(tiny_model_dir(kind)))
    virtual(model, spec)
    prompts = ["Book a table", "Remind me to call the plumber tomorrow", "The quick brown fox"]
    # more than one round: caches are handed on
    alone = [complete(model, tokenizer, [p], 20)[0] for p in prompts]
    assert complete(model, tokenizer, prompts, 20) == alone
    ids = torch.tensor([tokenizer(prompts[0], add_special_tokens=False).input_ids])
    assert tokenizer.decode(
        greedy(model, ids, 20)[0, ids.shape[1] :], skip_special_tokens=True
    ).startswith(alone[0])


@every(["llama"])
def test_beams_reorder_the_cache_and_nothing_else(spec: Any, kind: str, tiny_model) -> None:
    model = tiny_model(kind)
    virtual(model, spec)
    options = GREEDY | {"max_new_tokens": 6, "num_beams": 3}
    cached, anew = (model.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, anew)


@every(["llama", "gemma"])
def test_labels_and_the_loss_at_labelled_positions(spec: Any, kind: str, tiny_model) -> None:
    model = tiny_model(kind)
    adapter = virtual(model, spec)
    found = model(input_ids=IDS, labels=IDS)
    assert found.logits.shape[:2] == IDS.shape
    plain = cross_entropy(found.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(found.loss, plain, rtol=1e-5, atol=1e-6)
    labels = torch.cat([IDS[:, 1:], torch.full((3, 1), -100)], 1)
    total, n = labelled_loss(model, labels, {"input_ids": IDS})
    torch.testing.assert_close(total / n, plain, rtol=1e-5, atol=1e-6)
    (p,) = adapter.parameters()
    (expected,), (gradient,) = torch.autograd.grad(plain, [p]), torch.autograd.grad(total / n, [p])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


@every(["llama", "gpt2", "qwen2"])
def test_packed_documents_each_see_them(spec: Any, kind: str, tiny_model) -> None:
    model = tiny_model(kind)
    virtual(model, spec)
    assert isolates(model)

    documents = [IDS[0, :4], IDS[1], IDS[2, :6]]
    alone = torch.cat([logits(model, d[None])[0] for d in documents])
    with packed(model) as apart:
        assert apart
        batch = collate([Example(d.tolist(), d.tolist()) for d in documents], packed=True, pad_id=0)
        del batch["labels"]
        ids = batch.pop("input_ids")
        torch.testing.assert_close(logits(model, ids, **batch, use_cache=False)[0], alone, **EPS)
        rows = torch.cat([logits(model, row[None]) for row in IDS])
        torch.testing.assert_close(logits(model, IDS), rows, **EPS)
    torch.testing.assert_close(logits(model, IDS[:1, :4])[0], alone[:4], **EPS)


@every(["llama", "gpt2", "gemma"])
def test_eager_attention_computes_the_same(spec: Any, kind: str, tiny_model) -> None:
    model = tiny_model(kind)
    virtual(model, spec)
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    expected = logits(model, IDS, **inputs)[mask.bool()]
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, IDS, **inputs)[mask.bool()], expected, **EPS)


@pytest.mark.parametrize("spec", SPECS)
def test_a_sliding_window_never_loses_them(spec: Any) -> None:
    torch.manual_seed(0)
    size = SIZE | {"vocab_size": 260, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = tf.Gemma2Config(**size, sliding_window=6, attn_implementation="eager")
    model = tf.Gemma2ForCausalLM(config).eval()
    virtual(model, spec)
    assert torch.equal(model.generate(IDS, **GREEDY, max_new_tokens=6), greedy(model, IDS, 6))


@pytest.mark.parametrize("spec", SPECS)
def test_under_checkpointing_two_batches_may_wait_for_their_backward(spec, tiny_model) -> None:
    model = tiny_model("llama").train()
    adapter = virtual(model, spec)
    (p,) = adapter.parameters()

    def gradient() -> Tensor:
        losses = [model(input_ids=ids, labels=ids).loss for ids in (IDS, IDS.flip(1))]
        return torch.autograd.grad(sum(losses), [p])[0]

    plain = gradient()
    model.activation_checkpointing_enable()
    torch.testing.assert_close(gradient(), plain, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("below", "above"), [(a, b) for a in (lf.Prompt, lf.Prefix) for b in (lf.Prompt, lf.Prefix)]
)
def test_adapters_stack(below: Any, above: Any, tiny_model) -> None:
    model = tiny_model("llama")
    a, b = virtual(model, below(tokens=2), "a"), virtual(model, above(tokens=3), "b", seed=1)
    both = logits(model, IDS)
    assert torch.equal(model.generate(IDS, **GREEDY, max_new_tokens=5), greedy(model, IDS, 5))
    for name in "ab":
        with lf.only(model, name):
            one = logits(model, IDS)
        assert (both - one).norm() > 1e-3 * one.norm()
    if below is above is lf.Prompt:
        one = tiny_model("llama")
        joint = lf.attach(one, lf.Prompt(tokens=5))
        joint.deltas["model"].embeddings.data.copy_(
            torch.cat([next(a.parameters()), next(b.parameters())])
        )
        torch.testing.assert_close(logits(one, IDS), both, **EPS)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_classifier_takes_them_too(spec: Any, kind: str) -> None:
    model = classifier(kind)
    bare = logits(model, IDS)
    adapter = virtual(model, spec)
    assert not torch.allclose(logits(model, IDS), bare)
    model(input_ids=IDS, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize("spec", SPECS)
def test_what_cannot_be_is_said(spec: Any, tiny_model) -> None:
    model = tiny_model("llama")
    told = r"found Linear, expected a decoder with attention layers"
    with pytest.raises(lf.LorafoldError, match=told):
        lf.attach(model, spec, ["q_proj"])
    with pytest.raises(lf.LorafoldError, match="has no modules of this preset"):
        lf.attach(nn.Sequential(nn.Linear(3, 3)), spec)
    adapter = lf.attach(model, spec)
    with pytest.raises(lf.NotMergeable, match=r"PromptDelta|PrefixDelta|no weight"):
        adapter.merge()
    for site in [site for path, site in adapter.sites.items() if path != "model"]:
        site.deltas["default"] = lf.Bottleneck(size=2).build(layer_of(site))
    with pytest.raises(lf.LorafoldError, match=r"of layers \[0, 1\]"):
        logits(model, IDS)


def test_prefix_begins_with_activations_of_real_tokens(tiny_model) -> None:
    model = tiny_model("qwen2")
    torch.manual_seed(3)
    delta = lf.attach(model, lf.Prefix(tokens=4)).deltas["model"]
    torch.manual_seed(3)
    ids = torch.randint(model.config.vocab_size, (4,))
    with lf.only(model), torch.no_grad():
        cache = model(ids[None], use_cache=True).cache
    for layer, (keys, values) in delta.keys_and_values(None, None).items():
        torch.testing.assert_close(keys, cache.layers[layer].keys)
        torch.testing.assert_close(values, cache.layers[layer].values)
    other = lf.attach(tiny_model("gpt2"), lf.Prefix(tokens=4, init="random"))
    random = other.deltas["transformer"].prefix
    assert random.std().item() == pytest.approx(0.02, rel=0.2)  # 512 draws: standard error 3%


@pytest.mark.parametrize("cls", [lf.Prompt, lf.Prefix])
def test_options_out_of_range(cls: Any) -> None:
    wrong = "tokens: found 0, expected a positive integer; init: found 'zero'"
    with pytest.raises(lf.LorafoldError, match=wrong):
        cls(tokens=0, init="zero")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma"])
def test_it_is_the_model_with_embeddings_in_front(kind: str, tiny_model) -> None:
    model, plain = tiny_model(kind), tiny_model(kind)
    delta = next(iter(lf.attach(model, lf.Prompt(tokens=4)).deltas.values()))
    front = delta.embeddings.detach().clone().requires_grad_(True)
    inputs = torch.cat([front.expand(3, -1, -1), plain.get_input_embeddings()(IDS)], 1)
    expected, found = plain(inputs_embeds=inputs).logits[:, 4:], model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(delta.embeddings.grad, front.grad, rtol=1e-3, atol=1e-6)


def test_it_begins_as_tokens_of_the_vocabulary_or_spread_like_them(tiny_model) -> None:
    model = tiny_model("llama")
    weight = model.get_input_embeddings().weight
    torch.manual_seed(3)
    vocabulary = lf.attach(model, lf.Prompt(tokens=6), name="a").deltas["model"].embeddings
    torch.manual_seed(3)
    assert torch.equal(vocabulary, weight[torch.randint(len(weight), (6,))])
    random = (
        lf.attach(model, lf.Prompt(tokens=50, init="random"), name="b").deltas["model"].embeddings
    )
    # 1,600 draws: standard error 2%
    assert random.std().item() == pytest.approx(weight.std().item(), rel=0.1)


def test_the_prompt_runs_once_for_a_cache_and_lies_with_it(tiny_model) -> None:
    model = tiny_model("llama")
    adapter = lf.attach(model, lf.Prompt(tokens=4))
    lengths: list[int] = []
    model.model.layers[0].register_forward_pre_hook(
        lambda m, args: lengths.append(args[0].shape[1])
    )
    with torch.no_grad():
        output = model(IDS, use_cache=True, cache=None)
        output = model(IDS[:, :1], cache=output.cache)
        # a cache that the model made itself comes without: once more
        assert lengths == [4, 9, 4, 1]
        twin = copy.deepcopy(output.cache)
        next(adapter.parameters()).zero_()
        a = model(IDS[:, :1], cache=output.cache).logits
        assert torch.equal(model(IDS[:, :1], cache=twin).logits, a)
    assert lengths == [4, 9, 4, 1, 1, 1]
    assert output.cache.get_seq_length() == 11


def test_gradients_accumulate_over_the_whole_batch(tiny_model) -> None:
    model = tiny_model("llama")
    (p,) = lf.attach(model, lf.Prompt(tokens=4)).parameters()

    def gradient(ids: Tensor) -> Tensor:
        return torch.autograd.grad(model(ids).logits.square().sum(), [p])[0]

    torch.testing.assert_close(
        gradient(IDS), sum(gradient(row[None]) for row in IDS), rtol=1e-4, atol=1e-6
    )
