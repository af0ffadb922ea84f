"""The methods: one a file, one table from the command's word to a spec that can be built without
arguments.

A new method is its file and a row of `METHODS`. The spec classes that are imported here are
`lorafold`'s own names too (`lf.LoRA`); `X as X` says so to type checkers. A method's files need a
row in `peft` only where they are not what its code says (`peft/derived.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.methods.adalora import AdaLoRA as AdaLoRA
from lorafold.methods.bitfit import BitFit as BitFit
from lorafold.methods.bottleneck import Bottleneck as Bottleneck
from lorafold.methods.dora import DoRA as DoRA
from lorafold.methods.fastfood import Fastfood as Fastfood
from lorafold.methods.full import Full as Full
from lorafold.methods.ia3 import IA3 as IA3
from lorafold.methods.inits import OLoRA as OLoRA
from lorafold.methods.inits import PiSSA as PiSSA
from lorafold.methods.loha import LoHa as LoHa
from lorafold.methods.lokr import LoKr as LoKr
from lorafold.methods.lora import LoRA as LoRA
from lorafold.methods.prefix import Prefix as Prefix
from lorafold.methods.probe import LinearProbe as LinearProbe
from lorafold.methods.prompt import Prompt as Prompt
from lorafold.methods.sparse import LTSFT as LTSFT
from lorafold.methods.sparse import FishMask as FishMask
from lorafold.methods.vera import VeRA as VeRA

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


def spec_classes() -> dict[str, type[Spec]]:
    """The spec classes that are imported here, by their names."""
    found = {name: value for name, value in globals().items() if isinstance(value, type)}
    return {n: c for n, c in found.items() if issubclass(c, Spec) and c is not Spec}


def known_options(method: str, over: str | None = None) -> tuple[str, ...]:
    """The names of the options that `make_spec` takes for a method, where it lies over another one
    (`over`, a name; None: the method's own choice) those of that one too.
    """
    return make_spec(method, **({} if over is None else {"over": over})).options()


def make_spec(method: str, **options: Any) -> Spec:
    """The spec of a method by its name.

    LorafoldError for an unknown name, or options that the method does not have.

    A method that lies over another (`dora`) takes that one's name as `over`, and its options with
    its own.
    """
    if method not in METHODS:
        raise LorafoldError(f"unknown method {method!r}; there are: {', '.join(METHODS)}")
    maker, default = METHODS[method], METHODS[method]()
    own = [field.name for field in fields(default)]  # type: ignore[arg-type]
    known: Sequence[str] = own
    if "over" in own and not isinstance(options.get("over"), Spec):
        name = options.pop("over", None)
        lower: Spec = make_spec(name) if name else default.over  # type: ignore[attr-defined]
        known = (*own, *lower.options())
        given = {option: options.pop(option) for option in lower.options() if option in options}
        options["over"] = type(lower)(**given) if name is None else make_spec(name, **given)
    if unknown := [option for option in options if option not in known]:
        raise LorafoldError(
            f"method {method} has no option {', '.join(unknown)}; it has:"
            f" {', '.join(known) or 'none'}"
        )
    try:
        return maker(**options)
    except TypeError as e:
        raise LorafoldError(f"method {method}: {e}") from None
