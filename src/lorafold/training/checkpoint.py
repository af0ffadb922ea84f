"""Checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON.

    RUN/step-000020/{adapter,optimizer}.safetensors, state.json     RUN is `<out>.run`, beside the
                                                                    adapter to be

A step's rows follow from the seed alone, so the step number is the data position. Each checkpoint
appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafold.errors import LorafoldError
from lorafold.files.atomic import atomic_directory, verify
from lorafold.files.intact import check_intact


@dataclass
class Progress:
    """What a run has seen so far.

    Losses are means over labelled tokens; `seconds` and `tokens` count training steps only.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    evals: dict[int, float] = field(default_factory=dict)  # step -> held-out loss
    tokens: int = 0
    seconds: float = 0.0
    # whose state the checkpoint holds: `auto` might choose another one when the run is resumed
    optimizer: str = ""

    @property
    def best(self) -> int | None:
        """The step with the lowest held-out loss."""
        return min(self.evals, key=lambda s: (self.evals[s], s)) if self.evals else None


class RunDirectory:
    """The checkpoints of one run, and the recipe and data they belong to."""

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(out.name + ".run")

    def check_free(self, may_replace: bool) -> None:
        """LorafoldError if checkpoints of a run that was stopped lie here, which a fresh start
        would remove.
        """
        if self.checkpoints() and not may_replace:
            raise LorafoldError(
                f"{self.path} holds a run that was stopped: --resume goes on from it, --overwrite"
                " starts afresh"
            )

    def start(self, identity: dict) -> None:
        """Begin afresh: what an earlier run left is removed."""
        shutil.rmtree(self.path, ignore_errors=True)
        with atomic_directory(self.path) as tmp:
            (tmp / "run.json").write_text(json.dumps(identity, indent=2, sort_keys=True))

    def check(self, identity: dict, defaults: dict) -> None:
        """LorafoldError unless the run that lies here had the same recipe, model and data. Fields
        that its recipe did not know yet count as their `defaults`.
        """
        check_intact(self.path, ["run.json"])
        try:
            found = json.loads((self.path / "run.json").read_text())
        except (OSError, ValueError):
            raise LorafoldError(
                f"{self.path}: no run to resume there; start it without --resume"
            ) from None
        found |= {k: defaults[k] for k in identity if k in defaults and k not in found}
        differing = [
            k for k in sorted(set(found) | set(identity)) if found.get(k) != identity.get(k)
        ]
        if differing:
            changes = "; ".join(
                f"{k}: was {found.get(k)!r}, now {identity.get(k)!r}" for k in differing
            )
            raise LorafoldError(f"{self.path}: the run to resume had another recipe: {changes}")

    def checkpoints(self) -> dict[int, Path]:
        """Complete checkpoints by step, in order."""
        found = {
            int(p.name.removeprefix("step-")): p
            for p in self.path.glob("step-*")
            if p.name[5:].isdigit()
        }
        return dict(sorted(found.items()))

    def save(
        self,
        progress: Progress,
        adapter: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        keep: int,
    ) -> Path:
        """Write the checkpoint of `progress.step`; of the older ones keep the newest `keep`, and
        the best.
        """
        path = self.path / f"step-{progress.step:06d}"
        with atomic_directory(path, overwrite=True) as tmp:
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in adapter.items()},
                tmp / "adapter.safetensors",
            )
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in optimizer.items()},
                tmp / "optimizer.safetensors",
            )
            (tmp / "state.json").write_text(json.dumps(asdict(progress)))
        steps = list(self.checkpoints())
        for step in steps[: -keep or None]:
            if step != progress.best:
                shutil.rmtree(self.checkpoints()[step])
        return path

    def load(self, path: Path) -> tuple[Progress, dict[str, Tensor], dict[str, Tensor]]:
        """(progress, adapter tensors, optimizer tensors).

        LorafoldError if the files are not those that were written.
        """
        if problems := verify(path):
            raise LorafoldError(
                f"{path}: damaged checkpoint: {'; '.join(problems)}; remove it to resume from the"
                " one before"
            )
        state = json.loads((path / "state.json").read_text())
        state["evals"] = {int(k): v for k, v in state["evals"].items()}
        return (
            Progress(**state),
            load_file(path / "adapter.safetensors"),
            load_file(path / "optimizer.safetensors"),
        )

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
