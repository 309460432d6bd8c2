// What the emulated chip (CANN_EMULATOR_CHIP) has; defined in runtime.cpp.
#pragma once
#include <atomic>

namespace emulator {
// The first Ascend 910 and the 310 family: saturation mode, no bf16, no fused attention (torch_npu's NpuVariables.cpp).
bool isFirstGeneration();
// Ascend910B1 to Ascend910B4-1: the chips below Ascend310B1 in torch_npu's list.
bool isAtlasA2();
// The status flag of saturation mode: an operator has overflowed since it was cleared.
std::atomic<bool>& overflowStatus();
}  // namespace emulator
