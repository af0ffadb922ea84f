"""The methods: one a file, one table from the command's word to a spec that can be built without
arguments.
"""

from collections.abc import Callable, Sequence
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
