"""Log probabilities of a prompt's tokens, from the logits of the passes that read it.

    scored(logits_TV, tokens, k)        of tokens t + 1 after those t that a pass computed

A pass has the logits of the tokens that it reads and no more, at most a chunk of each prompt, and
few of them are computed with at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

AT_ONCE = 32  # tokens whose log probabilities over the vocabulary are in memory together
# the log probability of a token, and those of the most likely ones in its place
Score = tuple[float, tuple[tuple[int, float], ...]]


def scored(logits_TV: Tensor, tokens: Sequence[int], k: int) -> list[Score]:
    """The score of each token.

    Args:
        logits_TV: the logits in whose place each token stands.
        tokens: as many tokens.
        k: how many of the most likely ones each has beside it.
    """
    found: list[Score] = []
    for logits_nV in logits_TV.split(AT_ONCE):
        own = tokens[len(found) : len(found) + len(logits_nV)]
        logp_nV = torch.log_softmax(logits_nV.float(), -1)
        ids_n1 = torch.tensor(own, device=logp_nV.device)[:, None]
        logprobs = logp_nV.gather(1, ids_n1)[:, 0].tolist()
        best = logp_nV.topk(k)
        tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        pairs = [tuple(zip(*top, strict=True)) for top in tops]
        found += zip(logprobs, pairs, strict=True)
    return found
