"""`lf.merge`: a plain model out of a base and its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.api.arguments import Paths, as_path, as_paths, missing
from lorafold.errors import LorafoldError
from lorafold.fold.rounding import Rounding
from lorafold.merging import run
from lorafold.opening import base_for
from lorafold.peft.saved import open_all

if TYPE_CHECKING:
    from rich.console import Console


def merge(
    model: str | Path | None = None,
    adapters: Paths = (),
    out: str | Path | None = None,
    *,
    into: str | None = None,
    storage: str = "auto",
    rounding: Rounding = "auto",
    seed: int = 0,
    certificate: bool = True,
    probe: str | Path | None = None,
    allow_other_base: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
    console: Console | None = None,
) -> run.Merged:
    """Fold saved adapters into their base and write a plain Hugging Face model, with a certificate
    of how far it is from base plus adapters. The directory appears whole or not at all.

    Args:
        model: The base, as `lf.load_model` takes it; None takes the one that the adapters say they
            were trained on.
        adapters: One saved adapter or several, folded in this order.
        out: The directory of the merged model.
        into: trained (the weights that the adapter was trained on, dequantized if they were
            quantized), original (the base's weights before quantization), nf4 or int8 (quantized
            again). None is trained.
        storage: How the base stored its weights in training; auto takes it from the records.
        rounding: nearest, stochastic, or auto: stochastic for the tensors whose update rounding to
            nearest would lose.
        seed: The seed of stochastic rounding.
        certificate: Compare the merged model with the adapted one, loaded one after the other.
        probe: A file of rows to compare on; None takes built-in texts.
        allow_other_base: Accept adapters whose fingerprint names another base.
        overwrite: Replace `out` if it exists.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        device: Where the certificate is computed; None takes the fastest that is available.
        console: A rich console for progress and notices; None is quiet.

    Raises LorafoldError, with nothing written, for a model, adapter, probe or `out` that can't be
    used, and NotMergeable with every reason for which the adapters can't be folded.
    """
    if out is None:
        raise missing("out")
    if not (found := open_all(as_paths(adapters))):
        raise LorafoldError("adapters: found no adapter, expected at least one to merge")
    base = base_for(
        model,
        found,
        console,
        storage=storage,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
    )
    wanted = run.Wanted(into, rounding, seed, certificate, probe, overwrite)
    return run.merge(base, found, as_path(out), wanted, console)
