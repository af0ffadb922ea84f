"""The model of a verb: a base with saved adapters, which are loaded, or a model that is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.adapter import load
from lorafold.api.arguments import Paths, as_paths, or_quiet
from lorafold.errors import LorafoldError
from lorafold.files.record import base_trained_on
from lorafold.machine.devices import choose_device
from lorafold.models.classifier import LANGUAGE_MODEL, REWARD_MODEL, kind_of, known_classes
from lorafold.models.loading import load_tokenizer
from lorafold.models.sources import ModelSource, resolved
from lorafold.models.storage import choose_storage, default_storage, weights_of
from lorafold.models.tokenizer import tokenizer_of
from lorafold.objectives.classify import Classify
from lorafold.objectives.objective import ModelRequest, Objective
from lorafold.objectives.reward import RewardModel
from lorafold.objectives.sft import Sft
from lorafold.step.preference_laws import Reward

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def opened(
    model: str | Path | ModelSource | PreTrainedModel,
    adapters: Paths = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    classify: bool = False,
    reward: bool = False,
    storage: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    console: Console | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in evaluation mode with saved adapters attached to it, and its tokenizer.

    Args:
        model: A name or path as `lf.load_model` takes it, what was found for one, or a loaded
            model. A loaded model keeps its storage, device and adapters, and what would choose
            others is refused.
        adapters: One directory or several, attached in this order as adapter1, adapter2 ...
        tokenizer: None takes that of the last adapter that has one, else the model's.
        classify: Expect a sequence classifier instead of a language model.
        reward: Expect a reward model instead of a language model.
        storage: fp32, bf16, nf4 or int8; auto takes the storage that the adapters were trained on
            if that was quantized or they are a reward model's, else bf16 or fp32, whichever the
            device is faster with.
        device: cpu, cuda, cuda:N or mps; None takes the fastest that is available.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        allow_other_base: Accept adapters whose fingerprint names another base.
        console: For notices; None is quiet.

    Raises LorafoldError as the loaders do, for arguments that a loaded model leaves without effect,
    and where a model of another kind is found than is expected: a language model, a classifier or
    a reward model.
    """
    paths, console = as_paths(adapters), or_quiet(console)
    if not isinstance(model, (str, Path, ModelSource)):
        given = {
            "adapters": bool(paths),
            "storage": storage != "auto",
            "device": device is not None,
            "revision": revision is not None,
            "allow_other_base": allow_other_base,
        }
        if any(given.values()):
            raise LorafoldError(
                f"{', '.join(name for name in given if given[name])}: expected none, because the"
                " model is loaded already; pass the model's name, or give storage, device and"
                " revision to lf.load_model, adapters and allow_other_base to lf.load"
            )
        tokenizer = tokenizer or load_tokenizer(str(model.name_or_path), None, trust_remote_code)
        return model, tokenizer if classify else prepared(tokenizer, Sft(), console)
    source = resolved(model, revision)
    tokenizer = tokenizer or tokenizer_of(source, paths, trust_remote_code)
    kind, classes = kind_of(source, paths), known_classes(source, paths)
    wanted = "a classifier" if classify else REWARD_MODEL if reward else LANGUAGE_MODEL
    if wanted != ("a classifier" if classes else kind):
        what = f"no {wanted.removeprefix('a ')}" if kind == LANGUAGE_MODEL else kind
        hint = "; lorafold score has the scores of rows" if kind == REWARD_MODEL else ""
        raise LorafoldError(
            f"{', '.join(map(str, paths)) or source.name}: found {what}, expected {wanted} for this"
            f" data or command{hint}"
        )
    objective: Objective = (
        RewardModel(Reward()) if reward else Sft() if classes is None else Classify(classes)
    )
    tokenizer = prepared(tokenizer, objective, console)
    where = choose_device(device)
    if storage == "auto":
        storage = default_storage(source, paths)
    if storage == "auto" and reward and (trained_on := base_trained_on(paths)) in ("fp32", "bf16"):
        storage = trained_on  # scores are compared, those of different devices too
    chosen = choose_storage(storage, where)
    console.print(f"{source.name} on {where}, {chosen.why}", highlight=False, markup=False)
    asked = ModelRequest(source, tokenizer, chosen, where, 0, trust_remote_code)
    loaded = objective.load(asked)
    for number, path in enumerate(paths, 1):
        load(
            loaded,
            path,
            name=f"adapter{number}",
            allow_other_base=allow_other_base,
            base=weights_of(source, chosen),
        )
    return loaded, tokenizer


def prepared(
    tokenizer: PreTrainedTokenizerBase, objective: Objective, console: Console
) -> PreTrainedTokenizerBase:
    """The tokenizer, after `Objective.set_up` added what it lacked.

    Args:
        tokenizer: Changed in place.
        objective: The objective that it must suit.
        console: For a notice of what was added.
    """
    if notice := objective.set_up(tokenizer):
        console.print(notice, highlight=False, markup=False)
    return tokenizer
