"""Shared prefixes: the tree of rows by its definition, and a step over it."""

import copy
import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import lorafold as lf
from fused_cases import assert_same_step
from lorafold.data.classification import LabelledExample
from lorafold.data.examples import NO_LOSS, Example
from lorafold.data.preference_examples import BranchedRow
from lorafold.data.prefix_forest import batches_by_prefix, prefix_forest
from lorafold.training_step.classification_loss import Classification
from lorafold.training_step.fused_modules import fused
from lorafold.training_step.gradient_checkpointing import enable_gradient_checkpointing
from lorafold.training_step.losses import CompletionLoss, PrefixSharingLoss
from lorafold.training_step.preference_algorithms import Dpo
from lorafold.training_step.preference_loss import Preferences
from lorafold.training_step.shared_prefixes import sharing_prefixes
from noise import moved
from sequence_cases import CONFIGS, GROUPED, VOCAB, assert_close, build

CPU = torch.device("cpu")


def row(ids: str, untrained: int = 0) -> Example:
    """A row of letters, the first of which are not trained."""
    made = tuple(ord(letter) - ord("a") + 1 for letter in ids)
    return Example(made, (NO_LOSS,) * untrained + made[untrained:])


ROWS = {
    "apart": [row("abcdef"), row("bcdef"), row("cde")],
    "one beginning": [row("abcdefgh", 4), row("abcdijk", 4), row("abcdlmn", 4)],
    "three depths": [row("abcdefgh", 2), row("abcdefxy", 2), row("abcdzz", 2), row("abq", 2)],
    "trained beginnings": [row("abcdef"), row("abcdxy"), row("abcd"), row("abc")],
    "a part of another": [row("abcdef", 1), row("abcd", 2), row("abcdefghi", 3)],
    "equal": [row("abcdef", 2), row("abcdef", 2), row("abcdef", 4)],
    "one trained, one not": [row("abcdef", 4), row("abcxyz", 2), row("abcdgh", 6)],
    "of one token": [row("a"), row("a"), row("ab")],
}


@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=8), st.integers(0, 8)),
        min_size=1, max_size=6,
    )
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_each_row_is_a_path(drawn: list[tuple[list[int], int]]) -> None:
    """What the forest says of each token is what its rows say of it."""
    rows = [Example((*ids,), ((NO_LOSS,) * n + (*ids[n:],))[: len(ids)]) for ids, n in drawn]
    made = prefix_forest(rows)
    paths, path, at = [], list[int](), 0
    for length, start in zip(made.lens, made.starts, strict=True):
        assert start < min(length, len(path) or 1)
        path = [*path[:start], *range(at, at := at + length - start)]
        paths.append(path)
    assert at == len(made.ids) <= sum(len(one.ids) for one in rows)
    known = {tuple(made.ids[p[:n]]) for p in paths for n in range(1, len(p) + 1)}
    assert {one.ids for one in rows} <= known
    for path in paths:
        assert made.positions[path].tolist() == [*range(len(path))]
    wanted = sorted(
        (one.ids[:at], label)
        for one in rows
        for at, label in enumerate(one.labels) if at and label != NO_LOSS
    )  # fmt: skip
    found = list[tuple[tuple[int, ...], int]]()
    for n, (target, count) in enumerate(zip(made.targets, made.counts, strict=True)):
        path = next(p[: p.index(n) + 1] for p in paths if n in p)
        assert (target == NO_LOSS) == (count == 0)
        found += [(tuple(made.ids[path].tolist()), int(target))] * int(count)
    assert sorted(found) == wanted


def adapted(name: str, dropout: float = 0.0) -> Any:
    model = build(name)
    moved(lf.attach(model, lf.LoRA(rank=4, dropout=dropout)), 0.05)
    return model.train()


