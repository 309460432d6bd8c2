// libopapi.so of the emulated CANN, first half: arithmetic.
//
// Every aten operator that torch_npu registers for the NPU and that the CPU can run is registered again with one boxed
// kernel, runOnCpu: it views the memory of its NPU arguments as CPU tensors, runs the operator there, and hands the
// results back as NPU tensors. The library is loaded by aclInit, so after torch_npu, and wins.
//
//   CANN_EMULATOR_STRICT=1  refuses what a real NPU refuses or runs slowly: float64 and complex arithmetic on more than
//                           a scalar, and attention that is not fused (see checkStrictly)
//   CANN_EMULATOR_DELAY_COPIES=1  non-blocking copies between host and device land late: see pending.h
//   CANN_EMULATOR_BROKEN_OPS=npu_gelu:error,npu_fast_gelu_backward:wrong  operators that raise an error, or compute
//                           something else (see brokenOperators)
//   CANN_EMULATOR_TRACE=1   says how many operators were replaced
#include <dlfcn.h>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <map>
#include <sstream>
#include <unordered_set>

#include "chip.h"
#include "pending.h"
#include "random.h"

namespace {

using c10::DispatchKey;
using torch::jit::Stack;
constexpr auto kNpu = c10::DeviceType::PrivateUse1;

bool onNpu(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kNpu; }

std::string shortName(const c10::OperatorName& name) {
  const std::string base = name.name.substr(name.name.find("::") + 2);
  return name.overload_name.empty() ? base : base + "." + name.overload_name;
}

// torch_npu's own stay: they need nothing but the runtime.
const std::unordered_set<std::string> kKeptFromTorchNpu = {
    "empty.memory_format", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "empty_with_format",
    "unsafe_empty_with_format", "as_strided", "as_strided_", "view", "_reshape_alias", "set_", "set_.source_Storage",
    "set_.source_Storage_storage_offset", "set_.source_Tensor", "resize_", "resize_as_", "record_stream", "is_pinned",
    "_pin_memory", "pin_memory", "_local_scalar_dense", "is_set_to", "get_npu_format", "npu_format_cast",
    "npu_format_cast_", "get_storage_size", "copy_memory_", "npu_change_data_ptr", "is_coalesced",
    "_has_compatible_shallow_copy_type",
    // op-plugin's own choice between npu_fusion_attention_v3 and elementary operators, with the masks that it makes
    "scaled_dot_product_attention"};

// In these, tensors of several devices may meet.
bool mixesDevices(const std::string& name) {
  static const std::unordered_set<std::string> names = {
      "copy_", "_copy_from", "_copy_from_and_resize", "index.Tensor", "index.Tensor_out", "index_put_", "index_put",
      "_index_put_impl_", "_fused_adamw_", "_fused_adam_", "_fused_sgd_"};
  return names.count(name) || name.rfind("_foreach", 0) == 0;
}

// ---- the NPU's tensors as CPU tensors, and back

class Call {
 public:
  c10::optional<c10::Device> device;  // of the results

  // A CPU tensor over the same memory; the same one for the same tensor, the same storage for the same storage.
  at::Tensor toCpu(const at::Tensor& tensor) {
    if (!onNpu(tensor)) {
      if (tensor.defined()) onHost_.push_back(tensor);
      return tensor;
    }
    if (!device) device = tensor.device();
    c10::Storage storage;
    for (const auto& [npu, cpu] : seen_) {
      if (npu.is_same(tensor)) return cpu;
      if (npu.storage().unsafeGetStorageImpl() == tensor.storage().unsafeGetStorageImpl()) storage = cpu.storage();
    }
    if (!storage) storage = aliasOf(tensor.storage());
    auto alias = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(DispatchKey::CPU),
                                                          tensor.dtype());
    auto* impl = alias.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    if (tensor.is_conj()) alias._set_conj(true);
    if (tensor.is_neg()) alias._set_neg(true);
    seen_.emplace_back(tensor, alias);
    return alias;
  }

  // Where the CPU operator resized an out= argument, the NPU's tensor follows.
  void followResizes() {
    for (auto& [npu, cpu] : seen_) {
      const bool moved = cpu.storage().data() != npu.storage().data();
      if (moved) {
        npu.resize_(cpu.sizes());
        const auto dense = cpu.contiguous();
        memcpy(npu.storage().mutable_data(), dense.const_data_ptr(), dense.nbytes());
      } else if (npu.sizes() != cpu.sizes() || npu.strides() != cpu.strides()) {
        npu.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
      }
    }
  }

