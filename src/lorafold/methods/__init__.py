"""The methods and the table of their names.

To add a method, add its class and a row in `METHODS`. The package `lorafold` exports every spec
class in the table (for example `lf.LoRA`); the imports below declare these names for type checkers.
"""

import importlib
from collections import UserDict
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from lorafold.core.spec import Spec
    from lorafold.methods.adalora import AdaLoRA as AdaLoRA
    from lorafold.methods.bitfit import BitFit as BitFit
    from lorafold.methods.bottleneck import Bottleneck as Bottleneck
    from lorafold.methods.dora import DoRA as DoRA
    from lorafold.methods.fastfood import Fastfood as Fastfood
    from lorafold.methods.full import Full as Full
    from lorafold.methods.ia3 import IA3 as IA3
    from lorafold.methods.linear_probe import LinearProbe as LinearProbe
    from lorafold.methods.loha import LoHa as LoHa
    from lorafold.methods.lokr import LoKr as LoKr
    from lorafold.methods.lora import LoRA as LoRA
    from lorafold.methods.lora_inits import OLoRA as OLoRA
    from lorafold.methods.lora_inits import PiSSA as PiSSA
    from lorafold.methods.prefix_tuning import Prefix as Prefix
    from lorafold.methods.prompt_tuning import Prompt as Prompt
    from lorafold.methods.sparse import LTSFT as LTSFT
    from lorafold.methods.sparse import FishMask as FishMask
    from lorafold.methods.vera import VeRA as VeRA

Row = str | tuple[str, dict[str, Any]] | Callable[..., "Spec"]


class Methods(UserDict[str, Any]):
    """Spec factories by method name.

    A row is a spec class, a function that returns a spec, or the text `module.Class` for a class in
    this package, optionally with options. Such a class is imported on first use, so that listing
    the names does not import torch.
    """

    def __init__(self, rows: dict[str, Row]) -> None:
        super().__init__(rows)
        named = [row for row in rows.values() if not callable(row)]
        places = [row if isinstance(row, str) else row[0] for row in named]
        # class name -> function that imports the class
        self.classes = {place.partition(".")[2]: partial(_import_class, place) for place in places}

    def __getitem__(self, name: str) -> Callable[..., "Spec"]:
        row = self.data[name]
        if callable(row):
            return row
        where, options = (row, {}) if isinstance(row, str) else row
        cls = _import_class(where)
        return partial(cls, **options) if options else cls

    def spec(self, name: str) -> "type[Spec]":
        """The spec class of a method."""
        maker = self[name]
        cls = getattr(maker, "func", maker)
        return cls if isinstance(cls, type) else type(maker())


def _import_class(place: str) -> "type[Spec]":
    module, _, name = place.partition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


METHODS = Methods(
    {
        "lora": "lora.LoRA",
        "rslora": ("lora.LoRA", {"rslora": True}),
        "pissa": "lora_inits.PiSSA",
        "olora": "lora_inits.OLoRA",
        "dora": "dora.DoRA",
        "adalora": "adalora.AdaLoRA",
        "vera": "vera.VeRA",
        "loha": "loha.LoHa",
        "lokr": "lokr.LoKr",
        "ia3": "ia3.IA3",
        "bitfit": "bitfit.BitFit",
        "full": "full.Full",
        "lt-sft": "sparse.LTSFT",
        "fish": "sparse.FishMask",
        "houlsby": "bottleneck.Bottleneck",
        "pfeiffer": ("bottleneck.Bottleneck", {"after": "mlp"}),
        "prompt": "prompt_tuning.Prompt",
        "prefix": "prefix_tuning.Prefix",
        "linear-probe": "linear_probe.LinearProbe",
        "fastfood": "fastfood.Fastfood",
    }
)


def known_options(method: str, over: str | None = None) -> tuple[str, ...]:
    """The option names that `make_spec` accepts for a method. For a method on top of another one,
    they include the options of that method (`over`).
    """
    if method not in METHODS:
        raise LorafoldError(f"unknown method {method!r}; the methods are: {', '.join(METHODS)}")
    default: Any = METHODS[method]
    default_spec = default if isinstance(default, type) else default()
    names = tuple(field.name for field in fields(default_spec))
    if "over" not in names:
        return names
    return (*names, *(known_options(over) if over else default().over.options()))


def make_spec(method: str, **options: Any) -> "Spec":
    """The spec of a method with these options.

    DoRA, which is applied on top of another method, also accepts that method's name as `over`, and
    that method's options.
    """
    from lorafold.core.spec import Spec

    over = options.get("over")
    known = known_options(method, None if isinstance(over, Spec) else over)
    maker: Any = METHODS[method]
    if "over" in known and not isinstance(over, Spec):
        lower = make_spec(over) if over else maker().over
        inner = options.keys() & {*lower.options()} - {"over"}
        given = {option: options.pop(option) for option in inner}
        options["over"] = make_spec(over, **given) if over else type(lower)(**given)
    if not options.keys() <= {*known}:
        from lorafold.foreign_options import unknown_names

        raise unknown_names(f"method {method}", options, known)
    try:
        return maker(**options)
    except TypeError as e:
        raise LorafoldError(f"method {method}: an option has the wrong type: {e}") from None


def name_of(spec: "Spec") -> str:
    """The name of a spec's method. If several methods have this spec class, such as `lora` and
    `rslora`, it is the method whose default spec differs from this one in the fewest fields.
    """
    defaults = {name: make_spec(name) for name in METHODS}
    return min(
        (name for name, like in defaults.items() if type(like) is type(spec)),
        key=lambda name: sum(
            getattr(defaults[name], f.name) != getattr(spec, f.name)
            for f in fields(spec)  # type: ignore[arg-type]
        ),
    )
