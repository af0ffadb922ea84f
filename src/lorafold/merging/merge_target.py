"""The weights that an adapter is merged into if its base was quantized in training. q quantizes W
and dequantizes it again.

    trained         q(W) + dW           the weights that the adapter was trained on, in 16 bits
    original        W + dW              the weights before quantization
    nf4, int8       q(W + dW)           quantized again: small, but rounded once more

nf4 and int8 start from the original weights, because quantizing q(W) again would round away every
change of less than half a level (an adapter with 99% exact match fell to 0%). If the model's files
are quantized, there are no original weights, so the dequantized weights are the only target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lorafold.core.expert_matrices import Matrices, module_at
from lorafold.errors import LorafoldError, listed
from lorafold.files.templates import render_text
from lorafold.models.quantizations import ON_LOAD, UNQUANTIZED
from lorafold.models.quantize_on_load import quantizable_paths
from lorafold.peft.adapter_directory import SavedAdapter, training_storage_of
from lorafold.peft.provenance import TrainingStorage

TARGETS = ("trained", "original", *ON_LOAD)
ALIASES = {"dequantized": "trained"}


@dataclass(frozen=True)
class Distance:
    """KL in nats per token between two models, and the fraction of equal top-1 tokens."""

    kl: float
    same: float

    def __str__(self) -> str:
        return f"KL {self.kl:.1e} nats per token, same top-1 token {self.same:.1%}"


@dataclass(frozen=True)
class MergeTarget:
    """The target of a merge.

    trained_on: The quantization of the base in training, or None.
    prequantized: Whether the base's files are quantized.
    requested_storage: The quantization or dtype that the user named.
    recorded_storages: Other quantizations or dtypes in the adapters' records.
    base: The quantization or dtype of the base in training, if known.
    """

    target: str
    trained_on: str | None
    prequantized: bool = False
    requested_storage: str | None = None
    recorded_storages: tuple[str, ...] = ()
    base: TrainingStorage | None = None

    @property
    def round_trip(self) -> str | None:
        """The quantization q if W is replaced by q(W) before adapters are merged, or None."""
        return self.trained_on if (self.target == "trained" and not self.prequantized) else None

    @property
    def training_storage(self) -> str:
        """The quantization or dtype of the base in training; fp32 if unknown."""
        known = self.base.storage if self.base else "fp32"
        return self.trained_on or (known if known in UNQUANTIZED else "fp32")

    @property
    def unsupported_storage(self) -> str:
        """The quantization of the base in training if lorafold can't produce it, or ""."""
        known = "" if self.base is None or self.prequantized else self.base.storage
        return "" if known in ("", "auto", "float16", *UNQUANTIZED, *ON_LOAD) else known

    @property
    def quantized(self) -> str | None:
        return self.target if self.target in ON_LOAD else None

    def describe_distances(
        self, base: str, files: str, distance: Distance | None, from_original: Distance | None
    ) -> str:
        """Text on the base in training, and on the distances of the files and of the original
        weights from the trained model.
        """
        values = {"base": base, "files": files, "distance": distance, "original": from_original}
        return render_text("merging/distances.jinja", into=self, **values)

    def __str__(self) -> str:
        return render_text("merging/target.jinja", into=self)


def choose_merge_target(
    requested: str | None, adapters: Sequence[SavedAdapter], base: str, in_files: str | None
) -> MergeTarget:
    """The requested target; by default, `trained` after quantized training, otherwise `original`.
    """
    known = training_storage_of(adapters) if base == "auto" else TrainingStorage(base)
    target = ALIASES.get(requested or "", requested)
    storage = known.storage if known else "auto"
    if in_files is not None:
        if base not in ("auto", in_files):
            raise LorafoldError(
                f"storage {base}: the model's files are stored as {in_files}; expected {in_files}"
            )
        if target not in (None, "trained"):
            lost = ", in which the update would be rounded away" * (target == in_files)
            raise LorafoldError(
                f"into {target}: the model's files have {in_files} weights{lost}, and no"
                " original weights; merge into trained, or pass the unquantized model as --model"
            )
        return MergeTarget("trained", in_files, prequantized=True, base=known)
    trained_on = storage if storage in ON_LOAD else None
    if target is not None and target not in TARGETS:
        raise LorafoldError(f"into: found {target}, expected one of {', '.join(TARGETS)}")
    if target == "trained" and storage == "auto":
        raise LorafoldError(
            f"into {requested}: the adapters do not record how their base was quantized; merge into"
            f" original, or set --quantization to one of {', '.join((*ON_LOAD, *UNQUANTIZED))}"
        )
    if target == "trained" and storage not in (*UNQUANTIZED, *ON_LOAD, "float16"):
        raise LorafoldError(
            f"into {requested}: the adapter was trained on {storage} weights, but the model's files"
            " do not have them, and lorafold can't quantize to them; merge into original, or pass"
            f" as --model a model whose files are stored as {storage}"
        )
    records = [one.own_base.trained_on for one in adapters]
    recorded = sorted({one.storage for one in records if one} - {"auto", storage})
    target = target or "trained"
    if target == "trained" and trained_on is None:
        target = "original"  # the same weights
    named = None if base == "auto" else base
    return MergeTarget(target, trained_on, False, named, tuple(recorded), known)


def check_savable(model: nn.Module, quantization: str) -> None:
    """Checks that no experts would be quantized, because transformers can't save them."""
    if experts := [
        path
        for path in quantizable_paths(model)  # type: ignore[arg-type]
        if isinstance(module_at(model, path), Matrices)
    ]:
        raise LorafoldError(
            f"into {quantization}: found experts ({listed(experts)}), which"
            f" transformers can't save as {quantization}; merge into original or"
            f" trained weights and load the result with --quantization {quantization}"
        )