def stepped(
    loss: PrefixSharingLoss, batches: list[list[Any]]
) -> tuple[torch.Tensor, dict[str, Any]]:
    loss.model.zero_grad()
    losses = [loss(**loss.collate(batch, CPU)) for batch in batches]
    torch.stack(losses).sum().backward()
    found = {n: p.grad.clone() for n, p in loss.model.named_parameters() if p.grad is not None}
    return torch.stack(losses).sum().detach(), found


@pytest.mark.few(6)
@pytest.mark.parametrize(
    ("rows", "name", "way"),
    [
        *((rows, "llama", "plain") for rows in ROWS),
        *itertools.product(["three depths"], CONFIGS, ["plain", "checkpointed", "fused"]),
    ],
)
def test_a_step_is_that_of_the_rows_apart(rows: str, name: str, way: str) -> None:
    model, given = adapted(name), ROWS[rows]
    apart = stepped(CompletionLoss(model, False, 0), [[one] for one in given])
    if way == "checkpointed":
        enable_gradient_checkpointing(model)
    with (
        fused(model) if way == "fused" else nullcontext(),
        sharing_prefixes(model, across=True) as how,
    ):
        assert how.across
        loss = CompletionLoss(model, True, 0, how)
        assert loss.shares_prefixes(given) == (rows != "apart")
        together = stepped(loss, [given])
    assert_same_step(together, apart)


ROUTER = GROUPED | {"output_router_logits": True, "router_aux_loss_coef": 0.5}
MIXTRAL = tf.MixtralConfig(**ROUTER, num_local_experts=4)
QWEN2_MOE = tf.Qwen2MoeConfig(  # without windows, whose masks transformers makes all the same
    **ROUTER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "config"),
    [
        ("three depths", MIXTRAL), ("equal", MIXTRAL), ("a part of another", MIXTRAL),
        ("three depths", QWEN2_MOE),
    ],
)  # fmt: skip
def test_a_router_is_balanced_over_the_tokens_of_all_rows(rows, config) -> None:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(copy.deepcopy(config))
    lf.attach(model, lf.LoRA(rank=4, dropout=0.0))
    given = ROWS[rows]
    with sharing_prefixes(model, across=True) as how:
        apart = stepped(CompletionLoss(model, True, 0), [given])
        loss = CompletionLoss(model, True, 0, how)
        assert loss.shares_prefixes(given)
        assert_same_step(stepped(loss, [given]), apart)


def text(ids: str, label: int) -> LabelledExample:
    return LabelledExample(row(ids).ids, label)


def test_texts_with_a_class_are_read_where_each_ends() -> None:
    """One goes on from another, two are equal with other classes, one ends in padding tokens."""
    pad = row("z").ids[0]
    config = tf.LlamaConfig(**GROUPED, num_labels=3, pad_token_id=pad)
    model = tf.LlamaForSequenceClassification(config)
    lf.attach(model, lf.LoRA(rank=4, dropout=0.0))
    model.train()
    given = [
        text("abcdefgh", 0), text("abcdef", 1), text("abcdef", 2), text("abcxyz", 0),
        text("abcdefghzz", 1), text("qrs", 2),
    ]  # fmt: skip
    apart = stepped(Classification(model, pad), [[one] for one in given])
    with sharing_prefixes(model, across=True) as how:
        loss = Classification(model, pad, how)
        assert loss.computed(given) == 10 + 3 + 3 < sum(len(one.ids) for one in given)
        assert_same_step(stepped(loss, [given]), apart)
        alone = [Classification(model, pad).collate([one], CPU) for one in given]
        logits = [loss.logits(**{k: v for k, v in one.items() if k != "labels"}) for one in alone]
        inputs = loss.collate(given, CPU)
        assert inputs.pop("labels").tolist() == [0, 1, 2, 0, 1, 2]
        assert_close(loss.logits(**inputs), torch.cat(logits))


