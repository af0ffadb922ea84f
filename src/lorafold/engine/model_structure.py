"""Runs a model to detect how it can be batched, independently of its class.

Three prompts run in one batch, in chunks and then token by token. Their logits must equal the
logits of each prompt alone, up to rounding. If they don't (for example because of recurrent state
or custom attention), the engine runs one request at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lorafold.core.anatomy import Anatomy
from lorafold.core.attach import Adapted, deltas_on, selection_of
from lorafold.core.contexts import evaluating
from lorafold.core.expert_matrices import Matrices
from lorafold.core.layer import Layer
from lorafold.engine.kv_cache import BLOCK, BlockCache, BlockView, num_blocks
from lorafold.engine.operations import Operations, slot_attention, slot_mask
from lorafold.errors import LorafoldError
from lorafold.layers import is_linear, layer_of
from lorafold.training_step.packed_attention import attending

ATTENTION_NAME = "lorafold_slots"
STRUCTURE_ATTRIBUTE = "lorafold_structure"  # attribute of the model that caches its structure
IN_USE_ATTRIBUTE = "lorafold_engine"  # attribute of the model while an engine uses it
PROBE_LENGTHS, PROBE_CHUNK = (11, 5, 8), 4


@dataclass(frozen=True)
class MatrixShapes:
    """The module paths of all matrices (out, in) of one shape, in the model's order."""

    out: int
    in_features: int
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Structure:
    unbatched_reason: str  # why requests can't be batched, or ""
    rowwise: frozenset[str] = frozenset()  # paths of modules whose inputs have one row per request
    shapes: tuple[MatrixShapes, ...] = ()  # matrices among `rowwise`, by shape
    routed: bool = False  # mixture of experts, which computes tokens of all rows together
    token_bytes: int = 0  # bytes of a token's keys and values in all layers

    @cached_property
    def index_of(self) -> dict[str, tuple[int, int]]:
        return {
            path: (i, at)
            for i, shape in enumerate(self.shapes)
            for at, path in enumerate(shape.paths)
        }


def structure_of(model: Any) -> Structure:
    """Returns `probe`'s result, cached until the modules or types of active deltas change."""
    names = selection_of(model).names
    modules = [
        (
            path,
            getattr(type(module), "base_class", type(module)),
            [p.shape for p in module._parameters.values() if p is not None],
            [type(delta) for delta in deltas_on(module, names)],
        )
        for path, module in Anatomy.of(model).modules
    ]
    state = (model.dtype, model.device, modules)
    cached = vars(model).get(STRUCTURE_ATTRIBUTE)
    if cached is None or cached[0] != state:
        cached = vars(model)[STRUCTURE_ATTRIBUTE] = (state, probe(model))
    return cached[1]


def slotted(model: Any, operations: Operations) -> Any:
    """Returns a context in which the model's attention accepts rows at different positions."""
    name = f"{ATTENTION_NAME}_{operations.name}"
    return attending(model, slot_mask, slot_attention(operations), name)


def forward_pass(
    model: Any, view: BlockView, ids_BT: Tensor, counts_B: Tensor, keep: Tensor
) -> Tensor:  # (B, len(keep), V)
    """Returns the logits (B, n, V) at the n positions `keep` of a pass over ids_BT. In each row,
    the first counts_B tokens are real, and the others are padding.
    """
    positions_BT = torch.minimum(view.position_BT, (view.start_B + counts_B - 1)[:, None])
    out = model(
        input_ids=ids_BT, position_ids=positions_BT, cache=view, use_cache=True, logits_to_keep=keep
    )
    return out.logits if out.logits.shape[1] == len(keep) else out.logits[:, keep]


