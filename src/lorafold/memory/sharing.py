"""What each of n processes holds and sends in a step, from what one alone would hold.

    w, a, g, s    bytes of the weights, the adapter, its gradients and the optimizer's state
    w_b, g_b      those of one block;  r, g_r those of the largest of embedding and head

    ddp          holds  w + a + g + s, and a bucket in which gradients are summed
                 sends  2 (n - 1) / n g                               a ring's all-reduce
    fsdp         holds  w / n + a + g + s / n + max(w_b, r)
                 sends  (n - 1) / n (2 sum_b w_b + w_e + 2 g + a)     gather twice, sum, updates
    fsdp, full   holds  (w + g + s) / n + max(w_b + g_b, r + g_r)
                 sends  (n - 1) / n (2 sum_b w_b + 3/2 w_e + g)       gather twice, reduce

w_e is what a forward pass gathers for embedding and head, tied ones for each of the two; where they
train, the embedding is gathered once more in the backward pass. This is what `step.sharding` does:
one part of the model is whole at a time, quantized weights are gathered as they are stored, and
what is trained beside the base is whole in each, and its state in one, which sends what it updates.
Nothing is sent while it computes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorafold.memory.ledger import Traced

DDP, FSDP = "ddp", "fsdp"
STRATEGIES = (FSDP, DDP)
BUCKET = 2**26  # bytes of gradients that are summed at a time
SPEED = 4e14  # operations a second: 40% of what an H100 does at most in bf16


@dataclass(frozen=True)
class Sent:
    """What a process sends in a step of one micro-batch.

    bytes: All of it; as much is received.
    operations: Multiplications and additions that it computes in the step.
    """

    bytes: int
    operations: int

    def bandwidth(self, speed: float = SPEED) -> float:
        """The bytes a second, in each direction, at which sending takes as long as computing.

        Args:
            speed: The operations a second of a device, a multiplication and an addition being two.
        """
        return self.bytes * speed / max(1, self.operations)


def shared(
    whole: Traced, block: Traced, blocks: int, strategy: str, processes: int, *, owned: bool,
    tied: bool,
) -> tuple[Traced, Sent]:
    """(what one of the processes holds, what it sends).

    Args:
        whole: The step of one process; its gradients are divided already where they are owned.
        block: What of it is one block's.
        blocks: The number of blocks.
        strategy: ddp or fsdp.
        processes: Two or more.
        owned: The base's own weights train, each in the process that owns it.
        tied: Embedding and head are one.
    """  # fmt: skip
    n, part = processes, (processes - 1) / processes
    operations = whole.forward_operations + whole.backward_operations
    if strategy == DDP:
        summed = 2 * part * whole.gradients
        return replace(whole, exchanged=min(BUCKET, whole.gradients)), Sent(int(summed), operations)
    outside = whole.weights - blocks * block.weights
    largest = outside if tied else outside // 2
    gradients, beside = n * whole.gradients, 0
    if owned:
        rest = (gradients - blocks * n * block.gradients) // (1 if tied else 2)
        beside = max(n * block.gradients + block.weights, rest + largest)
    held = replace(
        whole,
        weights=-(-whole.weights // n),
        optimizer=-(-whole.optimizer // n),
        exchanged=max(block.weights, largest, beside),
    )
    ends = outside * (2 if tied else 1) * (1.5 if owned else 1)
    learned = gradients if owned else 2 * whole.gradients + whole.adapter
    return held, Sent(int(part * (2 * blocks * block.weights + ends + learned)), operations)
