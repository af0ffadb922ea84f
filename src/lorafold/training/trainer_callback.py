"""A callback that saves and resumes an adapter under Hugging Face's `Trainer` or TRL's
`SFTTrainer`.

    OUTPUT_DIR/checkpoint-N/adapter/         the adapter in PEFT's format
    OUTPUT_DIR/checkpoint-N/adapter-state/   every tensor of the adapter as it is in memory
    OUTPUT_DIR/checkpoint-N/...              Trainer's files: optimizer, schedule, random numbers
    OUTPUT_DIR/adapter/                      the adapter at the end

The adapter's directories are written atomically, with a manifest that is checked on resume.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from lorafold.adapter import Adapter
from lorafold.adapter.reference import frozen_adapters
from lorafold.core.attach import base_state, selection_of
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError, join_problems, listed
from lorafold.files.atomic import atomic_directory, check_out, read_object, verify, write_json
from lorafold.layers.bitsandbytes import quiet_import
from lorafold.models.sources import name_of_base
from lorafold.models.weights import SINGLE_FILE, InMemory
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.peft.provenance import mismatch_message, same_adapters

with quiet_import():  # transformers imports PEFT here, which imports bitsandbytes
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

ADAPTER, STATE = "adapter", "adapter-state"
TENSORS, STATE_METADATA = "adapter.safetensors", "about.json"
TRAINER_STATE = "trainer_state.json"

logger = logging.getLogger(__name__)


class AdapterCallback(TrainerCallback):
    """Saves an adapter with every checkpoint of a `Trainer`, restores it when the run is resumed,
    and writes it at the end.

    A run that is killed and resumed from a complete checkpoint produces a byte-identical adapter.
    Trainer itself saves the optimizer, learning rates, random numbers and the position in the data.
    With `load_best_model_at_end`, the adapter of the best checkpoint is written at the end.

    Checkpoints usually do not contain the base. However, Trainer writes it into them if the model
    is not a `PreTrainedModel`, or with `save_strategy="best"`, because Trainer then decides to save
    after the callbacks ran. `trainer.save_model()` writes the base without the adapter. Trainer
    rejects a quantized base unless it has PEFT's adapters.

    Args:
        adapter: the adapter from `attach` or `load`, on the trainer's model.
        out: the directory for the adapter at the end (None: `OUTPUT_DIR/adapter`).
        overwrite: replace an `out` that another run wrote.
        resume_from: the checkpoint that is resumed, if it is not in the trainer's `output_dir`; the
            trainer does not pass it to callbacks.
        own_reference: the trainer (DPO, KTO, GRPO) has a correct reference that was not made by
            `lorafold.reference`.

    Before the first step, the callback raises LorafoldError if the adapter is not on the trainer's
    model, if TRL's reference lacks the adapters below this one, if other parameters are also
    trained (they would not be saved), if the method needs more than a trainer's steps (a selection
    before the first step, rank pruning, a penalty, training of the base), or if the checkpoint to
    resume has no adapter, a damaged adapter or another one.
    """

    def __init__(
        self,
        adapter: Adapter,
        out: str | Path | None = None,
        *,
        overwrite: bool = False,
        resume_from: str | Path | None = None,
        own_reference: bool = False,
    ) -> None:
        if not isinstance(adapter, Adapter):
            raise LorafoldError(
                f"AdapterCallback: found {type(adapter).__name__}, expected the adapter that"
                " lorafold.attach or lorafold.load returned"
            )
        _check_no_hooks(adapter)
        self.adapter, self.out, self.overwrite = adapter, out, overwrite
        self.resume_from, self.own_reference = resume_from, own_reference
        self._saved_step = -1
        self._base: BaseWeightsExcluder | None = None

    @staticmethod
    def last_checkpoint(output_dir: str | Path) -> str | None:
        """The newest checkpoint that both the trainer and this callback completed, for
        `resume_from_checkpoint`; None (a fresh start) if there is none.

        Trainer's own choice (`True`) may be a checkpoint that was half-written when the run was
        killed.
        """
        steps = {
            int(number): path
            for path in Path(output_dir).glob("checkpoint-*")
            if (number := path.name.removeprefix("checkpoint-")).isdigit() and _is_complete(path)
        }
        return str(steps[max(steps)]) if steps else None

    def on_init_end(self, *_: Any, **kwargs: Any) -> None:
        self._check_model(kwargs["model"])
        # a resumed run loads the empty weights before it begins
        self._base = BaseWeightsExcluder(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_hyper_param_search:
            raise LorafoldError("AdapterCallback: hyperparameter search is not supported")
        self._check_model(kwargs["model"])
        if not self.own_reference:
            check_reference(self.adapter, args)
        self._base = self._base or BaseWeightsExcluder(kwargs["model"])
        resumed = state.global_step > 0
        if args.should_save:
            check_out(self._out(args), self.overwrite or resumed)
        if resumed:
            self._restore(self._checkpoint(args, state))

    def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
        self._exclude_base(False)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the adapter before the trainer writes its files and removes older checkpoints."""
        if control.should_save:
            # only for as long as needed, because an evaluation may be interrupted
            self._exclude_base(not control.should_evaluate)
            self._save(args, state)

    on_epoch_end = on_step_end

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._exclude_base(control.should_save)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._exclude_base(False)
        self._save(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._base is not None:
            self._base.end()
            self._base = None
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._restore(Path(state.best_model_checkpoint))
        if args.should_save:
            self.adapter.save(self._out(args), overwrite=True)

    def _out(self, args: TrainingArguments) -> Path:
        return Path(self.out) if self.out is not None else Path(str(args.output_dir)) / ADAPTER

    def _exclude_base(self, excluded: bool) -> None:
        if self._base is not None:
            self._base.set_excluded(excluded)

    def _save(self, args: TrainingArguments, state: TrainerState) -> None:
        if not args.should_save or self._saved_step == state.global_step:
            return
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        self.adapter.save(checkpoint / ADAPTER, overwrite=True)
        with atomic_directory(checkpoint / STATE, overwrite=True) as tmp:
            tensors = self.adapter.state_dict()
            save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, tmp / TENSORS)
            about = {"spec": repr(self.adapter.spec), "step": state.global_step}
            write_json(tmp / STATE_METADATA, about)
        write_empty_weights(checkpoint)
        self._saved_step = state.global_step

    def _check_model(self, model: nn.Module) -> None:
        name, trained = self.adapter.name, {id(p) for p in self.adapter.parameters()}
        parameters = list(model.named_parameters())
        if not trained or not trained <= {id(p) for _, p in parameters}:
            raise LorafoldError(
                f"AdapterCallback: the adapter {name!r} is not attached to the trainer's model;"
                " attach it to the model that you pass to the trainer, and do not detach it"
            )
        if others := [n for n, p in parameters if p.requires_grad and id(p) not in trained]:
            raise LorafoldError(
                f"AdapterCallback saves only the adapter {name!r}, but {len(others)} other"
                f" parameters of the model are trainable: {listed(others)}; freeze them (another"
                " adapter with requires_grad_(False)), or add them to this adapter"
                " (modules_to_save)"
            )

    def _checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        expected = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        path = expected if self.resume_from is None else Path(self.resume_from)
        try:
            saved_state = TrainerState.load_from_json(str(path / TRAINER_STATE))
        except (OSError, ValueError, TypeError):
            saved_state = None
        names = ("global_step", "epoch", "total_flos", "log_history")
        if saved_state is None or any(getattr(saved_state, n) != getattr(state, n) for n in names):
            raise LorafoldError(
                f"AdapterCallback: the trainer resumed another checkpoint than {path}; pass the"
                " resumed one: AdapterCallback(adapter, resume_from=...)"
            )
        return path

    def _restore(self, checkpoint: Path) -> None:
        """Loads a checkpoint's tensors in place, because the optimizer refers to them."""
        for part in (ADAPTER, STATE):
            if problems := verify(checkpoint / part):
                complete = self.last_checkpoint(checkpoint.parent)
                last = f"the last complete checkpoint is {complete}" * bool(complete)
                raise LorafoldError(
                    f"{checkpoint / part}: the adapter can't be resumed:"
                    f" {join_problems(problems)}; {last or 'there is no complete checkpoint'}"
                )
        saved = SavedAdapter.open(checkpoint / ADAPTER)
        model = self.adapter.model
        problems = saved.own_base.problems(InMemory.of_model(model), name_of_base(model))
        if not same_adapters(saved.over, self.adapter.over):
            problems.append(mismatch_message(saved.over, self.adapter.over))
        metadata, spec = read_object(checkpoint / STATE / STATE_METADATA), repr(self.adapter.spec)
        if metadata.get("spec") != spec:
            problems.append(f"found {metadata.get('spec')}, expected {spec}")
        tensors, stored = self.adapter.state_dict(), load_file(checkpoint / STATE / TENSORS)
        problems += [
            f"{key}: found shape {list(stored[key].shape)}, expected {list(tensor.shape)}"
            for key, tensor in tensors.items()
            if key in stored and stored[key].shape != tensor.shape
        ]
        if problems:
            listing = join_problems(problems)
            raise LorafoldError(f"{checkpoint / STATE}: not a state of this adapter: {listing}")
        self.adapter.load_state_dict(stored)
        logger.info(f"The adapter was restored from {checkpoint}.")