def test_references_are_computed_where_prompts_meet_and_are_those_of_each_pair_alone() -> None:
    model = adapted("llama")

    def pair(prompt: str) -> BranchedRow:
        *shared, last = row(prompt).ids
        ends = [row(end).ids for end in ("xy", "uvw")]
        branches = tuple(Example((last, *ids), (NO_LOSS, *ids)) for ids in ends)
        return BranchedRow(tuple(shared), branches)

    given = [pair(p) for p in ("abcdefghij", "qrstqrstqr", "abcdefghmn", "qrstqrstop", "abcdkl")]
    with sharing_prefixes(model, across=True) as how:
        loss = Preferences(model, Dpo(), how, 0, 30)
        groups = loss.groups(given)
        assert sorted(i for group in groups for i in group) == [0, 1, 2, 3, 4]
        assert any({0, 2} <= {*group} for group in groups)
        assert all(loss.computed([given[i] for i in group]) <= 30 for group in groups)
        found = dict(loss.references(given))
        alone = [next(loss.references([one]))[1] for one in given]
    assert_close(torch.tensor([found[i] for i in range(5)]), torch.tensor(alone))


def test_a_tree_may_have_more_tokens_than_the_model_has_positions() -> None:
    """A token's position is that in its row, and no row has more than there are."""
    model = adapted("gpt2")
    most = model.config.n_positions
    head = torch.randint(1, VOCAB, (most - 20,), generator=torch.Generator().manual_seed(1))
    ends = torch.randint(1, VOCAB, (6, 20), generator=torch.Generator().manual_seed(0))
    rows = [Example((ids := (*head.tolist(), *end)), ids) for end in ends.tolist()]
    apart = stepped(CompletionLoss(model, False, 0), [[one] for one in rows])
    with sharing_prefixes(model, across=True) as how:
        loss = CompletionLoss(model, True, 0, how)
        [order] = loss.micro_batches(rows, 1, 10**6)
        part = [rows[i] for i in order]
        assert len(prefix_forest(part).ids) > most
        assert_same_step(stepped(loss, [part]), apart)


def test_a_token_that_begins_rows_draws_as_the_first_of_them() -> None:
    """Also where it is not computed once: in another micro-batch, or in another process."""
    model = adapted("llama", dropout=0.5)
    given = [row("abcdef", 4), row("abcdxy", 4)]
    with sharing_prefixes(model, across=True) as how:
        loss, own = CompletionLoss(model, True, 0, how), CompletionLoss(model, True, 0)
        rows = loss.rows_of(given)
        names = loss.names(given, rows, loss.collate(given, CPU))
        [second] = loss.names(given[1:], rows[1:], loss.collate(given[1:], CPU)).tolist()
        [apart] = own.names(given, own.rows_of(given), own.collate(given, CPU)).tolist()
    assert names.tolist() == [[*apart[:6], apart[3], *apart[10:]]]
    assert second == [*apart[:4], *apart[10:]]


def test_rows_that_begin_alike_meet_in_a_micro_batch() -> None:
    draw = torch.Generator().manual_seed(1)
    heads = torch.randint(1, VOCAB, (2, 50), generator=draw).tolist()
    tails = torch.randint(1, VOCAB, (8, 10), generator=draw).tolist()
    rows = [Example((ids := (*heads[n % 2], *tail)), ids) for n, tail in enumerate(tails)]
    parts = batches_by_prefix(rows, 2, 1000, lambda one: one.ids, lambda one: len(one.ids))
    assert [{one.ids[:50] for one in part} for part in parts] in (
        [{tuple(heads[0])}, {tuple(heads[1])}], [{tuple(heads[1])}, {tuple(heads[0])}],
    )  # fmt: skip
    small = batches_by_prefix(rows, 1, 80, lambda one: one.ids, lambda one: len(one.ids))
    assert all(len(prefix_forest(part).ids) <= 80 for part in small)
    assert sorted(one.ids for part in small for one in part) == sorted(one.ids for one in rows)


def test_equal_rows_as_long_as_a_sequence_meet() -> None:
    """As rows are that are cut in what they have in common."""
    rows = [row("abcdef")] * 4
    assert batches_by_prefix(rows, 1, 6, lambda one: one.ids, lambda one: len(one.ids)) == [rows]
