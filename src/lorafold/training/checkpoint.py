"""Checkpoints in safetensors and JSON, from which a run resumes exactly.

    RUN/step-000020/{adapter,optimizer}.safetensors, state.json     RUN is `<out>.run`

The order of the rows depends only on the seed, so the step determines the next rows.
"""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor

from lorafold.errors import LorafoldError, changes, join_problems, listed
from lorafold.files.atomic import (
    MANIFEST,
    atomic_directory,
    check_intact,
    check_out,
    clear_leftovers,
    read_object,
    remove,
    verify,
)
from lorafold.models.weights import PendingTensor, write_tensors
from lorafold.training_step.policy_loss import StepRollouts

EARLY_STOPPING_PATIENCE = 3  # evaluations in a row without improvement
GRADIENT = "gradient norm"  # the metric of a step, before clipping
RATE = "learning rate"  # the metric of a step, for the first parameter group
HOLDER = "process "  # start of the lock file's text
FILES = "files"  # in a run's identity: the files that it reads, each by `name` and `sha256`


RNG = "rng."  # start of the names of the states of random generators


def restore_rng(states: Mapping[str, Tensor]) -> None:
    """Restores the states of torch's random generators, each (bytes,)."""
    torch.set_rng_state(states[f"{RNG}cpu"])
    for i in range(torch.cuda.device_count()):
        if (state := states.get(f"{RNG}cuda.{i}")) is not None:
            torch.cuda.set_rng_state(state, i)


