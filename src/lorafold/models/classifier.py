"""Sequence classifiers and reward models: the body of a base with a head for classes or one score.

    logits = head(h at the last token)          (classes,); some architectures pool the hidden
                                                states in another way

A head or pooler that the files lack is initialized from a seed, trained in full and saved with the
adapter. The head computes in fp32, because a bf16 score has only 8 significant bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorafold.core.anatomy import Anatomy, beneath
from lorafold.core.attach import adapted_modules, detach_delta
from lorafold.core.shared_tensors import twin
from lorafold.errors import LorafoldError
from lorafold.files.model_card import REWARD
from lorafold.models.load_errors import check_complete, loading
from lorafold.models.loading import read_weights
from lorafold.models.quantizations import Storage
from lorafold.models.sources import ModelSource, remember_source, source_of
from lorafold.models.weights import FileWeights, Weights, model_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POOLER = "pooler"  # transformers' name for the part of a body that only the head reads


def load_classifier(
    source: ModelSource,
    classes: Sequence[str],
    pad_id: int,
    storage: Storage | torch.dtype,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
) -> PreTrainedModel:
    """Loads a classifier in evaluation mode; with one class, it is a reward model. `pad_id` is the
    id of the padding token, and `seed` initializes a head that the files lack.
    """
    with loading(f"model {source.name}"):
        from transformers import AutoModelForSequenceClassification

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            names, ids = dict(enumerate(classes)), {name: i for i, name in enumerate(classes)}
            config = {"id2label": names, "label2id": ids}
            if len(classes) == 1:
                config["problem_type"] = "regression"
            auto = AutoModelForSequenceClassification
            model, report = read_weights(auto, source, storage, device, **config)
        # a decoder uses it to find the last token
        model.config.get_text_config().pad_token_id = pad_id
        # each text takes a single forward pass, so a cache would never be used
        model.config.get_text_config().use_cache = False
    missing = sorted(report["missing_keys"])
    model.new_poolers = _poolers(missing)
    heads = tuple(f"{path}." for path in head_paths(model))
    new = [name for name in missing if name.startswith(heads)]
    lacking = [name for name in missing if name not in new]
    check_complete(f"model {source.name}", lacking, report["mismatched_keys"])
    model.new_heads = tuple(sorted({name.rpartition(".")[0] for name in new}))
    widen_heads(model, None if new else FileWeights(model_files(source.path)))
    return model


def head_paths(model: nn.Module) -> tuple[str, ...]:
    """The paths of the head's modules: modules with parameters outside the body and the encoders,
    and new poolers.
    """
    anatomy = Anatomy.of(model)
    body = anatomy.decoder
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        body = str(model.base_model_prefix)  # includes the encoder
    inside = beneath([body, *anatomy.encoders_and_connectors])
    heads = tuple(
        p
        for p, m in anatomy.modules
        if any(p is not None for p in m._parameters.values())
        and (not inside(p) or p in new_poolers(model))
    )
    if not body or not heads:
        raise LorafoldError(
            f"{type(model).__name__}: found no classification head, expected a classifier"
        )
    return heads


def new_heads(model: nn.Module) -> tuple[str, ...]:
    """The paths of head modules that the files lack; their values depend on the body's dtype."""
    return model.__dict__.get("new_heads", ())


def new_poolers(model: nn.Module) -> tuple[str, ...]:
    """The paths of pooler modules that the files lack."""
    return model.__dict__.get("new_poolers", ())


def expect_poolers(model: Any) -> None:
    """Marks a classifier's poolers as new if the class in its configuration has no pooler."""
    import transformers as tf

    poolers = _poolers(name for name, _ in model.named_parameters())
    cls = getattr(tf, next(iter(model.config.architectures or ()), ""), None)
    if not poolers or cls is None:
        return
    with torch.device("meta"):
        stored = cls._from_config(model.config)
    if not _poolers(name for name, _ in stored.named_parameters()):
        model.new_poolers = poolers


def _poolers(names: Iterable[str]) -> tuple[str, ...]:
    paths = {name.rpartition(".")[0] for name in names}
    return tuple(sorted(path for path in paths if POOLER in path.split(".")))


def widen_heads(model: nn.Module, files: Weights | None = None) -> None:
    """Converts 16-bit heads and their inputs to fp32. `files` contain the unrounded values of heads
    that are not new.
    """
    for path in head_paths(model):
        head = model.get_submodule(path)
        own = list(head.named_parameters(recurse=False))
        if not any(p.dtype in (torch.bfloat16, torch.float16) for _, p in own):
            continue
        for name, p in own:
            named = files.find(f"{path}.{name}") if files else None
            value = files.get(named).to(p.device) if files and named else p.detach()
            setattr(head, name, nn.Parameter(value.to(torch.float32, copy=True), p.requires_grad))
        head.register_forward_pre_hook(_inputs_to_fp32)


def _inputs_to_fp32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) else x for x in args)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the tokenizer's padding token, or of its end-of-sequence token if it has none."""
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if token is None:
        raise LorafoldError(
            "tokenizer: found neither a padding nor an end-of-sequence token, expected one of them"
            " to pad the texts of a batch"
        )
    return int(token)


def classifier_outputs(source: ModelSource) -> tuple[str, ...] | None:
    """The class names of a model that already has a classification head, or None."""
    config = source.config()
    names = config.get("architectures") or ()
    if not any(name.endswith("ForSequenceClassification") for name in names):
        return None
    # transformers does not write its default to the file
    labels = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(labels[key] for key in sorted(labels, key=int))


def reward_model_on(model: Any, pad_id: int) -> Any:
    """A reward model that shares the decoder of a loaded language model and has a head (1, d) of
    zeros.
    """
    of_base = twin(model)
    for path, module in [*adapted_modules(of_base)]:
        deltas: Any = module.deltas.values()
        if any(part.in_place for delta in deltas for part in delta.parts()):
            raise LorafoldError(
                f"{path}: the adapter trains the base weights themselves, but a reward adapter"
                " needs the unchanged base; use a method that freezes the base"
            )
        for name in [*module.deltas]:
            detach_delta(module, name)
    source, config = source_of(model), of_base.config
    config.num_labels, config.problem_type = 1, "regression"
    config.id2label, config.label2id = {0: REWARD}, {REWARD: 0}
    text = config.get_text_config()
    text.pad_token_id, text.use_cache = pad_id, False
    what = f"reward model on {type(model).__name__}"
    with loading(what), torch.device("meta"):
        from transformers import AutoModelForSequenceClassification

        shell = AutoModelForSequenceClassification.from_config(
            config, dtype=model.dtype,
            trust_remote_code=source is not None and source.trust_remote_code,
        )  # fmt: skip
    place = Anatomy.of(shell).decoder
    body = shell.get_submodule(place)
    own = of_base.get_submodule(Anatomy.of(of_base).decoder)
    heads = head_paths(shell)
    parent, _, name = place.rpartition(".")
    if type(body) is type(own):
        setattr(shell.get_submodule(parent), name, own)
    for path in heads:
        head = shell.get_submodule(path)
        for leaf, p in [*head.named_parameters(recurse=False)]:  # an adapter replaces the zeros
            setattr(head, leaf, nn.Parameter(torch.zeros_like(p, device=model.device)))
    if lacking := [n for n, p in shell.named_parameters() if p.is_meta]:
        raise LorafoldError(
            f"{what}: {type(shell).__name__} has {', '.join(lacking[:3])}, which the language"
            " model does not have; expected the same decoder"
        )
    shell.config = config
    shell.requires_grad_(False)
    widen_heads(shell)
    if source is not None:
        remember_source(shell, source)
    return shell.eval()
