"""Which adapters compute: in a replayed block, in threads and tasks, and in the reference."""

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorafold as lf
from lorafold.core.attach import selection_of
from lorafold.errors import LorafoldError
from method_cases import IDS, moved

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(9), requires_grad=True)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    for name in ("one", "two"):
        adapter = lf.attach(model, lf.LoRA(rank=2, dropout=0.0), ["0", "2"], name=name)
        with torch.no_grad():
            for p in adapter.parameters():
                p.copy_(0.3 * torch.randn(p.shape))
    return model


def of_reentrant(run: Callable[..., Any], x: Tensor) -> Tensor:
    y: Tensor = checkpoint(run, x, use_reentrant=True)
    return y


def of_hooks(run: Callable[..., Any], x: Tensor) -> Tensor:
    y: Tensor = checkpoint(run, x, use_reentrant=False)
    return y


def nested(model: Any, x: Tensor) -> Tensor:
    """A segment inside another one, whose input the outer one computes."""
    first, act, last = model
    return of_hooks(lambda x: of_hooks(lambda y: act(last(act(y))), first(x)) * 1.5, x)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def plain(name: str) -> list[Tensor]:
    model = net()
    with lf.only(model, name):
        return gradients(model, model(X).square().sum())


def test_a_replay_runs_under_the_adapters_of_its_forward() -> None:
    model = net()
    with lf.only(model, "one"):
        loss = of_hooks(model, X).square().sum()
    with lf.only(model, "two"):
        found = gradients(model, loss)
    for ours, expected in zip(found, plain("one"), strict=True):
        assert torch.equal(ours, expected)
    # and two graphs at a time, each under its own, the backward under neither
    with lf.only(model, "one"):
        one = of_hooks(model, X).square().sum()
    with lf.only(model, "two"):
        two = of_hooks(model, X).square().sum()
    for loss, name in ((two, "two"), (one, "one")):
        for ours, expected in zip(gradients(model, loss), plain(name), strict=True):
            assert torch.equal(ours, expected)


def test_a_graph_that_is_kept_is_replayed_twice() -> None:
    model = net()
    with lf.only(model, "one"):
        loss = of_hooks(model, X).square().sum()
    for _ in range(2):
        model.zero_grad()
        loss.backward(retain_graph=True)
    for p, expected in zip([p for p in model.parameters() if p.grad is not None], plain("one"),
                           strict=True):  # fmt: skip
        assert torch.equal(p.grad, expected)


def test_a_segment_that_selects_itself_is_replayed_as_it_ran() -> None:
    model = net()

    def both(x: Tensor) -> Tensor:
        with lf.only(model, "one"):
            y = model(x)
        return y + model(x)

    def run(wrap: Callable[..., Any]) -> list[Tensor]:
        with lf.only(model, "two"):
            loss = wrap(both, X).square().sum()
        return gradients(model, loss)

    for ours, expected in zip(run(of_hooks), run(lambda f, x: f(x)), strict=True):
        assert torch.equal(ours, expected)


def test_a_segment_inside_another_one_is_replayed_as_it_ran() -> None:
    def run(inside: str) -> list[Tensor]:
        model = net()
        with lf.only(model, "one"):
            loss = nested(model, X).square().sum()
        with lf.only(model, inside):
            return gradients(model, loss)

    assert all(map(torch.equal, run("two"), run("one")))


def test_a_replay_whose_adapters_are_not_known_is_refused() -> None:
    model, way = net().train(), of_reentrant
    with lf.only(model, "one"):
        loss = way(model, X).square().sum()
        found = gradients(model, loss)
        for ours, expected in zip(found, plain("one"), strict=True):
            assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-7)
        again = way(model, X).square().sum()
    with (
        lf.only(model, "two"),
        pytest.raises(LorafoldError, match=r"adapters \['two'\], but modules also .*\['one'\]"),
    ):
        again.backward()
    with lf.only(model, "two"):  # what comes after it is not refused
        of = way(model, X).square().sum()
        of.backward()


