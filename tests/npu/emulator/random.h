// Random numbers of the NPU's generators; defined in kernels.cpp.
#pragma once
#include <ATen/core/Generator.h>

namespace emulator {
at::Generator defaultGenerator(c10::Device device);
uint64_t nextSeed(at::Generator generator);
}  // namespace emulator
