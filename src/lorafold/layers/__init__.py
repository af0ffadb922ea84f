"""Layers for each weight format. A table maps the class that defines a module's forward to the
layer class that reads the module's weight.
"""

from collections.abc import Callable
from math import prod

from torch import Tensor, nn

from lorafold.core.anatomy import Anatomy
from lorafold.core.attach import Adapted
from lorafold.core.expert_matrices import Matrices
from lorafold.core.layer import BaseLayer
from lorafold.errors import LorafoldError
from lorafold.layers.bitsandbytes import Linear4bit, Linear8bit
from lorafold.layers.compressed import Compressed
from lorafold.layers.convolution import Convolution
from lorafold.layers.dense import Conv1D, Embedding, Linear, Plain
from lorafold.layers.experts import Experts
from lorafold.layers.grouped import GroupedLinear

# Names, not classes, so that nothing is imported for a format that a model does not use.
LAYERS = {
    "torch.nn.modules.linear.Linear": Linear,
    "transformers.pytorch_utils.Conv1D": Conv1D,
    "torch.nn.modules.sparse.Embedding": Embedding,
    "torch.nn.modules.conv.Conv1d": Convolution,
    "torch.nn.modules.conv.Conv2d": Convolution,
    "torch.nn.modules.conv.Conv3d": Convolution,
    "bitsandbytes.nn.modules.Linear4bit": Linear4bit,
    "bitsandbytes.nn.modules.Linear8bitLt": Linear8bit,
    "lorafold.layers.compressed.CompressedLinear": Compressed,
    "transformers.models.falcon.modeling_falcon.FalconLinear": Linear,
    "transformers.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4GroupedLinear": GroupedLinear,
    "lorafold.core.expert_matrices.Matrices": Experts,
}


def layer_class(module: nn.Module) -> type[BaseLayer]:
    """Returns the layer class for this module; `Plain` for a module without a matrix."""
    cls = module.base_class if isinstance(module, Adapted) else type(module)
    definer = next(c for c in cls.__mro__ if "forward" in vars(c))
    if issubclass(cls, nn.Embedding) and hasattr(module, "embed_scale"):
        return Embedding
    return LAYERS.get(f"{definer.__module__}.{definer.__qualname__}", Plain)


def layer_of(module: nn.Module, stored: Callable[[], Tensor] | None = None) -> BaseLayer:
    """Returns the module as a layer. `stored` reads the original weight (out, in) of a quantized
    module from files.
    """
    return layer_class(module)(module, stored)


def is_linear(module: nn.Module) -> bool:
    """Returns whether the module multiplies activations by a matrix, in any format."""
    return layer_class(module).linear


def parameter_count(model: nn.Module) -> int:
    """Returns the number of the base's parameters. Tied parameters count once, a quantized weight
    (out, in) as out * in.
    """
    return sum(n for sizes in parameter_sizes(model).values() for n in sizes.values())


def parameter_sizes(model: nn.Module) -> dict[str, dict[str, int]]:
    """Returns the sizes of the base's parameters by module path and name, counted like
    `parameter_count`.
    """
    by_path: dict[str, dict[str, int]] = {}
    seen = set()
    for path, module in Anatomy.of(model).modules:
        layer = layer_of(module)
        if isinstance(module, Matrices):
            sizes = by_path[path.removesuffix(module.name).removesuffix(".")]
            sizes[module.name] = prod((*layer.matrices, *layer.shape))
            continue
        sizes = by_path[path] = {"weight": prod(layer.shape)} if layer.quantized else {}
        for name, p in module._parameters.items():
            plain = p is not None and p.is_floating_point() and id(p) not in seen
            if p is not None and plain and (name == "bias" or not layer.quantized):
                sizes[name] = p.numel()
                seen.add(id(p))
    return by_path


def output_width(module: nn.Module) -> int:
    """Returns the output size of a part of a block: its config's hidden size, or the input size of
    its first linear layer.
    """
    for m in module.modules():
        if hasattr(m, "config"):
            return int(m.config.hidden_size)  # type: ignore[union-attr, arg-type]
        if is_linear(m):
            return layer_of(m).shape[1]
    raise LorafoldError(
        f"{type(module).__name__}: the output size is unknown, because the module has neither a"
        " config nor a linear layer; choose other targets"
    )


__all__ = [
    *("LAYERS", "is_linear", "layer_class", "layer_of", "output_width"),
    *("parameter_count", "parameter_sizes"),
]
