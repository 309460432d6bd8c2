"""Options of open_clip that are refused or ignored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from training.params.option import option


# fmt: off
# Each option is followed by its help text.
@dataclass(frozen=True)
class UnsupportedConfig:
    """Options of open_clip that are refused, or ignored with a warning. They are not part of `TrainConfig`."""

    group: ClassVar[str] = "unsupported"

    horovod: bool = option(False, help="use torchrun", refused=
        "Horovod is not supported. Start the same command with `torchrun --nproc_per_node N -m training.main`.")
    torchscript: bool = option(False, help="no effect: use --torchcompile")
    trace: bool = option(False, help="use open_clip.trace_model() on a trained model", refused=
        "A traced model cannot be trained. Train without --trace and call `open_clip.trace_model(model)` on the "
        "result.")
    use_bnb_linear: str | None = option(None, metavar="NAME", help="use --precision amp_bf16", refused=
        "The int8 layers of bitsandbytes are not supported. To save memory use --precision amp_bf16 or bf16, and "
        "--grad-checkpointing.")
# fmt: on
