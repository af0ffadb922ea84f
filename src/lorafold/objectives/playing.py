"""The loss of a policy with what draws and judges its completions, and what it saw of those."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorafold.evaluation.rewarded import Rewarded
from lorafold.evaluation.rollouts import Rollouts
from lorafold.rewards import Rewards
from lorafold.step.branches import Branching
from lorafold.step.losses import Generated
from lorafold.step.policy import Policy
from lorafold.step.policy_laws import PolicyLaw

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HIGHEST, LOWEST = "highest reward", "lowest reward"  # of all completions so far
SILENT = "lowest reward since a signal"  # of those since the last step with one


class Playing(Policy):
    """The loss of a policy with what draws and judges its completions."""

    def __init__(
        self,
        model: PreTrainedModel,
        law: PolicyLaw,
        how: Branching | None,
        pad_id: int,
        rollouts: Rollouts,
        rewards: Rewards,
    ) -> None:
        super().__init__(model, law, how, pad_id, rollouts.longest, rollouts.exact)
        self.rollouts, self.rewards = (rollouts,), rewards  # in a tuple: it has a model of its own
        self.told: dict[str, float] = {}
        self.last = Generated()

    def figures(self) -> dict[str, float]:
        found, self.told = self.told, {}
        return found | super().figures()

    def saw(self, found: Rewarded, seconds: Mapping[str, float]) -> None:
        """Count what was drawn for a step, and the seconds that it took by what was done."""
        last, tokens = self.last, sum(len(one.tokens) for group in found.groups for one in group)
        if given := found.rewards[~found.rewards.isnan()].tolist():
            self.counts[HIGHEST] = max(self.counts.get(HIGHEST, given[0]), *given)
            self.counts[LOWEST] = min(self.counts.get(LOWEST, given[0]), *given)
        spent = {name: last.seconds.get(name, 0.0) + more for name, more in seconds.items()}
        self.last = Generated(last.tokens + tokens, spent, last.samples or found.to_read)

    def generated(self) -> Generated:
        found, self.last = self.last, Generated()
        return found