def test_the_model_of_a_trainer_under_checkpointing(tiny_model) -> None:
    ids = torch.arange(24).reshape(2, 12)
    model = tiny_model("llama").train()
    for name in ("one", "two"):
        lf.attach(model, lf.LoRA(rank=2, dropout=0.0), name=name)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape))

    def run(inside: str) -> list[Tensor]:
        with lf.only(model, "one"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        with lf.only(model, inside):
            return gradients(model, loss)

    expected = run("one")
    model.gradient_checkpointing_enable()
    for ours, right in zip(run("two"), expected, strict=True):
        assert torch.allclose(ours, right, rtol=1e-5, atol=1e-7)


def test_two_threads_are_refused_and_one_after_the_other_are_not() -> None:
    model, inside, done = net(), threading.Event(), threading.Event()
    said: list[str] = []

    def other() -> None:
        inside.wait()
        for _ in range(2):
            try:
                with lf.only(model, "two"):
                    said.append("entered")
            except LorafoldError as error:
                said.append(str(error))
            done.set()
            thread_left.wait()

    thread_left = threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    with lf.only(model, "one"), lf.only(model):  # nested in one thread
        inside.set()
        done.wait()
        assert selection_of(model).names == ()
    thread_left.set()
    thread.join()
    assert "another thread or task is inside lf.only on this model, with no adapter" in said[0]
    assert said[1] == "entered"
    assert selection_of(model).names == ("one", "two")


def test_a_thread_started_inside_computes_under_it() -> None:
    """As generate does in the thread of a streamer."""
    model, found = net(), []
    with torch.no_grad(), lf.only(model, "one"):
        expected = model(X)
        thread = threading.Thread(target=lambda: found.append(model(X).detach()))
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)


def test_two_tasks_are_refused() -> None:
    model = net()

    async def enter(name: str) -> None:
        with lf.only(model, name):
            await asyncio.sleep(0)

    async def both() -> list[Any]:
        return await asyncio.gather(enter("one"), enter("two"), return_exceptions=True)

    first, second = asyncio.run(both())
    assert first is None
    assert "use a lock" in str(second)


def test_blocks_that_are_left_in_another_order() -> None:
    model = net()
    selection = selection_of(model)
    one, two = lf.only(model, "one"), lf.only(model, "two")
    one.__enter__()
    two.__enter__()
    one.__exit__()
    assert selection.names == ("two",)
    two.__exit__()
    assert selection.names == ("one", "two")


def test_a_copy_made_inside_is_not_inside() -> None:
    model = net()
    with lf.only(model, "one"):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(X), model(X))
            with lf.only(twin, "two"):
                assert not torch.equal(twin(X), model(X))


def test_what_is_attached_or_detached_inside_is_so_afterwards() -> None:
    model = net()
    selection = selection_of(model)
    with lf.only(model, "one"):
        with lf.only(model, "two"):
            third = lf.attach(model, lf.LoRA(rank=2), ["0"], name="three")
            assert selection.names == ("two", "three")
        assert selection.names == ("one", "three")
    assert selection.names == ("one", "two", "three")
    with lf.only(model, "one"):
        third.detach()
    assert selection.names == ("one", "two")
    assert [origin.name for origin in selection.active] == ["one", "two"]


WAYS: dict[str, Callable[[Any], Tensor]] = {
    "the model": lambda m: m(IDS).logits,
    "its forward": lambda m: m.forward(IDS).logits,
    "the body": lambda m: m.model(IDS).last_hidden_state,
    "the body's forward": lambda m: m.model.forward(IDS).last_hidden_state,
    "the decoder": lambda m: m.get_decoder()(IDS).last_hidden_state,
    "the base model": lambda m: m.base_model(IDS).last_hidden_state,
    "a submodule": lambda m: m.get_submodule("model")(IDS).last_hidden_state,
    "generated": lambda m: m.generate(IDS, max_new_tokens=4, do_sample=False),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_asking_it_has_the_policy(way: str, tiny_model) -> None:
    model, ask = tiny_model("llama"), WAYS[way]
    moved(lf.attach(model, lf.LoRA(rank=4, dropout=0.5), name="below")).requires_grad_(False)
    moved(lf.attach(model, lf.LoRA(rank=4, dropout=0.5), name="trains"), 0.5)
    reference = lf.reference(model)
    with torch.no_grad(), lf.only(model, "below"):
        expected = ask(model.eval())
    with torch.no_grad():
        assert not torch.equal(ask(model), expected)
    found = ask(reference.train())
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_what_is_set_on_it_stays_the_model_s(tiny_model) -> None:
    model = tiny_model("llama")
    moved(lf.attach(model, lf.LoRA(rank=4), name="trains"))
    reference, head = lf.reference(model), model.lm_head
    assert reference.config is model.config
    assert reference.model is reference.model
    reference.lm_head = reference.lm_head.float()  # as a trainer casts it
    assert model.lm_head is head
    assert model(IDS).logits.requires_grad
