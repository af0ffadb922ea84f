"""The methods: one a file, one table from the command's word to a spec that can be built without
arguments.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.methods.adalora import AdaLoRA
from lorafold.methods.bitfit import BitFit
from lorafold.methods.bottleneck import Bottleneck
from lorafold.methods.dora import DoRA
from lorafold.methods.fastfood import Fastfood
from lorafold.methods.full import Full
from lorafold.methods.ia3 import IA3
from lorafold.methods.inits import OLoRA, PiSSA
from lorafold.methods.loha import LoHa
from lorafold.methods.lokr import LoKr
from lorafold.methods.lora import LoRA
from lorafold.methods.prefix import Prefix
from lorafold.methods.probe import LinearProbe
from lorafold.methods.prompt import Prompt
from lorafold.methods.sparse import LTSFT, FishMask
from lorafold.methods.vera import VeRA

METHODS: dict[str, Callable[..., Spec]] = {
    "lora": LoRA,
    "rslora": partial(LoRA, rslora=True),
    "pissa": PiSSA,
    "olora": OLoRA,
    "dora": DoRA,
    "adalora": AdaLoRA,
    "vera": VeRA,
    "loha": LoHa,
    "lokr": LoKr,
    "ia3": IA3,
    "bitfit": BitFit,
    "full": Full,
    "lt-sft": LTSFT,
    "fish": FishMask,
    "houlsby": Bottleneck,
    "pfeiffer": partial(Bottleneck, after="mlp"),
    "prompt": Prompt,
    "prefix": Prefix,
    "linear-probe": LinearProbe,
    "fastfood": Fastfood,
}


def own_options(method: str) -> list[str]:
    """The fields of a method's own spec."""
    maker = METHODS[method]
    cls: Any = maker.func if isinstance(maker, partial) else maker
    return [f.name for f in fields(cls)]


def known_options(method: str) -> list[str]:
    """What `make_spec` takes for a method: its own fields, and those of lora where it lies over
    another.
    """
    own = own_options(method)
    return [*own, *own_options("lora")] if "over" in own else own


def make_spec(method: str, **options: Any) -> Spec:
    """The spec of a method by its word.

    LorafoldError for an unknown word, or fields that the method does not have.

    A method that lies over another (`dora`) takes that one's word as `over` (lora), and its options
    with its own.
    """
    if method not in METHODS:
        raise LorafoldError(f"unknown method {method!r}; there are: {', '.join(METHODS)}")
    maker, known = METHODS[method], own_options(method)
    if "over" in known and not isinstance(options.get("over"), Spec):
        own = {k: options.pop(k) for k in known if k in options}
        options = {**own, "over": make_spec(own.get("over", "lora"), **options)}
    if unknown := [k for k in options if k not in known]:
        raise LorafoldError(
            f"method {method} has no option {', '.join(unknown)}; it has:"
            f" {', '.join(known) or 'none'}"
        )
    try:
        return maker(**options)
    except TypeError as e:
        raise LorafoldError(f"method {method}: {e}") from None


__all__ = [
    "IA3",
    "LTSFT",
    "METHODS",
    "AdaLoRA",
    "BitFit",
    "Bottleneck",
    "DoRA",
    "Fastfood",
    "FishMask",
    "Full",
    "LinearProbe",
    "LoHa",
    "LoKr",
    "LoRA",
    "OLoRA",
    "PiSSA",
    "Prefix",
    "Prompt",
    "VeRA",
    "known_options",
    "make_spec",
]
