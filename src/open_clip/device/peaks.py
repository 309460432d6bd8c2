"""Matrix-multiplication peaks of chips, by the name that the driver reports."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import NamedTuple


class Peak(NamedTuple):
    """Dense matrix-multiplication peak of a chip in TFLOP/s with fp32 accumulation. None: no hardware support."""

    pattern: str  # regular expression that is searched in the name from the driver
    fp16: float | None
    bf16: float | None
    fp32: float | None


# The first matching pattern is used. Sources: the data sheet of each product at nvidia.com ("with sparsity" halved);
# for GeForce and RTX the tensor-core column with fp32 accumulation in the white papers of GA102, AD102 and GB202.
NVIDIA_PEAKS = (
    Peak(r"\bGB200\b", 2500, 2500, 80),
    Peak(r"\bB200\b", 2250, 2250, 75),
    Peak(r"\bH100 PCIe\b", 756, 756, 51),
    Peak(r"\bH100 NVL\b|\bH200 NVL\b", 835, 835, 60),
    Peak(r"\b(GH200|H200|H100|H800)\b", 989, 989, 67),
    Peak(r"\bH20\b", 148, 148, 44),
    Peak(r"\b(A100|A800)\b", 312, 312, 19.5),
    Peak(r"\bA40\b", 149.7, 149.7, 37.4),
    Peak(r"\bA30\b", 165, 165, 10.3),
    Peak(r"\bA10G?\b", 125, 125, 31.2),
    Peak(r"\bL40S\b", 362, 362, 91.6),
    Peak(r"\bL40\b", 181, 181, 90.5),
    Peak(r"\bL20\b", 119.5, 119.5, 59.8),
    Peak(r"\bL4\b", 121, 121, 30.3),
    Peak(r"\bV100-PCIE", 112, None, 14),
    Peak(r"\bV100-", 125, None, 15.7),
    Peak(r"\bT4\b", 65, None, 8.1),
    Peak(r"\bRTX 5090\b", 209.5, 209.5, 104.8),
    Peak(r"\bRTX 4090\b", 165.2, 165.2, 82.6),
    Peak(r"\bRTX 3090 Ti\b", 80, 80, 40),
    Peak(r"\bRTX 3090\b", 71, 71, 35.6),
    Peak(r"\bRTX 6000 Ada\b", 364.2, 364.2, 91.1),
    Peak(r"\bRTX A6000\b", 154.8, 154.8, 38.7),
)


def _cube(cores: int, ghz: float) -> float:
    """Return the TFLOP/s of `cores` cube units. Each does 16 x 16 x 16 multiply-adds per cycle in fp16 or bf16."""
    return cores * 16**3 * 2 * ghz / 1000


# cube_core_cnt and cube_freq of each chip, from CANN's data/platform_config/Ascend910*.ini as quoted in public
# repositories; for 950, torchtitan-npu's table. The larger figures of Huawei's product pages (400, 376, 313, 280)
# include the vector units, which do not multiply matrices. For 910A, the 256 of its announcement (Hot Chips 31, 2019).
# 910_93xx is one die of an A3 package; torch sees each die as a device. 910_9362 is missing because public sources
# disagree (20 or 24 cube cores).
ASCEND_PEAKS = (
    Peak(r"910B1", _cube(24, 1.85), _cube(24, 1.85), None),
    Peak(r"910B2", _cube(24, 1.80), _cube(24, 1.80), None),
    Peak(r"910B3", _cube(20, 1.80), _cube(20, 1.80), None),
    Peak(r"910B4", _cube(20, 1.50), _cube(20, 1.50), None),
    Peak(r"910_93(?!62)\d\d", _cube(24, 1.80), _cube(24, 1.80), None),
    Peak(r"910(B|ProB)$", _cube(30, 0.90), None, None),
    Peak(r"910(A|ProA|PremiumA)?$", 256, None, None),
    Peak(r"950PR_9579\b", _cube(28, 1.65), _cube(28, 1.65), None),
    Peak(r"950PR", _cube(32, 1.65), _cube(32, 1.65), None),
    Peak(r"950DT", _cube(36, 1.65), _cube(36, 1.65), None),
)


def find(peaks: tuple[Peak, ...], name: str) -> Peak | None:
    """Return the first entry whose pattern matches a chip's name, or None."""
    return next((peak for peak in peaks if re.search(peak.pattern, name)), None)


def of_platform_config(path: Path) -> float | None:
    """Compute the FLOP/s of an Ascend chip in fp16 and bf16 from CANN's description of it.

    Args:
        path: CANN's data/platform_config/<chip>.ini.

    Returns:
        FLOP/s, or None if the file lacks a number.
    """
    config = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        config.read_string(path.read_text(encoding="utf-8", errors="replace"))
        chip, core = config["SoCInfo"], config["AICoreSpec"]
        cores = int(chip.get("cube_core_cnt", "0")) or int(chip.get("ai_core_cnt", "0"))
        products = int(core["cube_m_size"]) * int(core["cube_n_size"]) * int(core["cube_k_size"])
        megahertz = float(core["cube_freq"])
    except (OSError, configparser.Error, KeyError, ValueError):
        return None
    return cores * products * 2 * megahertz * 1e6 or None