  // A result of the CPU operator on the NPU: the argument it is, a view of the argument it is one of, or a copy. An
  // argument on the host that comes back (x of x.copy_(npu)) stays there.
  at::Tensor toNpu(const at::Tensor& result) const {
    if (!result.defined() || result.device().type() != c10::kCPU) return result;
    for (const auto& host : onHost_)
      if (host.is_same(result)) return result;
    for (const auto& [npu, cpu] : seen_)
      if (cpu.is_same(result)) return npu;
    for (const auto& [npu, cpu] : seen_)
      if (result.has_storage() && cpu.storage().unsafeGetStorageImpl() == result.storage().unsafeGetStorageImpl() &&
          npu.scalar_type() == result.scalar_type())
        return at::as_strided(npu, result.sizes(), result.strides(), result.storage_offset());
    const auto dense = result.is_non_overlapping_and_dense() ? result : result.contiguous();
    auto copy = at::empty_strided(dense.sizes(), dense.strides(), dense.options().device(*device));
    if (dense.numel()) memcpy(copy.mutable_data_ptr(), dense.const_data_ptr(), dense.numel() * dense.element_size());
    return copy;
  }

 private:
  static c10::Storage aliasOf(const c10::Storage& storage) {
    auto* keepAlive = new c10::Storage(storage);
    at::DataPtr data(storage.mutable_data(), keepAlive, [](void* kept) { delete static_cast<c10::Storage*>(kept); },
                     c10::Device(c10::kCPU));
    return {c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(), true};
  }

  std::vector<std::pair<at::Tensor, at::Tensor>> seen_;  // (on the NPU, its alias)
  std::vector<at::Tensor> onHost_;                        // arguments that are there already
};

template <class Use>
void forEachTensor(const c10::IValue& value, Use use) {
  if (value.isTensor()) {
    use(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorVector()) use(tensor);
  } else if (value.isList()) {
    for (const c10::IValue& element : value.toListRef())
      if (element.isTensor()) use(element.toTensor());
  }
}

// ---- checks that the real device would make

void checkDevices(const c10::OperatorHandle& op, const std::string& name, const c10::IValue* arguments, size_t count,
                  Call& call) {
  at::Tensor onHost;
  for (size_t i = 0; i < count; i++)
    forEachTensor(arguments[i], [&](const at::Tensor& tensor) {
      if (!tensor.defined()) return;
      const bool isScalar = tensor.dim() == 0 && tensor.device().type() == c10::kCPU;
      if (!onNpu(tensor)) {
        if (!isScalar) onHost = tensor;
        return;
      }
      if (!call.device) call.device = tensor.device();
      TORCH_CHECK(*call.device == tensor.device() || mixesDevices(name),
                  "Expected all tensors to be on the same device, but found at least two devices, ", *call.device, " and ",
                  tensor.device(), "! (", op.operator_name(), ")");
    });
  TORCH_CHECK(!onHost.defined() || !call.device || mixesDevices(name),
              "Expected all tensors to be on the same device, but found at least two devices, ", *call.device, " and ",
              onHost.device(), "! (", op.operator_name(), ")");
}

// Asked at every call, so that a test can change it.
bool isStrict() {
  const char* value = getenv("CANN_EMULATOR_STRICT");
  return value && *value && *value != '0';
}

// Moving, viewing, making and reading tensors of any type is no arithmetic.
bool isArithmetic(const c10::OperatorHandle& op, const std::string& name) {
  static const std::unordered_set<std::string> none = {
      "copy_", "_copy_from", "_copy_from_and_resize", "_to_copy", "clone", "contiguous", "fill_.Scalar", "fill_.Tensor",
      "zero_", "cat", "stack", "equal", "is_nonzero", "_local_scalar_dense", "item"};
  if (none.count(name)) return false;
  const auto& arguments = op.schema().arguments();
  const bool isView = !arguments.empty() && arguments[0].alias_info() && !arguments[0].alias_info()->isWrite();
  return !isView;
}

