"""Models, rows and steps on shadows of a GPU, and the same on the CPU. With a build of torch for
CUDA they are on the GPU itself.
"""

import contextlib
import math
import types
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from rich.console import Console
from torch import Tensor, nn

import cuda_kernels
import lorafold as lf
from card import Card
from lorafold.core.expert_matrices import expert_parameters
from lorafold.data.examples import Example
from lorafold.engine import adapter_cache as engine_residency
from lorafold.layers.expert_storage import quantize_experts
from lorafold.methods import make_spec
from lorafold.models.quantizations import ON_LOAD, STORAGES
from lorafold.models.quantize_on_load import quantizable_paths, use_quantized_experts
from lorafold.objectives.sft import Sft
from lorafold.runtime.processes import SINGLE_PROCESS
from lorafold.training.loop import Plan, train_step
from lorafold.training_step.data_parallel import Replicated
from lorafold.training_step.fused_modules import fused
from lorafold.training_step.gradient_checkpointing import enable_gradient_checkpointing
from lorafold.training_step.optimizers import make_optimizer
from lorafold.training_step.param_groups import param_groups
from shadow import WHERE, Count, Device, Shadow, host_of

REAL = torch.version.cuda is not None
# a build for CUDA can't pretend another device
HERE = pytest.mark.skipif(REAL and WHERE.type != "cuda", reason="a build of torch for CUDA")
if not REAL:
    cuda_kernels.install()
CPU = torch.device("cpu")
SIZE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 304, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LENGTHS = (24, 17, 31, 9)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
STAND_IN = types.SimpleNamespace(pad_token_id=0)  # for a tokenizer


def shadow_of(x: Tensor) -> Tensor:
    if REAL:
        return x.detach().to(WHERE)
    return Shadow(x.detach().as_subclass(Tensor))


def moved(model: nn.Module, put: Callable[[Tensor], Tensor] = shadow_of) -> nn.Module:
    """The model with every parameter, buffer and packed constant on the device; what was tied stays
    tied. `Module.to` can't put a tensor of another class in a parameter.
    """
    done: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def there(x: Any) -> Any:
        return put(x) if isinstance(x, Tensor) and x.device.type == "cpu" else x

    def parameter(p: nn.Parameter) -> nn.Parameter:
        new = nn.Parameter(there(p.detach()), requires_grad=p.requires_grad)
        for key, value in vars(p).items():  # bitsandbytes keeps constants beside the codes
            owners = (value, getattr(value, "state2", None)) if key == "quant_state" else ()
            for owner in filter(None, owners):
                vars(owner).update({k: there(v) for k, v in vars(owner).items()})
            if key not in vars(new):
                setattr(new, key, there(value))
        return new

    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if id(p) not in done:
                    done[id(p)] = p, parameter(p)
                module._parameters[name] = done[id(p)][1]
        for name, buffer in module._buffers.items():
            module._buffers[name] = there(buffer)
        for key, value in [*vars(module).items()]:  # such as the rotary embedding's own copy
            if isinstance(value, Tensor):
                setattr(module, key, there(value))
    return model


def on_device() -> Any:
    """What the code on the device runs within: shadows, or the card."""
    return Card() if REAL else Device()


def llama(blocks: int = 2, **more: Any) -> Any:
    return tf.LlamaConfig(**SIZE | {"num_hidden_layers": blocks} | more)


def mixtral(blocks: int = 2, experts: int = 4) -> Any:
    size = SIZE | {"num_hidden_layers": blocks}
    return tf.MixtralConfig(**size, num_local_experts=experts, num_experts_per_tok=2)


def gemma3(blocks: int = 2) -> Any:
    kinds = ["sliding_attention", "full_attention"] * blocks
    size = SIZE | {"num_hidden_layers": blocks, "layer_types": kinds[:blocks]}
    return tf.Gemma3TextConfig(**size, sliding_window=8)


def lfm2(blocks: int = 2) -> Any:
    size = {k: v for k, v in SIZE.items() if k != "head_dim"} | {"num_hidden_layers": blocks}
    return tf.Lfm2Config(
        **size, conv_L_cache=3, layer_types=(["conv", "full_attention"] * blocks)[:blocks]
    )


def base(config: Any, storage: str, there: bool, cls: Any = tf.AutoModelForCausalLM) -> Any:
    """A random model in a storage, on the device or on the CPU."""
    torch.manual_seed(0)
    model = cls.from_config(config, dtype=DTYPES.get(storage, torch.bfloat16))
    model.requires_grad_(False)
    for name, p in model.named_parameters():
        if name.endswith("mlp.gate.weight"):  # in 16 bits, experts as good as others would change
            p.mul_(50)
    for path in quantizable_paths(model) if storage in ON_LOAD else ():
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        if name in expert_parameters(owner):
            experts = owner._parameters[name]
            owner._parameters[name] = quantize_experts(experts, STORAGES[storage].pack)
        else:
            setattr(owner, name, STORAGES[storage].pack(model.get_submodule(path).weight))
    if storage in ON_LOAD:
        use_quantized_experts(model)
    return moved(model) if there else model


