"""Rows whose branches share their first tokens, against each branch alone."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import lorafold as lf
import reference_ops as reference
from fused_cases import assert_same_step
from lorafold.errors import LorafoldError
from lorafold.methods import make_spec
from lorafold.models.loading import load_model
from lorafold.ops import cross_entropy, packed_documents
from lorafold.ops.attention import document_attention
from lorafold.ops.packed_documents import Documents
from lorafold.training_step.fused_modules import fused
from lorafold.training_step.gradient_checkpointing import enable_gradient_checkpointing
from lorafold.training_step.lm_head_loss import document_losses, labelled_loss
from lorafold.training_step.packed_attention import packed
from lorafold.training_step.shared_prefixes import PrefixSupport, sharing_prefixes
from noise import moved
from sequence_cases import CONFIGS, GROUPED, VOCAB, assert_close, build, heads

CPU = torch.device("cpu")
# of each row, the shared tokens and the branches; windows of 5 and 6 are shorter than the prompts
SHARED, BRANCHES = [9, 0, 1, 12], [[7, 5], [6, 4], [3, 2, 8], [1, 1]]
LAYOUTS = {
    "rows": (SHARED, BRANCHES),
    "equal": ([6, 6], [[4, 4, 4, 4], [4, 4, 4, 4]]),
    "nothing-shared": ([0, 0], [[5, 3], [4]]),
    "one-branch": ([4, 2], [[3], [5]]),
    "documents": ([0] * 4, [[3], [3], [1], [5]]),
}


def layout(shared: list[int], branches: list[list[int]], window: int | None = None) -> Documents:
    """Of each row the shared tokens and then each branch."""
    both = [*zip(shared, branches, strict=True)]
    lens = [start + n for start, own in both for n in own]
    starts = [start * (i > 0) for start, own in both for i, _ in enumerate(own)]
    made = Documents.with_shared_prefixes(lens, starts, CPU)
    return Documents(made.lens, window, made.starts, made.keys)


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, rows: Any, window: int | None, softcap: float | None
) -> Tensor:
    """Each branch after its own copy of the shared tokens, (T, H, Dv)."""
    out, at = [], 0
    for shared, branches in zip(*rows, strict=True):
        prompt = torch.arange(at, at + shared)
        at += shared
        for i, n in enumerate(branches):
            tokens = torch.cat([prompt, torch.arange(at, at + n)])
            whole = reference.document_attention(
                q[tokens], k[tokens], v[tokens], Documents((len(tokens),), window), 0.5, softcap
            )
            out.append(whole[shared if i else 0 :])
            at += n
    return torch.cat(out)


@pytest.mark.usefixtures("each_form")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("rows", LAYOUTS)
def test_attention_is_each_branch_alone_in_fp64(rows, window, softcap, monkeypatch) -> None:
    monkeypatch.setattr(packed_documents, "TILE", 2)  # one, two and several tiles
    docs = layout(*LAYOUTS[rows], window)
    qkv = heads(sum(docs.own), (3, 5), queries=4, keys=2)
    expected = one_by_one(*qkv, LAYOUTS[rows], window, softcap)
    spec = reference.document_attention(*qkv, docs, 0.5, softcap)
    found = document_attention(*qkv, docs, 0.5, softcap)
    g = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, qkv, g)
    for got in (found, spec):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        for mine, theirs in zip(torch.autograd.grad(got, qkv, g), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_gradcheck_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_documents, "TILE", 4)
    docs = layout([5, 2], [[3, 2], [2, 4, 1]], window=6)
    qkv = heads(sum(docs.own), (3, 2), queries=2, keys=1)
    assert torch.autograd.gradcheck(lambda *x: document_attention(*x, docs, 0.5, 2.0), qkv)


TREES = [layout([100, 150], [[40, 70], [30, 30, 60]], window) for window in (None, 50)]


@pytest.mark.few(16)
@pytest.mark.usefixtures("each_arithmetic", "each_form")
@pytest.mark.parametrize(
    ("docs", "softcap"),
    [
        *((TREES[0], None), (TREES[1], None), (TREES[0], 30.0)),
        *((Documents(lens), None) for lens in ((214, 180, 118), (128,) * 4, (1024,))),
        *((Documents((700,), 300), None), (Documents((90, 400)), 30.0)),
    ],
)
def test_attention_in_bf16_errs_no_more_than_its_specification(docs: Any, softcap: Any) -> None:
    qkv = heads(sum(docs.own), (32, 32), queries=6, keys=2)
    g = torch.randn(
        sum(docs.own), 6, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    ).bfloat16()

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().bfloat16().to(dtype).requires_grad_() for t in qkv]
        out = function(*leaves)
        return [t.double() for t in (out, *torch.autograd.grad(out, leaves, g.to(dtype)))]

    def spec(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.document_attention(q, k, v, docs, 32**-0.5, softcap)

    truth = run(spec, torch.float64)
    found = run(lambda *x: document_attention(*x, docs, 32**-0.5, softcap), torch.bfloat16)
    for ours, peer, true in zip(found, run(spec, torch.bfloat16), truth, strict=True):
        assert (ours - true).norm() <= 1.5 * (peer - true).norm()


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("rows", LAYOUTS)
def test_dense_mask_shows_the_branches(rows: str, window: int | None) -> None:
    shared, branches = LAYOUTS[rows]
    docs = layout(shared, branches, window)
    seen = docs.dense(1, CPU)
    # (row, branch or None for shared tokens, position)
    tokens: list[tuple[int, int | None, int]] = []
    for row, (s, own) in enumerate(zip(shared, branches, strict=True)):
        tokens += [(row, None, i) for i in range(s)]
        tokens += [(row, b, s + i) for b, n in enumerate(own) for i in range(n)]
    assert docs.positions().tolist() == [[position for _, _, position in tokens]]
    assert seen.shape == (1, 1, len(tokens), len(tokens))
    for i, (row, branch, at) in enumerate(tokens):
        for j, (other, theirs, before) in enumerate(tokens):
            near = 0 <= at - before < (window or len(tokens))
            expected = row == other and theirs in (None, branch) and near
            assert seen[0, 0, i, j].item() == expected, (i, j)


def test_documents_that_share_nothing_gather_nothing() -> None:
    assert layout([0, 0], [[5, 3], [4]]) == Documents((5, 3, 4))
    one = layout([4, 2], [[3], [5]])
    assert one == Documents((7, 7))
    assert one.keys is None


@pytest.mark.parametrize(
    ("lens", "starts"), [([4, 4], [0, -1]), ([4], [1]), ([4, 4], [0, 4]), ([3, 9], [0, 3])]
)
def test_lengths_that_no_row_has_are_refused(lens: list[int], starts: list[int]) -> None:
    with pytest.raises(LorafoldError, match=r"packed row \d: found .* expected fewer"):
        Documents.with_shared_prefixes(lens, starts, CPU)


class Batch(NamedTuple):
    """Rows of branches in one sequence (1, T), and the same documents one by one."""

    docs: Documents
    inputs: dict[str, Tensor]
    labels: Tensor  # (1, T)
    document: Tensor  # (1, T)
    alone: list[tuple[Tensor, Tensor]]  # ids and labels (1, t) of each document


def batch() -> Batch:
    """The labels of a document are on its branch, the last position of which has none."""
    docs = layout(SHARED, BRANCHES)
    assert docs.starts is not None
    assert docs.keys is not None
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (sum(docs.own),), generator=draw)
    labels, document = torch.full_like(ids, -100), torch.full_like(ids, -1)
    prompts = [s for s, own in zip(SHARED, BRANCHES, strict=True) for _ in own]
    alone, at = [], 0
    for i, (n, s) in enumerate(zip(docs.lens, prompts, strict=True)):
        tokens = docs.keys[at : at + n]
        at += n
        own = torch.full((n,), -100)
        own[s:-1] = ids[tokens][s + 1 :]
        labels[tokens[s:]], document[tokens[s:]] = own[s:], i
        alone.append((ids[tokens][None], own[None]))
    inputs = {"input_ids": ids[None], "position_ids": docs.positions()}
    return Batch(docs, inputs, labels[None], document[None], alone)


WEIGHTS = torch.randn(9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def step(model: Any, losses: Tensor, weights: Tensor = WEIGHTS) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of documents, and the gradients of a sum with weights of either sign."""
    model.zero_grad()
    (losses * weights.to(losses.dtype)).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return losses.detach(), found