void checkStrictly(const c10::OperatorHandle& op, const std::string& name, const c10::IValue* arguments, size_t count) {
  if (!isStrict()) return;
  TORCH_CHECK(name != "_scaled_dot_product_attention_math" || emulator::isFirstGeneration(),
              "emulated NPU, strict: attention takes the slow path. The fused one takes fp16, bf16 and fp32 of 4 "
              "dimensions with is_causal=True, a bool mask or none");
  if (!isArithmetic(op, name)) return;
  for (size_t i = 0; i < count; i++)
    forEachTensor(arguments[i], [&](const at::Tensor& tensor) {
      if (!onNpu(tensor) || tensor.numel() <= 1) return;
      TORCH_CHECK(tensor.scalar_type() != at::kBFloat16 || !emulator::isFirstGeneration(),
                  "emulated NPU, strict: ", name, " in bfloat16, which this chip does not have");
      TORCH_CHECK(tensor.scalar_type() != at::kDouble && !tensor.is_complex(), "emulated NPU, strict: ", name, " of ",
                  tensor.numel(), " elements in ", tensor.scalar_type(), ": the NPU has no unit for it");
    });
}

// ---- delayed copies

emulator::StreamKey currentStream(c10::Device device) {
  const c10::impl::VirtualGuardImpl npu(kNpu);
  return {device.index(), npu.getStream(device).id()};
}

bool crossesHost(const at::Tensor& to, const at::Tensor& from) {
  return to.defined() && from.defined() && onNpu(to) != onNpu(from);
}

// Takes over a copy between host and device that need not be done at once: copy_(self, src, non_blocking) and
// _to_copy(self, dtype, layout, device, pin_memory, non_blocking, memory_format). False: do it as any other operator.
bool deferCopy(const std::string& name, Stack* stack, size_t base) {
  if (!emulator::delaysCopies()) return false;
  at::Tensor to, from;
  if (name == "copy_" && (*stack)[base + 2].toBool()) {
    to = (*stack)[base].toTensor();
    from = (*stack)[base + 1].toTensor();
    if (!crossesHost(to, from)) return false;
  } else if (name == "_to_copy" && (*stack)[base + 5].toBool()) {
    from = (*stack)[base].toTensor();
    const auto &type = (*stack)[base + 1], &target = (*stack)[base + 3];
    if (!target.isDevice() || (target.toDevice().type() == kNpu) == onNpu(from)) return false;
    auto options = from.options().device(target.toDevice()).pinned_memory(false);
    if (type.isInt()) options = options.dtype(static_cast<at::ScalarType>(type.toInt()));
    to = at::empty(from.sizes(), options);
    memset(to.mutable_data_ptr(), 0xAB, to.nbytes());  // what is read by who does not wait
  } else {
    return false;
  }
  const c10::Device device = onNpu(to) ? to.device() : from.device();
  emulator::defer(currentStream(device), [to, from] {
    const at::NoGradGuard noGrad;
    Call call;
    const c10::impl::ExcludeDispatchKeyGuard plain(c10::autograd_dispatch_keyset);
    call.toCpu(to).copy_(call.toCpu(from));
  });
  stack->resize(base);
  stack->emplace_back(to);
  return true;
}

// ---- random numbers

}  // namespace

// torch_npu 2.9 does not register its generators with torch, so they are looked up in its own library first.
at::Generator emulator::defaultGenerator(c10::Device device) {
  using Getter = const at::Generator &(*)(c10::DeviceIndex);
  static void *torchNpu = dlopen("libtorch_npu.so", RTLD_LAZY | RTLD_NOLOAD);
  static auto getter = torchNpu ? (Getter)dlsym(torchNpu, "_ZN6at_npu6detail22getDefaultNPUGeneratorEa") : nullptr;
  return getter ? getter(device.index()) : at::globalContext().defaultGenerator(device);
}

// The NPU generator's (seed, offset) picks the CPU's random stream, and the offset moves on: so torch.npu.manual_seed,
// get_rng_state and set_rng_state mean what they should. The mixing is that of SplitMix64.
uint64_t emulator::nextSeed(at::Generator generator) {
  std::lock_guard<std::mutex> guard(generator.mutex());
  const uint64_t offset = generator.get_offset();
  generator.set_offset(offset + 4);  // torch counts offsets in fours
  uint64_t bits = generator.current_seed() + 0x9E3779B97F4A7C15ull * (offset / 4 + 1);
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9ull;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBull;
  return bits ^ (bits >> 31);
}

