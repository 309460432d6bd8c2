"""How a model is trained on many ranks: what the formulas need of the options of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from open_clip import device as devices
from training import precision as precisions


@dataclass(frozen=True)
class Plan:
    """The options of a run that decide memory and traffic. They have the names and meanings of training.main's.

    Attributes:
        ranks: number of processes, one per device.
        shards: ranks that share one copy of the state: 1 with DDP, `ranks` with FSDP, a divisor of `ranks` with HSDP.
        reshard: free the gathered weights of a unit after its forward pass, and gather them again for the backward.
        batch_size: samples per rank and forward pass.
        exchange: how --siglip passes text features around (--loss-dist-impl).
        ema: whether averaged weights are kept (--ema-decay).
        device: type of the devices, which decides the form of AdamW.
        device_memory: bytes of memory of a device, which decides the size of the tiles of the loss.
    """

    ranks: int
    shards: int = 1
    reshard: bool = True
    batch_size: int = 64
    accum_freq: int = 1
    precision: str = "amp_bf16"
    local_loss: bool = True
    gather_with_grad: bool = True
    siglip: bool = False
    exchange: str = "bidir"
    grad_checkpointing: bool = False
    ema: bool = False
    device: str = "npu"
    device_memory: float = 64 * 2**30

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.ranks % self.shards:
            raise ValueError(f"{self.ranks} ranks cannot be divided into groups of {self.shards} shards.")

    @property
    def is_sharded(self) -> bool:
        return self.shards > 1

    @property
    def replicas(self) -> int:
        return self.ranks // self.shards

    @property
    def pairs(self) -> int:
        """Image-text pairs of a rank in one step."""
        return self.batch_size * self.accum_freq

    @property
    def compute_dtype(self) -> torch.dtype:
        return precisions.dtype_of(self.precision, self.device)

    @property
    def is_autocast(self) -> bool:
        return self.precision.startswith("amp")

    @property
    def is_flat_adamw(self) -> bool:
        """Whether --fused-optimizer auto is FlatAdamW, see `training.optim` and `training.sharding.shards`."""
        has_float16_weights = precisions.weights_dtype(self.precision) == torch.float16
        return not self.is_sharded and (has_float16_weights or not devices.DEVICES[self.device].fused_adamw_skips)

    @property
    def tile_elements(self) -> int:
        """Largest number of logits that the loss computes at once, see `Device.tile_elements`."""
        return int(min(self.device_memory // 400, 2**27))