def probe(model: Any) -> Structure:
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(vocabulary, (n,), generator=generator) for n in PROBE_LENGTHS]
    with evaluating(model):
        alone = torch.stack(
            [
                model(input_ids=p[None].to(model.device), use_cache=False).logits[0, -1]
                for p in prompts
            ]
        ).float()
        try:
            with ExitStack() as stack, slotted(model, Operations()):
                inputs = _InputRecorder(model, stack)
                cache = BlockCache(len(prompts), model.device)
                batched = _batched_logits(model, prompts, cache).float()
        except Exception as error:
            return Structure(f"the model can't be batched ({type(error).__name__}: {error})")
    if not (batched - alone).norm() <= max(1e-5, 16 * torch.finfo(model.dtype).eps) * alone.norm():
        return Structure("the model's logits change when requests are batched")
    rowwise = frozenset(path for path, fits in inputs.rows.items() if fits)
    sizes = defaultdict(list)
    for path, module in Anatomy.of(model).modules:
        if path in rowwise and is_linear(module):
            sizes[layer_of(module).shape].append(path)
    shapes = tuple(MatrixShapes(*size, tuple(paths)) for size, paths in sizes.items())
    routed = any(isinstance(module, Matrices) for _, module in Anatomy.of(model).modules)
    return Structure("", rowwise, shapes, routed, cache.block_bytes // BLOCK)


def _batched_logits(model: Any, prompts: list[Tensor], cache: BlockCache) -> Tensor:  # (B, V)
    """Returns the logits (B, V) after each prompt's last token. Each forward
    pass is over a chunk of every prompt, or a token if no prompt has a whole chunk left.
    """
    rows, device, logits_B = len(prompts), model.device, dict[int, Tensor]()
    view = BlockView(cache)
    tables = [cache.allocate(num_blocks(n)) for n in PROBE_LENGTHS]
    done = torch.zeros(rows, dtype=torch.long)
    while (left := torch.tensor(PROBE_LENGTHS) - done).any():
        width = PROBE_CHUNK if left.max() >= PROBE_CHUNK else 1
        counts = left.clamp(max=width)
        padded = (pad(p, (0, PROBE_CHUNK)) for p in prompts)
        parts = [p[n : n + width] for p, n in zip(padded, done, strict=True)]
        view.select([*zip(tables, done.tolist(), counts.tolist(), strict=True)], width)
        inputs = (x.to(device) for x in (torch.stack(parts), counts.clamp(1), torch.arange(width)))
        logits_BTV = forward_pass(model, view, *inputs)
        logits_B |= {b: logits_BTV[b, n - 1] for b, n in enumerate(counts.tolist()) if n}
        done = done + counts
    return torch.stack([logits_B[b] for b in range(rows)])


class _InputRecorder:
    """Records the inputs of modules with a matrix. `rows[path]` is True if all inputs of the module
    have one row per request.
    """

    def __init__(self, model: nn.Module, stack: ExitStack) -> None:
        self.rows: dict[str, bool] = {}
        for path, module in Anatomy.of(model).modules:
            layer = layer_of(module)
            if layer.linear or layer.takes_ids:
                record = partial(self.record, path, 2 if layer.takes_ids else 3)
                stack.callback(module.register_forward_pre_hook(record, with_kwargs=True).remove)

    def record(self, path: str, dims: int, _: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if len(args) == 1 and not kwargs else None
        fits = isinstance(x, Tensor) and x.dim() == dims and len(x) == len(PROBE_LENGTHS)
        self.rows[path] = self.rows.get(path, True) and fits


def reserve(model: Any, stack: ExitStack) -> None:
    """Reserves a model for one engine and disables its gradients, until the stack is closed."""
    if IN_USE_ATTRIBUTE in vars(model):
        raise LorafoldError(
            "engine: another engine is using this model; close that engine, or read its completion"
            " to the end"
        )
    vars(model)[IN_USE_ATTRIBUTE] = True
    stack.callback(vars(model).pop, IN_USE_ATTRIBUTE)
    for p in model.parameters():
        if p.requires_grad:
            stack.callback(p.requires_grad_, True)
            p.requires_grad_(False)


def _separated(layer: Callable[[nn.Module], Layer], module: nn.Module, x: Tensor) -> Any:
    return layer(module)(x)  # a new one, because attaching deltas changes the class of a module


def separate_rows(model: nn.Module, stack: ExitStack) -> None:
    """Makes modules compute rows independently, until the stack is closed. bitsandbytes' int8
    matmul chooses outliers from all rows of a batch (LLM.int8: Dettmers et al. 2022, arXiv
    2208.07339, section 3.2), so the engine multiplies by the dequantized matrix instead, as adapted
    layers do in training.
    """
    for _, module in Anatomy.of(model).modules:
        layer = layer_of(module)
        adapted = isinstance(module, Adapted)  # its forward already runs `layer`
        if layer.mixes_rows and not adapted and "forward" not in vars(module):
            module.forward = partial(_separated, type(layer), module)
            stack.callback(vars(module).pop, "forward", None)