namespace {

// npu_fusion_attention draws random numbers for dropout only (op-plugin's dropout_gen_mask).
bool drawsNothing(const c10::OperatorHandle& op, const c10::IValue* arguments) {
  if (op.operator_name().name != "npu::npu_fusion_attention") return false;
  const auto keepProbability = op.schema().argumentIndexWithName("keep_prob");
  return keepProbability && arguments[*keepProbability].toDouble() == 1.0;
}

bool isGeneratorArgument(const c10::Argument& argument) {
  return argument.type()->str().find("Generator") != std::string::npos;
}

// While it lives, an operator that draws random numbers draws those of the NPU's generator.
class RandomStream {
 public:
  RandomStream(const c10::OperatorHandle& op, c10::IValue* arguments, c10::Device device) {
    const auto& declared = op.schema().arguments();
    bool takesGenerator = false;
    at::Generator generator;
    for (size_t i = 0; i < declared.size(); i++)
      if (isGeneratorArgument(declared[i])) {
        takesGenerator = true;
        if (arguments[i].isGenerator() && arguments[i].toGenerator().device().type() == kNpu)
          generator = arguments[i].toGenerator();
      }
    if (!takesGenerator && (!op.hasTag(at::Tag::nondeterministic_seeded) || drawsNothing(op, arguments))) return;
    if (!generator.defined()) generator = emulator::defaultGenerator(device);
    const uint64_t seed = emulator::nextSeed(generator);
    if (takesGenerator) {
      for (size_t i = 0; i < declared.size(); i++)
        if (isGeneratorArgument(declared[i])) arguments[i] = at::detail::createCPUGenerator(seed);
      return;
    }
    host_ = at::detail::getDefaultCPUGenerator();
    std::lock_guard<std::mutex> guard(host_->mutex());
    hostState_ = host_->get_state();
    host_->set_current_seed(seed);
  }
  ~RandomStream() {
    if (!host_) return;
    std::lock_guard<std::mutex> guard(host_->mutex());
    host_->set_state(hostState_);
  }

 private:
  c10::optional<at::Generator> host_;  // the CPU's own generator, lent for the call
  at::Tensor hostState_;
};

// ---- products of half precision

bool isHalf(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
}

bool isProduct(const std::string& name) {
  static const std::unordered_set<std::string> names = {
      "mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "linear", "matmul", "conv2d", "_convolution", "convolution",
      "convolution_overrideable", "convolution_backward", "convolution_backward_overrideable"};
  return names.count(name) > 0;
}

bool isLayerNorm(const std::string& name) { return name == "native_layer_norm" || name == "native_layer_norm_backward"; }

// The NPU's cube unit adds up the products of half precision numbers in fp32 and rounds once. So does this, and it is
// far quicker than the CPU's own fp16 products. Layer norm does likewise: its statistics and the gradients of its weights
// are fp32 (op-plugin: LayerNormKernelNpuOpApi.cpp, LayerNormBackwardKernelNpuOpApi.cpp), and only the first result is
// rounded.
class WideArithmetic {
 public:
  WideArithmetic(const std::string& name, c10::IValue* arguments, size_t count) : roundsFirst_(isLayerNorm(name)) {
    if (!isProduct(name) && !roundsFirst_) return;
    for (size_t i = 0; i < count; i++) {
      if (!arguments[i].isTensor() || !arguments[i].toTensor().defined() || !isHalf(arguments[i].toTensor())) continue;
      if (!type_) type_ = arguments[i].toTensor().scalar_type();  // of the input; a layer norm's weights may be fp32
      arguments[i] = arguments[i].toTensor().to(at::kFloat);
    }
  }
  at::Tensor round(const at::Tensor& result, size_t index) const {
    if (roundsFirst_ && index > 0) return result;
    return type_ && result.defined() && result.scalar_type() == at::kFloat ? result.to(*type_) : result;
  }

