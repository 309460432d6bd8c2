"""Lower bounds of the time of a step: computation, and each purpose of communication, from given speeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from training.scale.plan import Plan
from training.scale.sizes import ModelSizes
from training.scale.traffic import Message


@dataclass(frozen=True)
class Links:
    """Speeds of the hardware.

    Attributes:
        between_nodes: bytes per second of a device's link to other hosts, in each direction.
        within_node: the same within a host.
        ranks_per_node: devices of a host.
        latency: seconds of a message.
        flops: FLOP/s that a device reaches in the model.
    """

    between_nodes: float
    within_node: float
    ranks_per_node: int
    latency: float
    flops: float

    def seconds(self, message: Message) -> float:
        """Return the shortest time of a message without other traffic.

        It has the latencies of its hops, and its bytes on the slower of two links. Within a host, each rank sends all
        of them. To other hosts, the ranks of the group on a host share them, except that of a ring the last rank sends
        all.
        """
        speed = self.within_node
        if message.ranks * message.stride > self.ranks_per_node:
            sharing = 1 if message.operation == "send" else max(self.ranks_per_node // message.stride, 1)
            speed = min(speed, self.between_nodes * sharing)
        return message.hops * self.latency + message.sent / speed


def of_step(sizes: ModelSizes, plan: Plan, messages: Sequence[Message], links: Links) -> dict[str, float]:
    """Return seconds by "compute" and the purposes of the messages, each as if it had the device and link alone."""
    forward_passes = 0.0
    if plan.grad_checkpointing:
        forward_passes += plan.accum_freq
    forward_passes += plan.accum_freq - 1  # accumulation runs all batches but one twice forward
    flops = plan.batch_size * sizes.flops * (plan.accum_freq + forward_passes / 3)
    # Of the logits of its images with all texts, a rank computes four products: two passes, and two gradients.
    flops += 4 * 2 * plan.pairs * (plan.pairs * plan.ranks) * sizes.embed_dim
    seconds: Counter[str] = Counter()
    for message in messages:
        seconds[message.purpose] += links.seconds(message)  # type: ignore[assignment]
    return {"compute": flops / links.flops, **seconds}
