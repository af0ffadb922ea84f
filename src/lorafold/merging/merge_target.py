"""The weights to merge an adapter into, if its base was quantized in training. q quantizes W and
dequantizes it again.

    trained         q(W) + dW           the weights that the adapter was trained on, in 16 bits
    original        W + dW              the weights before quantization
    nf4, int8       q(W + dW)           quantized again: small, but rounded once more

nf4 and int8 start from the original weights, because quantizing q(W) again would round away every
change of less than half a level (an adapter with 99% exact match fell to 0%). A model with
quantized files has no original weights; its own, dequantized, are the only target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lorafold.core.matrices import Matrices, module_at
from lorafold.errors import LorafoldError, listed
from lorafold.files.templates import render_text
from lorafold.models.quantizations import MADE, PLAIN
from lorafold.models.quantize_on_load import packable
from lorafold.peft.adapter_directory import SavedAdapter, trained_on
from lorafold.peft.provenance import TrainedOn

TARGETS = ("trained", "original", *MADE)
ALIAS = {"dequantized": "trained"}


@dataclass(frozen=True)
class Distance:
    """KL in nats per token between two models, and the fraction of equal top-1 tokens."""

    kl: float
    same: float

    def __str__(self) -> str:
        return f"KL {self.kl:.1e} nats per token, same top-1 token {self.same:.1%}"


@dataclass(frozen=True)
class Into:
    """The target of a merge.

    trained_on: The quantization of the base in training, or None. in_files: The base's files are
    quantized. asked: The storage named by the user. recorded: Other storages in the adapters'
    records.
    """

    target: str
    trained_on: str | None
    in_files: bool = False
    asked: str | None = None
    recorded: tuple[str, ...] = ()
    base: TrainedOn | None = None

    @property
    def round_trip(self) -> str | None:
        """The quantization to which W is quantized and back before adapters are merged."""
        return self.trained_on if (self.target == "trained" and not self.in_files) else None

    @property
    def stored(self) -> str:
        """The storage of the base in training, fp32 if unknown."""
        known = self.base.storage if self.base else "fp32"
        return self.trained_on or (known if known in PLAIN else "fp32")

    @property
    def unmade(self) -> str:
        """The storage in training, if it is a quantization that lorafold does not make."""
        known = "" if self.base is None or self.in_files else self.base.storage
        return "" if known in ("", "auto", "float16", *PLAIN, *MADE) else known

    @property
    def quantized(self) -> str | None:
        """The quantization of the merged model."""
        return self.target if self.target in MADE else None

    def compared(self, name: str, here: str, file: Distance | None, other: Distance | None) -> str:
        """A sentence on the base in training, and the distances from files and original weights."""
        return render_text(
            "merging/distances.jinja", into=self, name=name, here=here, file=file, other=other
        )

    def __str__(self) -> str:
        return render_text("merging/target.jinja", into=self)


def choose_into(
    asked: str | None,
    adapters: Sequence[SavedAdapter],
    base: str = "auto",
    in_files: str | None = None,
) -> Into:
    """The requested target, else trained for a quantized base, else original."""
    known = trained_on(adapters) if base == "auto" else TrainedOn(base)
    given, asked = asked, ALIAS.get(asked or "", asked)
    storage = known.storage if known else "auto"
    if in_files is not None:
        if base not in ("auto", in_files):
            raise LorafoldError(
                f"storage {base}: the model's files are stored as {in_files}; expected {in_files}"
            )
        if asked not in (None, "trained"):
            lost = ", in which the update would be rounded away" * (asked == in_files)
            raise LorafoldError(
                f"into {asked}: the model's files have {in_files} weights{lost}, and no original"
                " weights; merge into trained, or pass the unquantized model as --model"
            )
        return Into("trained", in_files, in_files=True, base=known)
    made_on = storage if storage in MADE else None
    if asked is not None and asked not in TARGETS:
        raise LorafoldError(f"into: found {asked}, expected one of {', '.join(TARGETS)}")
    if asked == "trained" and storage == "auto":
        raise LorafoldError(
            f"into {given}: the adapters do not record how their base was quantized; merge into"
            f" original, or set --storage to one of {', '.join((*MADE, *PLAIN))}"
        )
    if asked == "trained" and storage not in (*PLAIN, *MADE, "float16"):
        raise LorafoldError(
            f"into {given}: the adapter was trained on {storage} weights, which these files do not"
            " have and lorafold can't make; merge into original, or pass as --model a model whose"
            f" files are stored as {storage}"
        )
    records = [one.own_base.trained_on for one in adapters]
    recorded = sorted({one.storage for one in records if one} - {"auto", storage})
    target = asked or "trained"
    if target == "trained" and made_on is None:
        target = "original"  # the same weights
    named_storage = None if base == "auto" else base
    return Into(target, made_on, asked=named_storage, recorded=tuple(recorded), base=known)


def check_saved(model: nn.Module, quantization: str) -> None:
    """Raise LorafoldError for quantized experts, which transformers can't save."""
    experts = [
        path
        for path in packable(model)  # type: ignore[arg-type]
        if isinstance(module_at(model, path), Matrices)
    ]
    if experts:
        raise LorafoldError(
            f"into {quantization}: found experts ({listed(experts)}), which"
            f" transformers can't save as {quantization}; merge into original or"
            f" trained weights and load the result with --storage {quantization}"
        )
