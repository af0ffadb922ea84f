"""Rewards of completions: functions, patterns, schemas, verifiers, judges and reward models.

A user's function may loop forever, exit or take all memory, and a pattern may backtrack for
minutes. Because rewards given by name run in separate processes, such a failure becomes an error
message with the reward, the row and the completion.
"""

from lorafold.rewards.functions import Calls
from lorafold.rewards.reward import Judged, Reward, RewardName, Rewards, reward_of

__all__ = ["Calls", "Judged", "Reward", "RewardName", "Rewards", "reward_of"]