class Here(Executor):
    """Runs what is submitted at once, since another thread has no shadows."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


def checksum(held: Any) -> int:
    """The engine's own reads memory, which a shadow has none of."""
    return sum(int(host_of(t).detach().float().abs().sum() * 1e3) for t in held.tensors)


def engines_know_shadows(patch: pytest.MonkeyPatch) -> None:
    """Have engines work in their caller's thread, and sum shadows by their values."""
    patch.setattr(engine_residency, "ThreadPoolExecutor", Here)
    patch.setattr(engine_residency, "checksum", checksum)


def away_from_start(adapter: Any, scale: float = 0.02) -> None:
    """Nothing at zero, where gradients would hide; the same on both devices."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_((torch.randn(p.shape) * scale).to(p.device))


def rows(lengths: Sequence[int] = LENGTHS, vocabulary: int = 304) -> list[Example]:
    """Random rows of which the second half counts."""
    g = torch.Generator().manual_seed(1)
    drawn = [tuple(torch.randint(3, vocabulary, (n,), generator=g).tolist()) for n in lengths]
    return [Example(r, (-100,) * (len(r) // 2) + r[len(r) // 2 :]) for r in drawn]


class Stepped(NamedTuple):
    """The losses of steps, the gradients of the first, and what the last one cost."""

    losses: list[float]
    gradients: dict[str, Tensor]
    count: Count


class Kept(Replicated):
    """Keeps the gradients of the first step as they are before clipping."""

    def __init__(self, adapter: Any) -> None:
        super().__init__(SINGLE_PROCESS)
        self.adapter = adapter
        self.found: dict[str, Tensor] = {}

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        if not self.found:
            graded = [(n, p.grad) for n, p in self.adapter.named_parameters()]
            self.found = {n: host_of(g).detach().cpu().clone() for n, g in graded if g is not None}
        return super().norm(parameters)


def fitted(
    adapter: Any, loss: Any, examples: Sequence[Any], device: Any, steps: int = 2
) -> Stepped:
    """Steps of the trainer, of which the last is counted, when states are there."""
    recipe = lf.Recipe(accumulate=1, clip=1.0)
    optimizer = make_optimizer("adamw", param_groups(adapter.parts(), 1e-3, 1e-3), recipe)
    for group in optimizer.param_groups:
        group.setdefault("peak", group["lr"])
    layout = Kept(adapter)
    where = CPU if device is None else WHERE
    run: Any = types.SimpleNamespace(checkpoints=dict)
    feed: Any = types.SimpleNamespace(steps=10)
    plan = Plan(recipe, Sft(), adapter, loss, where, optimizer, feed, None, math.inf, run, layout)
    losses, count = [], Count()
    for i in range(steps):
        counting = device.counting() if device and i == steps - 1 else contextlib.nullcontext(count)
        torch.manual_seed(3)
        with counting as count:
            losses.append(train_step(plan, examples, i)[0])
    return Stepped(losses, layout.found, count)


@dataclass
class Case:
    """One training step: what is trained, on what, how."""

    method: str = "lora"
    options: dict[str, Any] = field(default_factory=dict)
    storage: str = "bf16"
    config: Any = field(default_factory=llama)
    packed: bool = True
    checkpointing: bool = False
    objective: Callable[..., Any] | None = None  # what yields a loss; None: the next token's
    examples: Sequence[Any] = field(default_factory=rows)
    cls: Any = tf.AutoModelForCausalLM
    beside: dict[str, Any] = field(default_factory=dict)
    loaded: Callable[[], nn.Module] | None = None  # the base from files, in the place of `config`

    def on(self, there: bool) -> Stepped:
        """Its steps on the device, or on the CPU."""
        with contextlib.ExitStack() as stack:
            device = stack.enter_context(on_device()) if there else None
            if self.loaded is None:
                model = base(self.config, self.storage, there, self.cls)
            else:
                model = moved(self.loaded()) if there else self.loaded()
            torch.manual_seed(0)
            adapter = lf.attach(model, make_spec(self.method, **self.options), **self.beside)
            if self.method != "full":
                away_from_start(adapter)
            if self.checkpointing:
                enable_gradient_checkpointing(model)
            yielded = self.objective or completions
            loss = stack.enter_context(yielded(model, self.packed))
            stack.enter_context(fused(model))
            return fitted(adapter, loss, self.examples, device)

    def both(self) -> tuple[Stepped, Stepped]:
        """On the device and on the CPU."""
        return self.on(True), self.on(False)


def completions(model: Any, packed: bool) -> Any:
    from lorafold.objectives.sft import Sft

    return Sft().loss(model, STAND_IN, packed, Console(quiet=True))  # type: ignore[arg-type]


def apart(found: Stepped, expected: Stepped) -> float:
    """The largest relative difference of a gradient, or of a loss."""
    assert found.gradients.keys() == expected.gradients.keys()
    pairs = [(g.float(), expected.gradients[n].float()) for n, g in found.gradients.items()]
    pairs.append((torch.tensor(found.losses[:1]), torch.tensor(expected.losses[:1])))
    return max(((x - y).norm() / y.norm().clamp_min(1e-12)).item() for x, y in pairs)
