"""Traces the memory of one step, by running the training code on a fake model with few blocks.

Blocks repeat with a period, so every value is nearly linear in the number of blocks n. The values a
and b of two short models, with n_a and n_b blocks, give a + (b - a) (n - n_a) / (n_b - n_a).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lorafold.adapter import attach
from lorafold.core.attach import selection_of
from lorafold.core.spec import Spec
from lorafold.engine.adapters import deltas_of
from lorafold.engine.kv_cache import round_up
from lorafold.engine.plan import TILE, packed_bytes
from lorafold.engine.request import EngineSettings
from lorafold.errors import LorafoldError
from lorafold.evaluation.rollouts import RolloutSize
from lorafold.models.fake import fake_model, without_values
from lorafold.models.load_errors import one_line
from lorafold.models.quantizations import Storage
from lorafold.objectives.classify import class_loss
from lorafold.ops.arithmetic import override_widening
from lorafold.ops.packed_documents import Documents, Tile
from lorafold.runtime.assumed_device import DeviceKind, assume_device
from lorafold.runtime.process_tuning import existing_frozen
from lorafold.training_step.fused_modules import fused
from lorafold.training_step.gradient_checkpointing import enable_gradient_checkpointing
from lorafold.training_step.losses import next_token_loss
from lorafold.training_step.optimizers import state_bytes
from lorafold.training_step.packed_attention import attending
from lorafold.training_step.param_groups import sum_in_fp32

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

token_ids = partial(torch.zeros, dtype=torch.long)
aten = torch.ops.aten
DEVICE_QUERY = torch.ops.prim.device.default  # the operation that fake tensors run most often
# matmuls a b: the index of the argument a (..., m, k), which precedes b (..., k, n)
MATMULS = {
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten._grouped_mm.default), 0),
    **dict.fromkeys((aten.addmm.default, aten.addmm_.default, aten.baddbmm.default), 1),
}


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors of any shapes; memory that they share counts once."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


class Ledger(TorchDispatchMode):
    """Counts the bytes of fake or real tensors in its `with` block (`now`, `peak`), and the
    operations of matmuls. Memory that a kernel frees within one operation is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE_QUERY:
            return args[0].fake_device
        if func.is_view:
            return func(*args, **(kwargs or {}))
        inputs = {
            t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        if (first := MATMULS.get(func)) is not None:
            self.operations += 2 * args[first].numel() * args[first + 1].shape[-1]
        for t in tree_iter(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in inputs:
                self._enter(t)
        return out

    def _enter(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        if (key := storage._cdata) in self._alive:
            return
        self._alive.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, key, storage.nbytes())

    def _leave(self, key: int, n: int) -> None:
        self._alive.discard(key)
        self.now -= n


@dataclass(frozen=True)
class StepTrace:
    """The memory of a step in bytes. `forward_operations` and `backward_operations` are the
    multiplications and additions of its matmuls.

    initial_gradients: gradients that exist before the forward pass.
    activations: tensors that exist after the forward pass.
    engine: the engine that samples completions, without its KV cache (`slots`).
    sampling_peak: the peak during sampling, without weights, adapter, optimizer and engine.
    forward, backward: the peak in either pass, without weights, adapter and optimizer; for
        inference, in the passes of the prompt and of the next token.
    second_half: the peak in the second half of the backward pass.
    exchanged: tensors gathered from and sent to other processes.
    """

    weights: int
    adapter: int = 0
    optimizer: int = 0
    gradients: int = 0
    initial_gradients: int = 0
    activations: int = 0
    kv_cache: int = 0
    forward: int = 0
    backward: int = 0
    second_half: int = 0
    engine: int = 0
    slots: int = 0
    sampling_peak: int = 0
    exchanged: int = 0
    forward_operations: int = 0
    backward_operations: int = 0

    def extrapolated(self, other: StepTrace, blocks: tuple[int, int, int]) -> StepTrace:
        """Extrapolates to blocks[2] blocks, from this trace with blocks[0] and the other with
        blocks[1].
        """
        a, b, n = blocks
        pairs = zip(astuple(self), astuple(other), strict=True)
        return StepTrace(*(x + (y - x) * (n - a) // (b - a) for x, y in pairs))


ON_CPU = DeviceKind("cpu")
DDP, FSDP = "ddp", "fsdp"
STRATEGIES = (FSDP, DDP)
ENGINE_SETTINGS = EngineSettings()  # for the number of prompt tokens in one pass
LOGIT_COPIES = 3  # copies of a pass's logits: from the head, reordered, and selected
FACTOR_COPIES = 3  # of an adapter: stored, in the layout of passes, and zeros for other rows
PROBE_TOKENS = 4, 8  # shorter than any attention window


@dataclass(frozen=True)
class MemorySetting:
    """The input of an estimate: a base, a method, and the rows of a micro-batch.

    spec: the trained method; None for inference.
    beside: returns the arguments of `attach`, other than targets, for a model.
    rows: the lengths of the rows in tokens. Inference computes all but the last token of each row
        as a prompt, then the last token.
    labelled: the number of tokens that count in the loss; None: all that can be predicted.
    packed: whether rows are packed into one sequence, instead of padded to the longest.
    classes: the number of outputs of a classification head; 0 for a language model.
    loss: computes the loss from a model, its inputs and the number of labelled tokens; None: the
        default.
    accumulating: whether gradients of an earlier micro-batch exist.
    below: the frozen adapters below, lowest first: the method, and further `attach` arguments.
    draws: the completions that are sampled before a step, if any.
    device_kind: the kind of device whose dropout and attention are modelled.
    widened: whether 16-bit matrices are multiplied in fp32 (`ops.arithmetic.widens`).
    processes: the number of processes that train together, each on rows of these lengths.
    resident: whether to include the memory of a CPU run's process besides tensors.
    """

    base: Storage
    spec: Spec | None = None
    targets: Any = None
    beside: Callable[[PreTrainedModel], Mapping[str, Any]] = lambda model: {}
    rows: tuple[int, ...] = (1024,)
    labelled: int | None = None
    packed: bool = True
    classes: int = 0
    loss: Callable[[Any, Mapping[str, Tensor], int], Tensor] | None = None
    checkpointing: bool = False
    optimizer: str = "adamw"
    accumulating: bool = False
    draws: RolloutSize | None = None
    widened: bool = False
    device_kind: DeviceKind = ON_CPU
    below: tuple[tuple[Spec, Callable[[PreTrainedModel], Mapping[str, Any]]], ...] = ()
    trust_remote_code: bool = False
    processes: int = 1
    strategy: str = FSDP
    resident: bool = False

    def attach(self, model: PreTrainedModel) -> None:
        beside = {"targets": self.targets, **self.beside(model)}
        attach(model, self.spec, **beside)  # type: ignore[arg-type]

    @property
    def trains_base(self) -> bool:
        return self.spec is not None and self.spec.trains_base

    @property
    def batch(self) -> int:
        return len(self.rows)

    @property
    def length(self) -> int:
        """The length of the longest row, in tokens."""
        return max(self.rows)


def trace(config: PreTrainedConfig, setting: MemorySetting, blocks: int) -> StepTrace:
    """Traces a step of a model with embedding, head and only `blocks` blocks."""
    with (
        existing_frozen(),
        without_values(),
        override_widening(widened=setting.widened),
        assume_device(setting.device_kind),
        Ledger() as ledger,
    ):
        step = inference if setting.spec is None else training
        try:
            classes, trusted = setting.classes, setting.trust_remote_code
            return step(fake_model(config, setting.base, blocks, classes, trusted), setting, ledger)
        except LorafoldError:
            raise
        except Exception as error:
            # a model's code may raise anything on fake tensors; the run goes on without an estimate
            raise LorafoldError(
                f"{config.model_type}: can't be estimated, because code of the model or the method"
                f" fails on fake tensors (without values): {one_line(error, 80)}"
            ) from error


def training(model: PreTrainedModel, setting: MemorySetting, ledger: Ledger) -> StepTrace:
    """Traces a training step with every feature of a run."""
    # packed rows do not support attention sinks (gpt-oss)
    sinks = any("sinks" in module._parameters for module in model.modules())
    setting = replace(setting, packed=setting.packed and not sinks)
    if setting.below:
        attach_below(model, setting)
    weights = live_bytes(ledger)
    setting.attach(model)
    sum_in_fp32(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    start = live_bytes(ledger)
    if setting.checkpointing:
        enable_gradient_checkpointing(model)
    parts = None
    if setting.processes > 1 and setting.strategy == FSDP and setting.trains_base:
        parts = shard_gradients(trained, setting)
    elif setting.accumulating:
        for p in trained:
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
    initial_gradients = ledger.now - start
    model.train()
    # the longest row last, because only the last tiles are computed
    documents = partial(_last_tiles_mask, tuple(sorted(setting.rows)))
    with fused(model), attending(model, documents) if setting.packed else nullcontext():
        ledger.peak = live_bytes(ledger)
        loss = loss_of(model, setting)
        activations, forward = ledger.now - start - initial_gradients, ledger.peak - start
        ledger.peak, operations = ledger.now, ledger.operations
        early = reset_peak_halfway(trained, ledger)
        loss.backward()
        second_half = ledger.peak - start
        backward = max([second_half, *(peak - start for peak in early)])
    gradients = (p.grad for p in trained if p.grad is not None)
    traced = StepTrace(
        weights=weights,
        adapter=start - weights,
        optimizer=state_bytes(setting.optimizer, trained),
        gradients=distinct_bytes(gradients if parts is None else parts.values()),
        initial_gradients=initial_gradients,
        activations=activations,
        forward=forward,
        backward=backward,
        second_half=second_half,
        forward_operations=operations,
        backward_operations=ledger.operations - operations,
    )
    if setting.draws is None:
        return traced
    del loss
    for p in trained:
        p.grad = None
    engine, slots, peak = trace_engine(model.eval(), setting.draws, ledger)
    return replace(traced, engine=engine, slots=slots, sampling_peak=peak)


class LastTiles(Documents):
    """Documents with only the last three attention tiles, which contain the peak, because tiles
    grow.
    """

    def tiles(self) -> Iterator[Tile]:
        yield from [*super().tiles()][-3:]


def _last_tiles_mask(
    lens: tuple[int, ...], *, q_length: int, local_size: int | None = None, **_: Any
) -> Documents:
    """Documents of these lengths, or a single document if a soft prompt makes the sequence longer.
    """
    return LastTiles(lens if q_length == sum(lens) else (q_length,), local_size)


def shard_gradients(
    trained: Sequence[nn.Parameter], setting: MemorySetting
) -> dict[nn.Parameter, Tensor]:
    """Replaces each gradient by one process's part of it, (n,), as soon as the gradient exists.
    Returns these parts.
    """
    parts = {}

    def keep(p: nn.Parameter) -> None:
        if p not in parts:
            parts[p] = p.new_empty(-(-p.numel() // setting.processes), dtype=p.grad_dtype)
        p.grad = None

    for p in trained:
        p.register_post_accumulate_grad_hook(keep)
        if setting.accumulating:
            keep(p)
    return parts


def reset_peak_halfway(trained: Sequence[nn.Parameter], ledger: Ledger) -> list[int]:
    """Resets the ledger's peak when half of the parameters have gradients. Returns a list to which
    the first half's peak is added. The halves are extrapolated separately, because their peaks grow
    differently with the number of blocks.
    """
    peaks, remaining = list[int](), (len(trained) + 1) // 2

    def count(p: nn.Parameter) -> None:
        nonlocal remaining
        remaining -= 1
        if not remaining:
            peaks.append(ledger.peak)
            ledger.peak = ledger.now

    for p in trained:
        p.register_post_accumulate_grad_hook(count)
    return peaks


def attach_below(model: PreTrainedModel, setting: MemorySetting) -> None:
    for n, (spec, beside) in enumerate(setting.below):
        attach(model, spec, name=f"below{n}", **beside(model)).requires_grad_(False)


def loss_of(model: PreTrainedModel, setting: MemorySetting) -> Tensor:
    """The loss () of the setting on fake ids, with positions (1, T) if packed, otherwise with a
    mask (B, T).
    """
    shape = (1, sum(setting.rows)) if setting.packed else (setting.batch, setting.length)
    where = "position_ids" if setting.packed else "attention_mask"
    inputs = {name: token_ids(*shape) for name in ("input_ids", where)}
    n = sum(setting.rows) - setting.batch if setting.labelled is None else setting.labelled
    if setting.loss is not None:
        return setting.loss(model, inputs, n)
    return class_loss(model, inputs) if setting.classes else next_token_loss(model, inputs, n)


@torch.no_grad()
def inference(model: PreTrainedModel, setting: MemorySetting, ledger: Ledger) -> StepTrace:
    """Traces the forward pass of a prompt, then of one more token."""
    weights = live_bytes(ledger)
    prompt, token = (token_ids(setting.batch, n) for n in (setting.length - 1, 1))
    ledger.peak = start = live_bytes(ledger)
    cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).cache
    forward = ledger.peak - start
    ledger.peak = live_bytes(ledger)
    model(input_ids=token, cache=cache, use_cache=True)
    return StepTrace(
        weights, kv_cache=live_bytes(ledger) - start, forward=forward, backward=ledger.peak - start
    )


def live_bytes(ledger: Ledger) -> int:
    """The bytes of tensors that exist after a garbage collection."""
    gc.collect()
    return ledger.now


@torch.no_grad()
def trace_engine(model: PreTrainedModel, size: RolloutSize, ledger: Ledger) -> tuple[int, int, int]:
    """Traces the sampling of completions. Returns the bytes of an engine, of its KV cache, and of
    the peak, which includes the KV cache.
    """
    few, more = (_kv_cache_bytes(model, n, ledger) for n in PROBE_TOKENS)
    token_bytes = (more - few) // (PROBE_TOKENS[1] - PROBE_TOKENS[0])
    state = few - PROBE_TOKENS[0] * token_bytes
    # models with a state besides the KV cache compute one completion at a time
    slots = size.slots if state <= 0 else 1
    kv_cache = slots * (max(0, state) + round_up(size.prompt + size.max_new_tokens) * token_bytes)
    config = model.config.get_text_config()
    logits = LOGIT_COPIES * slots * config.vocab_size * model.dtype.itemsize
    chunk, prompts = min(size.prompt, ENGINE_SETTINGS.chunk), -(-slots // size.group)
    rows = max(1, min(prompts, ENGINE_SETTINGS.budget // chunk))
    passes = max(_pass_bytes(model, rows, chunk, ledger), _pass_bytes(model, slots, 1, ledger))
    passes += kv_cache // config.num_hidden_layers  # a copy of what one layer reads
    pairs = [delta.factors() for delta in deltas_of(model, selection_of(model).names).values()]
    # a planned step pads ranks to those of a tile
    copies = ((t, max(FACTOR_COPIES, TILE / len(pair[1]))) for pair in pairs if pair for t in pair)
    factors = int(sum(t.numel() * n for t, n in copies))
    engine = packed_bytes(model) + factors * model.dtype.itemsize
    return engine, kv_cache, kv_cache + max(passes, logits)


def _kv_cache_bytes(model: PreTrainedModel, tokens: int, ledger: Ledger) -> int:
    start = ledger.now
    cache = model(input_ids=token_ids(1, tokens), use_cache=True, logits_to_keep=1).cache
    size = ledger.now - start
    del cache
    return size


def _pass_bytes(model: PreTrainedModel, rows: int, tokens: int, ledger: Ledger) -> int:
    ledger.peak = start = ledger.now
    model(input_ids=token_ids(rows, tokens), use_cache=False, logits_to_keep=1)
    return ledger.peak - start