def _check_no_hooks(adapter: Adapter) -> None:
    """Raises if the method has hooks that only lorafold's own loop calls."""
    spec, name = adapter.spec, type(adapter.spec).__name__
    if spec.trains_base:
        raise LorafoldError(
            f"AdapterCallback: {name} trains the base's own weights, which the trainer saves in its"
            " checkpoints; remove the callback"
        )
    inner = spec
    while isinstance(over := getattr(inner, "over", None), Spec):
        inner = over
    effects = {
        "prepare": "computes before the first step",
        "after_step": "computes after each step",
        "penalty": "adds a penalty to the loss",
    }
    hooks = [effects[h] for h in effects if getattr(type(inner), h) is not getattr(Spec, h)]
    if hooks:
        raise LorafoldError(
            f"AdapterCallback: {name} {' and '.join(hooks)}, which a trainer does not do; train it"
            " with lorafold's own loop (lorafold train)"
        )


def _is_complete(checkpoint: Path) -> bool:
    with suppress(OSError, ValueError):
        json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
        return not any(verify(checkpoint / part) for part in (ADAPTER, STATE))
    return False


def check_reference(adapter: Adapter, args: Any) -> None:
    """Raises if TRL's reference lacks adapters; logs a warning if it loads the base a second time.

        DPOTrainer(model, lf.reference(model), ...)     the model with the adapters below
        DPOTrainer(model, ...)                          a second model, by its name: only the base

    Callbacks see only the trainer's configuration and whether `lf.reference` was called.
    """
    has_reference = hasattr(args, "sync_ref_model") and getattr(args, "beta", 1.0) != 0
    if not has_reference or getattr(args, "precompute_ref_log_probs", False):
        return  # a precomputed reference is the model at the start
    base_adapters = frozen_adapters(adapter.model)
    if selection_of(adapter.model).reference_names == base_adapters:
        return
    config, call = type(args).__name__, "lorafold.reference(model)"
    fix = f"ref_model={call} (or set trainer.ref_model = {call} if it has no such argument)"
    if base_adapters:
        raise LorafoldError(
            f"AdapterCallback: {config}: found the bare base as reference, which TRL loads by name,"
            f" expected the model with {', '.join(base_adapters)}, on top of which {adapter.name!r}"
            f" trains; pass {fix}, or own_reference=True if your reference model is right"
        )
    logger.warning(f"{config}: TRL loads the base again as reference; to save memory, pass {fix}")