 private:
  bool roundsFirst_;
  c10::optional<at::ScalarType> type_;
};

// ---- what op-plugin does otherwise (README.md has the table)

// op_plugin/ops/opapi/FusedAdamWKernelNpuOpApi.cpp: neither grad_scale nor found_inf. An overflow is not skipped.
// _fused_adam_ and the overloads that take a tensor as learning rate run on the CPU there and look at both.
// op_plugin/ops/opapi/GeluKernelNpuOpApi.cpp: not `approximate`. It is the tanh form always.
void dropIgnoredArguments(const std::string& name, c10::IValue* arguments, size_t count) {
  if (name == "_fused_adamw_") {
    arguments[count - 2] = c10::IValue();  // grad_scale
    arguments[count - 1] = c10::IValue();  // found_inf
  }
  if (name.rfind("gelu", 0) == 0)
    for (size_t i = 0; i < count; i++)
      if (arguments[i].isString()) arguments[i] = "tanh";
}

// op_plugin/ops/opapi/ForeachNormKernelOpApi.cpp: on Ascend 910B each norm has the shape [1].
void reshapeNorms(const std::string& name, Stack* stack) {
  if (name != "_foreach_norm.Scalar" || !emulator::isAtlasA2()) return;
  auto norms = stack->back().toTensorVector();
  for (auto& norm : norms) norm = norm.reshape({1});
  stack->back() = norms;
}

// ---- saturation mode: the first Ascend 910 and 310

// There, an fp16 result that overflows becomes the largest finite number and NaN becomes 0. Only the chip's status flag
// tells: it is set by an operator that makes such a number out of finite ones (which is this emulator's reading of the
// page of INF_NAN_MODE_ENABLE), and read by npu_get_float_status and the gradient scaler.
bool writesConstants(const std::string& name) {
  for (const char* part : {"fill", "full", "where", "pad", "scalar_tensor", "index_put", "scatter"})
    if (name.find(part) != std::string::npos) return true;
  return false;
}

bool hasNonFinite(const at::Tensor& tensor) {
  return tensor.defined() && tensor.is_floating_point() && !at::isfinite(tensor).all().item<bool>();
}

class Saturation {
 public:
  Saturation(const c10::OperatorHandle& op, const std::string& name, c10::IValue* arguments, size_t count)
      : active_(emulator::isFirstGeneration() && computes(op, name)) {
    if (!active_) return;
    for (size_t i = 0; i < count; i++)
      forEachTensor(arguments[i], [&](const at::Tensor& tensor) {
        inputsAreFinite_ = inputsAreFinite_ && !hasNonFinite(tensor);
      });
  }
  at::Tensor clamp(const at::Tensor& result) const {
    if (!active_ || !result.defined() || result.scalar_type() != at::kHalf || !hasNonFinite(result)) return result;
    if (inputsAreFinite_) emulator::overflowStatus() = true;
    const double largest = 65504;
    return at::nan_to_num_(const_cast<at::Tensor&>(result), 0, largest, -largest);
  }

