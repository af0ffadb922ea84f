"""Documents with tokens in front that are keys of every document and no queries.

    document i: keys [front, own keys], queries its own tokens; the n + T keys and values of a
                sequence begin with the n in front

Each document's attention stays as small as the document, where a whole mask would be (T, n + T).
Virtual tokens of prompt and prefix tuning are such tokens.
"""

from __future__ import annotations

from itertools import repeat

import torch

from lorafold.ops.documents import Documents
from lorafold.ops.host import on_host, sent


def prefixed(docs: Documents, n: int, batch: int, device: torch.device) -> Documents:
    """The documents behind n tokens each, those at the front of its sequence.

    Args:
        docs: the documents, which have no window.
        device: where `keys` is made.
    """
    length, lens = sum(docs.own) // batch, torch.tensor(docs.lens)
    keys = torch.arange(sum(docs.lens)) if docs.keys is None else on_host(docs.keys)
    sequence = keys // length
    front = sequence[lens.cumsum(0) - lens, None] * (n + length)
    front = front + torch.arange(n)  # (documents, n)
    parts = zip(front, (keys + n * (sequence + 1)).split(docs.lens), strict=True)
    return Documents(
        tuple(n + each for each in docs.lens),
        None,
        tuple(n + start for start in docs.starts or repeat(0, len(docs.lens))),
        sent(torch.cat([part for pair in parts for part in pair]), device),
        (docs, n * batch),
    )