class BaseWeightsExcluder:
    """Makes `save_pretrained` omit the model's own weights while they are excluded, by listing them
    in `_keys_to_ignore_on_save`. Until `end`, a state dict without tensors can be loaded without a
    warning, because on resume Trainer loads the empty `model.safetensors`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.ignored_keys: Any = getattr(model, "_keys_to_ignore_on_save", None)
        self.handle = model.register_load_state_dict_post_hook(self._clear_missing_keys)

    def set_excluded(self, excluded: bool) -> None:
        if hasattr(self.model, "_keys_to_ignore_on_save"):
            keys: Any = set(self.model.state_dict()) if excluded else self.ignored_keys
            self.model._keys_to_ignore_on_save = keys

    def end(self) -> None:
        self.set_excluded(False)
        self.handle.remove()

    @staticmethod
    def _clear_missing_keys(model: nn.Module, incompatible: Any) -> None:
        if set(incompatible.missing_keys) == set(base_state(model)):
            incompatible.missing_keys.clear()


def write_empty_weights(checkpoint: Path) -> None:
    """Writes a `model.safetensors` without tensors, which Trainer loads on resume, unless the file
    exists.
    """
    path, partial = checkpoint / SINGLE_FILE, checkpoint / f".{SINGLE_FILE}.partial"
    if not path.exists():
        save_file({}, partial, metadata={"format": "pt"})
        partial.replace(path)