def expected_step(model: Any, given: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """By whole logits of each document alone."""
    losses = [
        reference.labelled_loss(model(input_ids=ids, use_cache=False).logits, labels)
        for ids, labels in given.alone
    ]
    return step(model, torch.stack(losses))


def found_step(
    model: Any, given: Batch, branches: PrefixSupport
) -> tuple[Tensor, dict[str, Tensor]]:
    with branches.document_layout(given.docs):
        losses, counts = document_losses(
            model, given.labels, given.inputs, given.document, len(given.alone)
        )
    assert counts.tolist() == [(labels != -100).sum().item() for _, labels in given.alone]
    return step(model, losses)


def adapted(name: str, spec: Any = None, **options: Any) -> Any:
    model = build(name)
    model.set_attn_implementation("eager")
    moved(lf.attach(model, spec or lf.LoRA(rank=4, dropout=0.0), **options), 0.05)
    return model.train()


@pytest.mark.few(7)
@pytest.mark.parametrize("way", ["plain", "checkpointed", "fused"])
@pytest.mark.parametrize("name", CONFIGS)
def test_branches_are_as_they_are_alone(name: str, way: str) -> None:
    model, given = adapted(name), batch()
    expected = expected_step(model, given)
    if way == "checkpointed":
        enable_gradient_checkpointing(model)
    with fused(model) if way == "fused" else nullcontext(), sharing_prefixes(model) as branches:
        assert branches.packs
        assert branches.shares
        assert model.training
        assert_same_step(found_step(model, given, branches), expected)
    assert model.config._attn_implementation == "eager"


def test_the_branches_do_influence_each_other_where_the_layout_is_not_told() -> None:
    """What the test above could miss: that the layout matters at all."""
    model, given = adapted("llama"), batch()
    expected, _ = expected_step(model, given)
    with sharing_prefixes(model), torch.no_grad():
        found, _ = document_losses(model, given.labels, given.inputs, given.document, 9)
    shares = torch.tensor([s > 0 and b > 0 for s, own in zip(SHARED, BRANCHES, strict=True)
                           for b in range(len(own))])  # fmt: skip
    off = (found - expected).abs() > 1e-3
    assert (off <= shares).all()
    assert off.sum() >= 3


@pytest.mark.parametrize("spec", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_branch_sees_virtual_tokens(name: str, spec: str) -> None:
    """They come before the shared tokens, by the dense mask."""
    model, given = adapted(name, make_spec(spec, tokens=3)), batch()
    expected = expected_step(model, given)
    with sharing_prefixes(model) as branches:
        assert branches.shares
        assert_same_step(found_step(model, given, branches), expected)


def test_attention_dropout_takes_the_general_path() -> None:
    model, given = build("gpt2", attn_pdrop=0.5), batch()
    with sharing_prefixes(model) as branches, torch.no_grad():
        assert branches.shares
        with branches.document_layout(given.docs):
            first, second = (model(**given.inputs, use_cache=False).logits for _ in range(2))
            assert not torch.equal(first, second)
            model.eval()
            plain = model(**given.inputs, use_cache=False).logits
            model.train()
            for module in model.modules():
                if hasattr(module, "attn_dropout"):
                    module.attn_dropout.p = 1e-12  # the general path, and next to nothing dropped
            assert_close(model(**given.inputs, use_cache=False).logits, plain)


def test_a_model_may_pack_and_not_share() -> None:
    """A block that mixes each token with the one at the position before it."""
    model, given = adapted("llama"), batch()
    positions: list[Tensor] = []

    def remember(module: Any, args: Any, kwargs: Any) -> None:
        positions[:] = [kwargs["position_ids"]]

    def mix(module: Any, args: Any, output: Tensor) -> Tensor:
        follows = F.pad(positions[0].diff() == 1, (1, 0))[..., None]
        return output + 0.3 * output.roll(1, 1) * follows

    model.model.layers[0].register_forward_pre_hook(remember, with_kwargs=True)
    model.model.layers[0].mlp.register_forward_hook(mix)
    with packed(model) as apart:
        assert apart
    with sharing_prefixes(model) as branches:
        assert branches.packs
        assert not branches.shares
        flat = Documents(tuple(ids.shape[1] for ids, _ in given.alone))
        ids = torch.cat([ids for ids, _ in given.alone], 1)
        with branches.document_layout(flat), torch.no_grad():
            found = model(input_ids=ids, position_ids=flat.positions(), use_cache=False).logits[0]
        with torch.no_grad():
            expected = torch.cat([model(input_ids=i, use_cache=False).logits[0]
                                  for i, _ in given.alone])  # fmt: skip
    assert_close(found, expected)


def test_a_batch_that_is_not_the_layout_is_an_error() -> None:
    model, given = adapted("llama"), batch()
    other = layout([sum(given.docs.own) - 3], [[1, 2]])
    with sharing_prefixes(model) as branches, torch.no_grad():
        with (
            pytest.raises(LorafoldError, match=r"found lengths .* in the attention mask, expected"),
            branches.document_layout(other),
        ):
            model(**given.inputs, use_cache=False)
        with (
            pytest.raises(LorafoldError, match="no attention of the model received the layout"),
            branches.document_layout(given.docs),
        ):
            model(input_ids=given.inputs["input_ids"][:, :7], use_cache=False)
        # nothing of it stays
        assert_close(
            model(input_ids=given.alone[0][0], use_cache=False).logits,
            adapted("llama")(input_ids=given.alone[0][0], use_cache=False).logits,
        )


def test_chunked_attention_is_refused_where_a_chunk_ends_in_a_document() -> None:
    """The short documents of the test are as they are alone; those of the batch are longer."""
    torch.manual_seed(0)
    sizes = GROUPED | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
    config = tf.Llama4TextConfig(**sizes, attention_chunk_size=18, pad_token_id=0)
    model = tf.Llama4ForCausalLM(config).eval()
    docs = layout([15], [[5, 4]])
    inputs = {"input_ids": torch.arange(24)[None], "position_ids": docs.positions()}
    with sharing_prefixes(model) as branches, torch.no_grad():
        assert branches.shares
        with (
            pytest.raises(LorafoldError, match=r"found .*; set packing to false"),
            branches.document_layout(docs),
        ):
            model(**inputs, use_cache=False)


@pytest.fixture
def _chunks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", 4)


def padded() -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Labels (3, 11) with a document in two rows, two in one row, and labels of none."""
    draw = torch.Generator().manual_seed(4)
    ids, labels = (torch.randint(1, VOCAB, (3, 11), generator=draw) for _ in range(2))
    labels[torch.rand(3, 11, generator=draw) < 0.4] = -100
    document = torch.tensor([[0] * 6 + [2] * 5, [2] * 11, [-1] * 4 + [4] * 7])
    return labels, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, document


def with_head(name: str) -> list[str]:
    return ["lm_head", "c_attn"] if name == "gpt2" else ["lm_head", "q_proj", "down_proj"]


@pytest.mark.usefixtures("_chunks_of_four")
@pytest.mark.parametrize("head", ["frozen", "trained", "adapted"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_losses_and_gradients_are_those_of_whole_logits(name: str, head: str) -> None:
    model = adapted(name, targets=with_head(name) if head == "adapted" else "all-linear")
    if head == "trained":
        model.get_output_embeddings().weight.requires_grad_(True)
    labels, inputs, document = padded()
    weights = torch.tensor([1.5, 3.0, -0.7, 2.0, 0.0])
    each = F.cross_entropy(
        model(**inputs, use_cache=False).logits.transpose(1, 2), labels, reduction="none"
    )
    expected = torch.stack([each[document == i].sum() for i in range(5)])
    losses, counts = document_losses(model, labels, inputs, document, 5)
    assert counts.tolist() == [((document == i) & (labels != -100)).sum().item() for i in range(5)]
    assert_same_step(step(model, losses, weights), step(model, expected, weights))


@pytest.mark.usefixtures("_chunks_of_four")
def test_the_general_head_equals_the_linear_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (labels, inputs, document) = adapted("gemma2"), padded()
    found = []
    for linear in (True, False):
        if not linear:
            monkeypatch.setattr("lorafold.training_step.lm_head_loss.linear_form", lambda *_: None)
        losses, _ = document_losses(model, labels, inputs, document, 5)
        found.append(step(model, losses, losses.detach()))
    assert_same_step(found[1], found[0])


@pytest.mark.usefixtures("_chunks_of_four")
def test_dropout_on_the_head_draws_the_same_in_the_backward() -> None:
    model = adapted("llama", lf.LoRA(rank=4, dropout=0.5), targets=["lm_head"])
    labels, inputs, document = padded()
    labels = labels.masked_fill(document < 0, -100)

    def run(loss: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(7)
        model.zero_grad()
        total = loss()
        torch.manual_seed(8)  # the backward may not read the random state that it finds
        total.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return total.detach(), found

    found = run(lambda: document_losses(model, labels, inputs, document, 5)[0].sum())
    assert_same_step(found, run(lambda: labelled_loss(model, labels, inputs)[0]))


@pytest.mark.parametrize("head", ["frozen", "adapted"])
def test_no_label_gives_losses_and_gradients_of_zero(head: str) -> None:
    model = adapted("llama", targets=with_head("llama") if head == "adapted" else "all-linear")
    labels, inputs, document = padded()
    losses, counts = document_losses(model, labels, inputs, torch.full_like(document, -1), 2)
    assert losses.tolist() == counts.tolist() == [0, 0]
    losses.sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and (g == 0).all() for g in grads)


@pytest.mark.usefixtures("_chunks_of_four")
def test_the_logits_of_one_chunk_exist_at_a_time() -> None:
    """In either pass, and none are kept for the backward."""
    model = adapted("llama", targets=["lm_head"])
    labels, inputs, document = padded()
    made: list[Tensor] = []
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            made.extend([out] if isinstance(out, Tensor) else [])
            return out

    def of_logits(tensors: list[Tensor]) -> set[int]:
        sizes = (x.shape for x in tensors if 32 not in x.shape)  # the head's own weight
        return {size.numel() // VOCAB for size in sizes if size[-1:] == (VOCAB,)}

    with saved_tensors_hooks(keep, lambda x: x):
        losses, _ = document_losses(model, labels, inputs, document, 5)
    assert kept
    with Made():
        losses.sum().backward()
    # of one position is what the model computed for the last one, and of 4 may be the up factor
    assert of_logits(kept) <= {1}
    assert max(of_logits(made)) == 4


@pytest.mark.slow
def test_the_embedded_model_in_bf16_errs_no_more_than_its_branches_alone(smollm2: Any) -> None:
    """The loss of each token, since errors cancel in sums, and the gradients."""
    draw = torch.Generator().manual_seed(6)
    docs = layout([40, 25], [[20, 31], [17, 12]])
    ids = torch.randint(1, 49152, (sum(docs.own),), generator=draw)
    start = torch.tensor([40, 40, 25, 25])
    assert docs.keys is not None
    tokens = docs.keys.split(list(docs.lens))
    places = torch.cat([own[s:-1] for own, s in zip(tokens, start, strict=True)])
    following = torch.cat([own[s + 1 :] for own, s in zip(tokens, start, strict=True)])
    weights = WEIGHTS[:4].repeat_interleave(torch.tensor(docs.lens) - start - 1)

    def run(dtype: torch.dtype, shared: bool) -> list[Tensor]:
        model = load_model(smollm2, dtype)
        torch.manual_seed(0)
        moved(lf.attach(model, lf.LoRA(rank=8, dropout=0.0)), 0.01)
        if shared:
            labels = torch.full_like(ids, -100).index_copy(0, places, ids[following])
            each = torch.full_like(ids, -1).index_copy(0, places, torch.arange(len(places)))
            inputs = {"input_ids": ids[None], "position_ids": docs.positions()}
            of = labels[None], inputs, each[None], len(places)
            with sharing_prefixes(model) as branches:
                assert branches.shares
                with branches.document_layout(docs):
                    losses, _ = document_losses(model, *of)
                (losses * weights).sum().backward()
        else:
            parts = []
            for own, s in zip(tokens, start, strict=True):
                z = model(input_ids=ids[own][None], use_cache=False).logits[0].float()[s:-1]
                parts.append(F.cross_entropy(z, ids[own][s + 1 :], reduction="none"))
            losses = torch.cat(parts)
            (losses * weights).sum().backward()
        grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
        return [losses.detach().double(), torch.cat(grads)]

    truth = run(torch.float32, False)
    exact = run(torch.float32, True)
    for ours, peer, found, true in zip(
        run(torch.bfloat16, True), run(torch.bfloat16, False), exact, truth, strict=True
    ):
        assert (found - true).norm() <= 1e-4 * true.norm()
        assert (ours - true).norm() <= 1.5 * (peer - true).norm()