 private:
  static bool computes(const c10::OperatorHandle& op, const std::string& name) {
    return name == "_to_copy" || (isArithmetic(op, name) && !writesConstants(name));
  }
  bool active_, inputsAreFinite_ = true;
};

// op_plugin/ops/opapi/AmpForeachNonFiniteCheckAndUnscaleKernelNpuOpApi.cpp: in saturation mode the gradients are not
// looked at. They are unscaled unless the status flag is set, which this clears.
bool unscaleByStatus(const std::string& name, c10::IValue* arguments) {
  if (name != "_amp_foreach_non_finite_check_and_unscale_" || !emulator::isFirstGeneration()) return false;
  if (emulator::overflowStatus().exchange(false)) {
    arguments[1].toTensor().fill_(1);
    return true;
  }
  for (const at::Tensor& gradient : arguments[0].toTensorVector()) gradient.mul_(arguments[2].toTensor());
  return true;
}

// Private formats: the values lie as in the base format, torch_npu's description of the storage has the one asked for.
void castFormat(const c10::OperatorHandle& op, Stack* stack) {
  const size_t base = stack->size() - op.schema().arguments().size();
  const at::Tensor input = (*stack)[base].toTensor().contiguous();
  static const auto empty = c10::Dispatcher::singleton().findSchemaOrThrow("npu::empty_with_format", "");
  Stack call;
  call.emplace_back(input.sizes());
  call.emplace_back(input.scalar_type());
  call.emplace_back(c10::Layout::Strided);
  call.emplace_back(input.device());
  call.emplace_back(false);
  call.emplace_back((*stack)[base + 1]);
  for (size_t i = call.size(); i < empty.schema().arguments().size(); i++)
    call.emplace_back(*empty.schema().arguments()[i].default_value());
  empty.callBoxed(&call);
  at::Tensor output = call[0].toTensor();
  if (input.numel()) memcpy(output.mutable_data_ptr(), input.const_data_ptr(), input.numel() * input.element_size());
  stack->resize(base);
  stack->emplace_back(output);
}

// ---- operators that the chip lacks

// By name, from CANN_EMULATOR_BROKEN_OPS: "error" raises as an NPU does for an operator that it does not have, "wrong"
// adds 1 to the results.
const std::map<std::string, std::string>& brokenOperators() {
  static const std::map<std::string, std::string> broken = [] {
    std::map<std::string, std::string> found;
    const char* value = getenv("CANN_EMULATOR_BROKEN_OPS");
    std::stringstream list(value ? value : "");
    for (std::string entry; std::getline(list, entry, ',');) {
      const size_t colon = entry.find(':');
      const std::string how = colon == std::string::npos ? "" : entry.substr(colon + 1);
      TORCH_CHECK(how == "error" || how == "wrong", "CANN_EMULATOR_BROKEN_OPS: ", entry,
                  " is not NAME:error or NAME:wrong");
      found[entry.substr(0, colon)] = how;
    }
    return found;
  }();
  return broken;
}

// Whether the operator is to compute something else; raises where it is to fail.
bool isWrong(const std::string& name) {
  TORCH_CHECK(!emulator::isFirstGeneration() || name.rfind("npu_fusion_attention", 0) != 0, "EZ1001: ", name,
              " is not supported on this chip: op-plugin's page lists Atlas A2 and later");
  const auto found = brokenOperators().find(name);
  if (found == brokenOperators().end()) return false;
  TORCH_CHECK(found->second == "wrong", "EZ1001: ", name, " is not supported on this chip (CANN_EMULATOR_BROKEN_OPS)");
  return true;
}

// ---- the kernel

// Replaces NPU tensors among the arguments by CPU aliases and an NPU device argument by the CPU. Returns whether the
// results stay on the host (`.cpu()`), because the device that was asked for is the host.
bool moveArguments(const c10::OperatorHandle& op, c10::IValue* arguments, size_t count, Call& call) {
  bool staysOnHost = false;
  c10::optional<c10::Device> wanted;
  for (size_t i = 0; i < count; i++) {
    auto& value = arguments[i];
    const auto type = op.schema().arguments()[i].type()->str();
    if (value.isTensor()) {
      value = call.toCpu(value.toTensor());
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& tensor : list) tensor = call.toCpu(tensor);
      value = list;
    } else if (value.isList() && type.find("Tensor") != std::string::npos) {
      c10::List<c10::optional<at::Tensor>> list;
      for (const c10::IValue& element : value.toListRef())
        list.push_back(element.isTensor() ? c10::optional<at::Tensor>(call.toCpu(element.toTensor())) : c10::nullopt);
      value = list;
    } else if (value.isDevice()) {
      if (value.toDevice().type() == kNpu) {
        wanted = value.toDevice();
        value = c10::Device(c10::kCPU);
      } else {
        staysOnHost = true;
      }
    }
  }
  if (wanted) call.device = wanted;
  if (!call.device || !call.device->has_index()) call.device = c10::impl::VirtualGuardImpl(kNpu).getDevice();
  return staysOnHost;
}

void runOnCpu(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size(), base = stack->size() - count;
  const std::string name = shortName(op.operator_name());
  if (deferCopy(name, stack, base)) return;
  c10::IValue* arguments = stack->data() + base;
  Call call;
  checkDevices(op, name, arguments, count, call);
  checkStrictly(op, name, arguments, count);
  const bool wrong = isWrong(name);
  const bool staysOnHost = moveArguments(op, arguments, count, call);
  if (staysOnHost)
    emulator::finishAll();  // a copy to the host that blocks is a synchronisation
  else
    emulator::finish(currentStream(*call.device));
  dropIgnoredArguments(name, arguments, count);
  if (unscaleByStatus(name, arguments)) return stack->resize(base);
  const Saturation saturation(op, name, arguments, count);
  const WideArithmetic wide(name, arguments, count);
  {
    const RandomStream random(op, arguments, *call.device);
    op.callBoxed(stack);
  }
  reshapeNorms(name, stack);
  call.followResizes();
  if (staysOnHost) return;
  const size_t first = stack->size() - op.schema().returns().size();
  for (size_t i = first; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      if (wrong && value.toTensor().is_floating_point()) value.toTensor().add_(1);
      value = call.toNpu(saturation.clamp(wide.round(value.toTensor(), i - first)));
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& tensor : list) tensor = call.toNpu(saturation.clamp(tensor));
      value = list;
    }
  }
}

