"""Rewards of completions: functions, patterns, schemas and verifiers, each in its own process.

A user's function may loop forever, exit or take all memory, and a pattern may backtrack for
minutes. In a process of its own, this causes an error message with the reward, the row and the
completion.
"""

from lorafold.rewards.reward import Judged, Reward, RewardName, Rewards, reward_of

__all__ = ["Judged", "Reward", "RewardName", "Rewards", "reward_of"]
