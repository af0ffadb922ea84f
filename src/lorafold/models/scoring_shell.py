"""A language model's second shell as a reward model: the same decoder, under a head for one score.

    shell = scoring_shell(model, pad_id)        the model's tensors, and a head (1, d) of zeros

Its class is the one that transformers has for sequence classification, as `load_reward_model` makes
it, and its modules are its own, so that adapters of the one are not those of the other. Use it
where a language model is in memory already and a reward adapter of the same base has to score.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorafold.core.anatomy import decoder_of
from lorafold.core.attach import adapted_modules, lift
from lorafold.core.twin import twin
from lorafold.errors import LorafoldError
from lorafold.files.card import REWARD
from lorafold.models.classifier import head_paths, widen_heads
from lorafold.models.load_errors import loading
from lorafold.models.sources import known, remember


def scoring_shell(model: Any, pad_id: int) -> Any:
    """A sequence classifier with one output over the model's own tensors, without its adapters, in
    evaluation mode.

    Raises LorafoldError if transformers has no classifier around this decoder, or if an adapter of
    the model trains the base's own weights.

    Args:
        model: A language model, which stays as it is.
        pad_id: The token that fills short texts, at the right.
    """
    of_base = twin(model)
    for path, module in [*adapted_modules(of_base)]:
        deltas: Any = module.deltas.values()
        if any(part.in_place for delta in deltas for part in delta.parts()):
            raise LorafoldError(
                f"{path}: found base weights that are themselves trained, expected a method that"
                " leaves the base as it is: a reward adapter lies over the base's own weights"
            )
        for name in [*module.deltas]:
            lift(module, name)
    source, config = known(model), of_base.config
    config.num_labels, config.problem_type = 1, "regression"
    config.id2label, config.label2id = {0: REWARD}, {REWARD: 0}
    text = config.get_text_config()
    text.pad_token_id, text.use_cache = pad_id, False
    what = f"reward model over {type(model).__name__}"
    with loading(what), torch.device("meta"):
        from transformers import AutoModelForSequenceClassification

        shell = AutoModelForSequenceClassification.from_config(
            config, dtype=model.dtype,
            trust_remote_code=source is not None and source.trust_remote_code,
        )  # fmt: skip
    place, body = decoder_of(shell)
    own = decoder_of(of_base)[1]
    heads = head_paths(shell)
    parent, _, name = place.rpartition(".")
    if type(body) is type(own):
        setattr(shell.get_submodule(parent), name, own)
    for path in heads:
        _zeroed(shell.get_submodule(path), model.device)
    if lacking := [n for n, p in shell.named_parameters() if p.is_meta]:
        raise LorafoldError(
            f"{what}: found {', '.join(lacking[:3])} in {type(shell).__name__}, which the language"
            " model does not have; expected the same decoder"
        )
    shell.config = config
    shell.requires_grad_(False)
    widen_heads(shell)
    if source is not None:
        remember(shell, source)
    return shell.eval()


def _zeroed(head: nn.Module, device: torch.device) -> None:
    """Give a head without values zeros, which an adapter replaces."""
    for name, p in [*head.named_parameters(recurse=False)]:
        setattr(head, name, nn.Parameter(torch.zeros_like(p, device=device)))