void refuse(const c10::OperatorHandle& op, Stack*) {
  TORCH_CHECK(false, "emulated NPU: ", op.operator_name(), " has no formula in npu_ops.cpp");
}

// torch_npu's derivatives of aten operators call kernels that are not here; torch's own call operators that are.
void torchsDecomposition(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  checkStrictly(op, shortName(op.operator_name()), stack->data() + stack->size() - count, count);
  op.callBoxedForDispatchKey(DispatchKey::CompositeImplicitAutograd, *stack);
}
void torchsDerivative(const c10::OperatorHandle& op, Stack* stack) {
  op.callBoxedForDispatchKey(DispatchKey::Autograd, *stack);
}

// ---- registration

class Registration {
 public:
  Registration() {
    registerAten();
    registerNpu();
  }

 private:
  torch::Library& library(const char* space, DispatchKey key) {
    libraries_.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, space, key, __FILE__, __LINE__));
    return *libraries_.back();
  }

  template <class Use>
  static void forEachOperator(const std::string& space, Use use) {
    auto& dispatcher = c10::Dispatcher::singleton();
    for (const auto& name : dispatcher.getAllOpNames()) {
      if (name.name.rfind(space + "::", 0) != 0) continue;
      const auto op = dispatcher.findOp(name);
      if (op && op->hasSchema()) use(*op, shortName(name));
    }
  }

  void registerAten() {
    auto& kernels = library("aten", DispatchKey::PrivateUse1);
    auto& derivatives = library("aten", DispatchKey::AutogradPrivateUse1);
    int replaced = 0, derived = 0, left = 0;
    forEachOperator("aten", [&](const c10::OperatorHandle& op, const std::string& name) {
      if (kKeptFromTorchNpu.count(name)) return;
      const bool composite = op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd);
      const bool cpuCan = composite || op.hasKernelForDispatchKey(DispatchKey::CPU) ||
                          op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd) ||
                          op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutogradNonFunctional);
      if (op.hasKernelForDispatchKey(DispatchKey::PrivateUse1)) {
        if (cpuCan) kernels.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&runOnCpu>());
        (cpuCan ? replaced : left)++;
      }
      if (!op.hasKernelForDispatchKey(DispatchKey::AutogradPrivateUse1) || !cpuCan) return;
      if (composite)
        derivatives.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&torchsDecomposition>());
      else if (op.hasKernelForDispatchKey(DispatchKey::Autograd))
        derivatives.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&torchsDerivative>());
      else
        return;
      derived++;
    });
    // What op-plugin's scaled_dot_product_attention calls where it cannot call npu_fusion_attention.
    const char* slow = "_scaled_dot_product_attention_math";
    kernels.impl(slow, torch::CppFunction::makeFromBoxedFunction<&torchsDecomposition>());
    derivatives.impl(slow, torch::CppFunction::makeFromBoxedFunction<&torchsDecomposition>());
    if (getenv("CANN_EMULATOR_TRACE"))
      fprintf(stderr, "[emulated CANN] aten: %d kernels and %d derivatives replaced, %d kernels left as they are\n",
              replaced, derived, left);
  }

  // Operators of torch_npu's own: those for which npu_ops.cpp has a CPU formula run, the others say that they cannot
  // (some of torch_npu's would return without an error and with nothing computed).
  void registerNpu() {
    auto& kernels = library("npu", DispatchKey::PrivateUse1);
    forEachOperator("npu", [&](const c10::OperatorHandle& op, const std::string& name) {
      if (name == "_npu_format_cast")
        kernels.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&castFormat>());
      else if (op.hasKernelForDispatchKey(DispatchKey::CPU))
        kernels.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&runOnCpu>());
      else if (op.hasKernelForDispatchKey(DispatchKey::PrivateUse1) && !kKeptFromTorchNpu.count(name))
        kernels.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&refuse>());
    });
  }

  std::vector<std::unique_ptr<torch::Library>> libraries_;
};

}  // namespace

// Called by aclInit. Never destroyed: the registrations outlive us.
extern "C" void emulatorInstallKernels() { static auto* registration = new Registration; (void)registration; }
