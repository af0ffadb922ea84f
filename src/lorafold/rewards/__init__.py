"""What a completion is worth: rewards by function, pattern, schema or verifier, in own processes.

    with Rewards.of("count.py:words", "0.2*regex:[a-z ]+") as rewards:
        sums, each = rewards([Judged("Name a town.", "bonn", row={}, where="rows.jsonl row 1")])

    judged.py      what is judged, and what judges
    naming.py      a reward from its name, as on a command line
    weighted.py    several, with weights
    separate.py    a reward that is computed in a process of its own
    direct.py      a Python function that is called in this one
    worker.py      the process
    kinds.py       what the process opens: files with a function, patterns, schemas, verifiers
    calling.py     how a function is called, and what it may return

A function of the user may loop for ever, call a program that never ends, exit, or take all memory,
and a pattern may backtrack for minutes. Each of these ends a process that nothing else depends on,
and is told in one line that names the reward, the row and the completion.
"""

from lorafold.rewards.judged import Judged, Reward
from lorafold.rewards.naming import digest_of, reward_of
from lorafold.rewards.weighted import Rewards

__all__ = ["Judged", "Reward", "Rewards", "digest_of", "reward_of"]
