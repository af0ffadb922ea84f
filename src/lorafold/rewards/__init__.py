"""What a completion is worth: rewards by function, pattern, schema or verifier, in own processes.

    with Rewards.of("count.py:words", "0.2*regex:[a-z ]+") as rewards:
        sums, each = rewards([Judged("Name a town.", "bonn", row={}, where="rows.jsonl row 1")])

    reward.py      completions to judge, a reward by its name, and several with weights
    worker.py      the process of a reward that has one of its own
    functions.py   what the process opens (files with a function, patterns, schemas, verifiers), how
                   a function is called, and what it may return

A function of the user may loop for ever, call a program that never ends, exit, or take all memory,
and a pattern may backtrack for minutes. Each of these ends a process that nothing else depends on,
and is told in one line that names the reward, the row and the completion.
"""

from lorafold.rewards.reward import Judged, Reward, RewardName, Rewards, reward_of

__all__ = ["Judged", "Reward", "RewardName", "Rewards", "reward_of"]
