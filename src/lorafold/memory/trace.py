"""What one step of a model with few blocks holds, traced through the very code that trains: no
formula of its own, and no values.

Blocks hold alike, so two short models tell of any depth: a + (b - a) (n - n_a) / (n_b - n_a), n
blocks, for every figure here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorafold.adapter import attach
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.memory.ledger import Ledger, distinct_bytes
from lorafold.models.fake import fake_model, without_values
from lorafold.models.load_errors import one_line
from lorafold.models.storage import Storage
from lorafold.ops.arithmetic import multiplying
from lorafold.ops.attention import Documents, Tile
from lorafold.step.activations import recompute
from lorafold.step.adamw import state_bytes
from lorafold.step.documents import attending
from lorafold.step.fused import fused
from lorafold.step.head import labelled_loss
from lorafold.step.losses import Classification

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def nothing(model: PreTrainedModel) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Setting:
    """What is to be held. base: how the weights are stored; spec: what is trained, None for
    inference; targets as `attach` takes them, and `beside`, given the model, what else it takes.

    rows: those computed at a time, in tokens, end to end if they are packed and else filled up to
    the longest; `labelled` of the tokens count in the loss (None: all that can). classes: how many
    kinds of text the model tells apart, 0 if it says the next token. accumulating: the gradients of
    an earlier part of the step are there already. widened: 16-bit matrices are multiplied in fp32,
    as some CPUs are faster (`ops.arithmetic.widens`), and not as they are, which holds less. No
    field asks what machine this is. Inference reads the rows but for their last token, then that
    one.
    """

    base: Storage
    spec: Spec | None = None
    targets: Any = None
    beside: Callable[[PreTrainedModel], Mapping[str, Any]] = nothing
    rows: tuple[int, ...] = (1024,)
    labelled: int | None = None
    packed: bool = True
    classes: int = 0
    checkpointing: bool = False
    optimizer: str = "adamw"
    accumulating: bool = False
    widened: bool = False

    @property
    def batch(self) -> int:
        return len(self.rows)

    @property
    def length(self) -> int:
        return max(self.rows)


@dataclass(frozen=True)
class Held:
    """Bytes. kept: for later, when the forward is done; ahead: gradients that were there before it;
    forward, backward: the most that there is in each beyond weights, adapter and optimizer. For
    inference they are the prompt's forward and that of the token after it.
    """

    weights: int
    adapter: int = 0
    optimizer: int = 0
    gradients: int = 0
    ahead: int = 0
    kept: int = 0
    kv_cache: int = 0
    forward: int = 0
    backward: int = 0

    @property
    def in_backward(self) -> bool:
        return self.backward > self.forward

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)

    def at(self, other: Held, blocks: tuple[int, int, int]) -> Held:
        """With blocks[2] blocks, where this is with blocks[0] and the other with blocks[1]."""
        a, b, n = blocks
        return Held(
            *(
                x + (y - x) * (n - a) // (b - a)
                for x, y in zip(astuple(self), astuple(other), strict=True)
            )
        )


def trace(config: PreTrainedConfig, setting: Setting, blocks: int) -> Held:
    """What the first so many blocks hold, between embedding and head: the same on every machine.

    LorafoldError where a method's code can't do without values.
    """
    with unswept(), without_values(), multiplying(widened=setting.widened), Ledger() as ledger:
        step = inference if setting.spec is None else training
        try:
            return step(fake_model(config, setting.base, blocks, setting.classes), setting, ledger)
        except LorafoldError:
            raise
        except Exception as error:
            # whatever a model's own code raises where it finds no values: a run goes on without an
            # estimate
            what = config.model_type if setting.spec is None else type(setting.spec).__name__
            raise LorafoldError(
                f"{what}: can't be estimated, its code asks for values: {one_line(error, 80)}"
            ) from error


def training(model: PreTrainedModel, setting: Setting, ledger: Ledger) -> Held:
    """A step of the recipe's own parts: fused operations, packed rows, loss at labelled
    positions.
    """
    weights = settled(ledger)
    beside = {"targets": setting.targets, **setting.beside(model)}
    attach(model, setting.spec, **beside)  # type: ignore[arg-type]
    trained = [p for p in model.parameters() if p.requires_grad]
    start = settled(ledger)
    if setting.checkpointing:
        recompute(model)
    if setting.accumulating:
        for p in trained:
            p.grad = torch.zeros_like(p)
    ahead = ledger.now - start
    model.train()
    run = classifying if setting.classes else completing
    with (
        fused(model),
        laid_out(model, setting.rows) if setting.packed and not setting.classes else nullcontext(),
    ):
        ledger.peak = settled(ledger)
        loss = run(model, setting)
        kept, forward = ledger.now - start - ahead, ledger.peak - start
        ledger.peak = ledger.now
        loss.backward()
        backward = ledger.peak - start
    gradients = distinct_bytes(p.grad for p in trained if p.grad is not None)
    state = state_bytes(setting.optimizer, trained)
    return Held(weights, start - weights, state, gradients, ahead, kept, 0, forward, backward)


def completing(model: PreTrainedModel, setting: Setting) -> Tensor:
    """The loss of the next token. Rows that are filled up have theirs in equal parts."""
    rows, width = (1, sum(setting.rows)) if setting.packed else (setting.batch, setting.length)
    n = sum(setting.rows) - setting.batch if setting.labelled is None else setting.labelled
    ids, where = integers(rows, width), integers(rows, width)
    return labelled_loss(
        model,
        integers(rows, ceil(n / rows)),
        {"input_ids": ids, "position_ids" if setting.packed else "attention_mask": where},
    )[0]


def classifying(model: PreTrainedModel, setting: Setting) -> Tensor:
    ids, mask = integers(setting.batch, setting.length), integers(setting.batch, setting.length)
    loss: Tensor = Classification(model, 0)(
        integers(setting.batch), input_ids=ids, attention_mask=mask
    )
    return loss


def integers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


@torch.no_grad()
def inference(model: PreTrainedModel, setting: Setting, ledger: Ledger) -> Held:
    """Reading a prompt in one piece, then one token more."""
    weights = settled(ledger)
    prompt, token = (integers(setting.batch, n) for n in (setting.length - 1, 1))
    ledger.peak = start = settled(ledger)
    cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).cache
    forward = ledger.peak - start
    ledger.peak = settled(ledger)
    model(input_ids=token, cache=cache, use_cache=True)
    backward = ledger.peak - start
    return Held(weights, kv_cache=settled(ledger) - start, forward=forward, backward=backward)


def settled(ledger: Ledger) -> int:
    """What is held once all that is garbage has gone."""
    gc.collect()
    return ledger.now


@contextmanager
def unswept() -> Iterator[None]:
    """What there is already is no matter for the garbage collector meanwhile: a process with torch
    in it takes 0.15 s to look through.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class LastTiles(Documents):
    """Documents of which the last three tiles are computed. They tell what all of them hold: every
    tile holds what the one before it does, or more, and the last may be cut short.
    """

    def tiles(self) -> Iterator[Tile]:
        yield from [*super().tiles()][-3:]


@contextmanager
def laid_out(model: Any, lens: tuple[int, ...]) -> Iterator[None]:
    """Packed attention over documents of these lengths, which the positions, having no values,
    can't tell: the longest last.
    """
    with attending(model, partial(_mask, tuple(sorted(lens)))):
        yield


def _mask(
    lens: tuple[int, ...], *, q_length: int, local_size: int | None = None, **_: Any
) -> Documents:
    """Of a run of other tokens than the rows', as a prompt's own is, that it is one document."""
    return LastTiles(lens if q_length == sum(lens) else (q_length,), local_size)