@dataclass
class Progress:
    """The progress of a run. Losses are means in nats over labelled tokens, one per step. `seconds`
    and `tokens` exclude evaluations. An evaluation before the first step has step 0.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    evals: dict[int, float] = field(default_factory=dict)  # step -> held-out loss
    shown: dict[str, list[float | None]] = field(default_factory=dict)  # metrics of each step
    measured: dict[int, dict[str, Any]] = field(default_factory=dict)  # step -> held-out metrics
    samples: dict[str, dict[str, Any]] = field(default_factory=dict)  # the first and the last
    tokens: int = 0
    seconds: float = 0.0
    # tokens, seconds and rates of sampling, rewards and training
    pace: dict[str, float] = field(default_factory=dict)
    # the loss compared with guessing, after the last step or the best one
    guessing: dict[str, Any] = field(default_factory=dict)
    # the optimizer of the saved state: after a resume, `auto` might choose another one
    optimizer: str = ""
    counts: dict[str, float] = field(default_factory=dict)  # `Loss.counts`
    skipped: list[int] = field(default_factory=list)  # steps without an update
    quiet: int = 0  # consecutive steps without a learning signal, up to now
    warned: list[str] = field(default_factory=list)  # kinds of observations that were printed

    @property
    def best(self) -> int | None:
        """The step with the lowest held-out loss, the earliest if several are equal, or None."""
        steps = self.evals.keys() - {0}
        return min(steps, key=lambda s: (self.evals[s], s)) if steps else None

    @property
    def stalled(self) -> bool:
        return sum(step > (self.best or 0) for step in self.evals) >= EARLY_STOPPING_PATIENCE

    def add_figures(self, figures: Mapping[str, float]) -> None:
        """Adds the metrics of the last step; a missing or non-finite metric becomes None."""
        for name in {**self.shown, **figures}:
            values = self.shown.setdefault(name, [])
            values += [None] * (self.step - 1 - len(values))  # a new metric
            value = figures.get(name)
            values.append(value if value is not None and math.isfinite(value) else None)

    def add_rollouts(
        self, rollouts: StepRollouts, tokens: int, seconds: float, with_samples: bool
    ) -> dict[str, float]:
        """Adds a step's tokens and seconds of sampling and training, and its samples if
        `with_samples`. Returns the rates of all steps so far, in tokens per second.
        """
        self.quiet = self.quiet + 1 if rollouts.no_signal_reason else 0
        times = {f"{name} seconds": s for name, s in rollouts.seconds.items()}
        times["learning seconds"] = seconds - sum(rollouts.seconds.values())
        counts = {"drawn tokens": rollouts.tokens, "learned tokens": tokens}
        for name, value in (counts | times).items():
            self.pace[name] = self.pace.get(name, 0) + value
        if with_samples:
            self.add_samples(rollouts.samples)
        units = {"drawn tokens": "drawing seconds", "learned tokens": "learning seconds"}
        rates = {f"{n}/s": self.pace[n] / max(self.pace[s], 1e-9) for n, s in units.items()}
        self.pace |= rates
        return rates

    def add_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        if samples:
            entry = {"step": self.step, "samples": [*samples]}
            self.samples = {"first": entry, **self.samples, "last": entry}


class RunDirectory:
    """The directory `<out>.run` with the checkpoints of one run, and its recipe, model and data."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out.with_name(out.name + ".run")
        # the adapter with the lowest held-out loss, unless it is the last one
        self.best = out.with_name(out.name + ".best")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Context in which no other run can use this directory. The system releases the lock of a
        killed process.
        """
        check_out(self.out, overwrite=True)
        target = self.path.expanduser().resolve()
        new_folders = [folder for folder in target.parents if not folder.exists()]
        file = target.with_name(f".{target.name}.lock")
        target.parent.mkdir(parents=True, exist_ok=True)
        lock, holder = FileLock(str(file), timeout=0), ""
        try:
            lock.acquire()
        except Timeout:
            with suppress(OSError):
                holder = file.read_text()
            holder = f" ({holder})" if holder.startswith(HOLDER) else ""
            raise LorafoldError(
                f"{self.path}: a run is in progress in this directory{holder}; wait until it ends,"
                " stop it, or choose another --out"
            ) from None
        try:
            if not (text := file.read_text()) or text.startswith(HOLDER):
                now = datetime.now().astimezone().isoformat(" ", "seconds")
                file.write_text(f"{HOLDER}{os.getpid()} on {socket.gethostname()} since {now}")
            clear_leftovers(target)
            yield
        finally:
            file.unlink(missing_ok=True)
            lock.release()
            with suppress(OSError):
                for folder in new_folders:
                    folder.rmdir()

    def start(self, identity: dict) -> None:
        remove(self.path)
        with atomic_directory(self.path) as tmp:
            (tmp / "run.json").write_text(json.dumps(identity, indent=2, sort_keys=True))

    @property
    def identity(self) -> dict[str, Any] | None:
        try:
            return read_object(self.path / "run.json")
        except (OSError, LorafoldError):
            return None  # `check` reports the problem

    def recorded(self, name: str) -> Any:
        """A field of the stored identity, or None."""
        return (self.identity or {}).get(name)

    def check(self, identity: dict) -> None:
        """Raises if the stored run had another recipe, model or data, or other files."""
        check_intact(self.path, ["run.json"])
        if (stored := self.identity) is None:
            raise LorafoldError(f"{self.path}: found no run to resume; start one without --resume")
        files = stored.pop(FILES, {})
        settings = [*changes(stored, identity | {FILES: None})]
        edited = [
            f"{role}: the files of {of['name']} have changed"
            for role, of in identity.get(FILES, {}).items()
            if files.get(role, {}).get("sha256") != of["sha256"]
        ]
        if settings or edited:
            cause = "settings have changed" if settings else "files have changed"
            raise LorafoldError(
                f"{self.path}: can't resume, because {cause}: {listed([*settings, *edited], '; ')}."
                f" Use the old {'values' if settings else 'files'} and lorafold version, or start"
                " again with --overwrite"
            )

    def checkpoints(self) -> dict[int, Path]:
        """The complete checkpoints by step, in ascending order."""
        paths = ((p.name.removeprefix("step-"), p) for p in self.path.glob("step-*"))
        return dict(sorted((int(step), p) for step, p in paths if step.isdigit()))

    @property
    def resume_hint(self) -> str:
        """A clause about the last checkpoint, for error messages."""
        if not (checkpoints := self.checkpoints()):
            return "no checkpoint was written yet"
        return f"the last good checkpoint is {checkpoints[max(checkpoints)]}"

    def checkpoint_label(self) -> str:
        """A text by which processes on several machines compare their last checkpoints."""
        if not self.path.exists():
            return "none"
        if not (checkpoints := self.checkpoints()):
            return "a run without checkpoints"
        last = max(checkpoints)
        try:
            content = (checkpoints[last] / MANIFEST).read_bytes()
        except OSError:
            return f"step {last} (damaged)"
        return f"step {last} ({sha256(content).hexdigest()[:8]})"

    def path_of(self, step: int) -> Path:
        return self.path / f"step-{step:06d}"

    def save(
        self,
        progress: Progress,
        adapter: Mapping[str, PendingTensor],
        optimizer: Mapping[str, PendingTensor],
        keep: int,
    ) -> Path:
        path = self.path_of(progress.step)
        with atomic_directory(path, overwrite=True) as tmp:
            write_tensors(tmp / "adapter.safetensors", adapter)
            write_tensors(tmp / "optimizer.safetensors", optimizer)
            (tmp / "state.json").write_text(json.dumps(asdict(progress)))
        for step, old in [*self.checkpoints().items()][: -keep or None]:
            if step != progress.best:
                remove(old)
        return path

    def load(self, path: Path) -> tuple[Progress, dict[str, Tensor], dict[str, Tensor]]:
        """The progress, the adapter's tensors and the optimizer's tensors (any shapes) of a
        checkpoint.
        """
        if problems := verify(path):
            raise LorafoldError(
                f"{path}: damaged checkpoint: {join_problems(problems)}; remove it to resume from"
                " the previous checkpoint"
            )
        state = json.loads((path / "state.json").read_text())
        for name in ("evals", "measured"):
            state[name] = {int(k): v for k, v in state[name].items()}
        adapter, optimizer = path / "adapter.safetensors", path / "optimizer.safetensors"
        return Progress(**state), load_file(adapter), load_file(optimizer)
