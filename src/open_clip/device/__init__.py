"""All code that depends on the type of device. Other modules call this package and never compare device names.

Import this package before torch (see `npu_loading`). Importing it does not initialize a device driver.
"""

from __future__ import annotations

from . import npu_loading as npu_loading  # before torch
from .base import Device as Device
from .base import merge_heads as merge_heads
from .base import split_heads as split_heads
from .cpu import CpuDevice as CpuDevice
from .cuda import CudaDevice as CudaDevice
from .mps import MpsDevice as MpsDevice
from .npu import NpuDevice as NpuDevice
from .ops import attention as attention
from .ops import elementary_ops as elementary_ops
from .ops import gelu as gelu
from .ops import layer_norm as layer_norm
from .ops import packed_attention as packed_attention
from .ops import quick_gelu as quick_gelu
from .ops import rms_norm as rms_norm
from .ops import rotary as rotary
from .ops import softplus as softplus
from .ops import swiglu as swiglu
from .ops import swiglu_linear as swiglu_linear
from .ops import use_fused_ops as use_fused_ops
from .table import DEVICES as DEVICES
from .table import as_asked as as_asked
from .table import best as best
from .table import get as get
from .table import hint as hint
from .table import is_out_of_memory as is_out_of_memory
from .table import resolve as resolve
from .table import resolve_backend as resolve_backend
from .xpu import XpuDevice as XpuDevice
