"""What each of n processes holds and sends in a step, from what one alone would hold.

    w, a, g, s    bytes of the weights, the adapter, its gradients and the optimizer's state
    w_b, a_b, g_b those of one block;  r = w + a outside of the blocks

    ddp     holds  w + a + g + s, and a bucket in which gradients are summed
            sends  2 (n - 1) / n g                                      a ring's all-reduce
    fsdp    holds  (w + a + g + s) / n + r + 2 (w_b + a_b) + 2 g_b
            sends  (n - 1) / n (2 sum_b (w_b + a_b) + r + g)            gather, gather, scatter

With fsdp a block is gathered while the one before computes, once in the forward pass and once in
the backward pass; of its gradients there are those that are computed and those that are sent. What
lies outside of the blocks, embedding and head, is gathered as a whole and stays for the step.
Quantized weights are gathered as they are stored. Rajbhandari et al. 2020, arXiv 1910.02054, stage
3; Zhao et al. 2023, arXiv 2304.11277.

A transfer is hidden if it takes no longer than the products that run meanwhile: a block's beside
the transfers of the next one, and with ddp the backward pass beside the sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorafold.memory.traced import Traced

DDP, FSDP = "ddp", "fsdp"
STRATEGIES = (FSDP, DDP)
BUCKET = 2**26  # bytes of gradients that are summed at a time
SPEED = 4e14  # operations a second: 40% of what an H100 does at most in bf16


@dataclass(frozen=True)
class Sent:
    """What a process sends in a step of one micro-batch.

    bytes: All of it; as much is received.
    beside: (bytes, operations) of transfers and of the products that run meanwhile.
    """

    bytes: int
    beside: tuple[tuple[float, int], ...]

    def bandwidth(self, speed: float = SPEED) -> float:
        """The bytes a second, in each direction, from which on all transfers are hidden.

        Args:
            speed: The operations a second of a device, a multiplication and an addition being two.
        """
        return max(sent * speed / max(1, operations) for sent, operations in self.beside)


def shared(
    whole: Traced, block: Traced, blocks: int, strategy: str, processes: int
) -> tuple[Traced, Sent]:
    """(what one of the processes holds, what it sends).

    Args:
        whole: The step of one process; its gradients are divided already, with fsdp.
        block: What of it is one block's.
        blocks: The number of blocks.
        strategy: ddp or fsdp.
        processes: Two or more.
    """
    n, part = processes, (processes - 1) / processes
    if strategy == DDP:
        summed = 2 * part * whole.gradients
        sent = Sent(int(summed), ((summed, whole.backward_operations),))
        return replace(whole, exchanged=min(BUCKET, whole.gradients)), sent
    gathered, reduced = block.weights + block.adapter, n * block.gradients
    outside = whole.weights + whole.adapter - blocks * gathered
    held = replace(
        whole,
        weights=-(-whole.weights // n),
        adapter=-(-whole.adapter // n),
        optimizer=-(-whole.optimizer // n),
        exchanged=outside + 2 * gathered + 2 * reduced,
    )
    total = part * (2 * blocks * gathered + outside + n * whole.gradients)
    beside = (
        (part * gathered, block.forward_operations),
        (part * (gathered + reduced), block.backward_operations),
    )
    return held, Sent(int(total), beside)
