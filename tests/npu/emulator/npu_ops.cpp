// libopapi.so of the emulated CANN, second half: what aten does not have.
//
// (1) The few aclnn kernels that torch_npu calls without the dispatcher.
// (2) CPU formulas for torch_npu's own operators (npu::...), which kernels.cpp then serves on the NPU. An operator that
//     has none here fails with 207000 (feature unsupported): add it where the project uses it, and its test beside it.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <limits>

#include "cann.h"
#include "chip.h"
#include "random.h"

// ---- (1) aclnn: a call that plans (…GetWorkspaceSize), then one that executes

namespace {
at::ScalarType scalarType(aclDataType type) {
  switch (type) {
    case ACL_FLOAT:
      return at::kFloat;
    case ACL_FLOAT16:
      return at::kHalf;
    case ACL_BF16:
      return at::kBFloat16;
    case ACL_DOUBLE:
      return at::kDouble;
    case ACL_INT8:
      return at::kChar;
    case ACL_UINT8:
      return at::kByte;
    case ACL_INT16:
      return at::kShort;
    case ACL_INT32:
      return at::kInt;
    case ACL_INT64:
      return at::kLong;
    case ACL_BOOL:
      return at::kBool;
    case ACL_COMPLEX64:
      return at::kComplexFloat;
    case ACL_COMPLEX128:
      return at::kComplexDouble;
    default:
      TORCH_CHECK(false, "emulated aclnn: there is no acl dtype ", static_cast<int>(type));
  }
}
}  // namespace

struct aclTensor {
  at::Tensor value;
};
struct aclScalar {
  at::Scalar value;
};
struct aclIntArray {
  std::vector<int64_t> values;
};
struct aclBoolArray {
  std::vector<bool> values;
};
struct aclFloatArray {
  std::vector<float> values;
};
struct aclTensorList {
  std::vector<const aclTensor*> values;
};
struct aclOpExecutor {
  std::function<void()> run;
};

namespace {
int plan(uint64_t* workspace, aclOpExecutor** executor, std::function<void()> run) {
  *workspace = 0;
  *executor = new aclOpExecutor{std::move(run)};
  return ACL_SUCCESS;
}
int execute(const char* name, aclOpExecutor* executor) {
  const std::unique_ptr<aclOpExecutor> owned(executor);
  const at::NoGradGuard noGrad;
  try {
    owned->run();
  } catch (const std::exception& error) {
    fprintf(stderr, "[emulated CANN] %s: %s\n", name, error.what());
    return ACL_ERROR_KERNEL_FAILED;
  }
  return ACL_SUCCESS;
}
}  // namespace

#define EXECUTE(name) \
  int name(void*, uint64_t, aclOpExecutor* executor, void*) { return execute(#name, executor); }

extern "C" {
aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t dimensions, aclDataType type, const int64_t* strides,
                           int64_t offset, aclFormat, const int64_t*, uint64_t, void* data) {
  const auto dtype = scalarType(type);
  char* first = static_cast<char*>(data) + offset * static_cast<int64_t>(c10::elementSize(dtype));
  return new aclTensor{at::from_blob(first, {sizes, dimensions}, {strides, dimensions}, at::TensorOptions(dtype))};
}
aclScalar* aclCreateScalar(void* data, aclDataType type) {
  return new aclScalar{at::from_blob(data, {}, at::TensorOptions(scalarType(type))).item()};
}
aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t size) {
  return new aclIntArray{std::vector<int64_t>(values, values + size)};
}
aclBoolArray* aclCreateBoolArray(const bool* values, uint64_t size) {
  return new aclBoolArray{std::vector<bool>(values, values + size)};
}
aclFloatArray* aclCreateFloatArray(const float* values, uint64_t size) {
  return new aclFloatArray{std::vector<float>(values, values + size)};
}
aclTensorList* aclCreateTensorList(const aclTensor* const* values, uint64_t size) {
  return new aclTensorList{std::vector<const aclTensor*>(values, values + size)};
}
int aclDestroyTensor(const aclTensor* tensor) { return delete tensor, ACL_SUCCESS; }
int aclDestroyScalar(const aclScalar* scalar) { return delete scalar, ACL_SUCCESS; }
int aclDestroyIntArray(const aclIntArray* array) { return delete array, ACL_SUCCESS; }
int aclDestroyBoolArray(const aclBoolArray* array) { return delete array, ACL_SUCCESS; }
int aclDestroyFloatArray(const aclFloatArray* array) { return delete array, ACL_SUCCESS; }
int aclDestroyTensorList(const aclTensorList* list) {
  for (const auto* tensor : list->values) delete tensor;
  return delete list, ACL_SUCCESS;
}
int aclDestroyAclOpExecutor(aclOpExecutor* executor) { return delete executor, ACL_SUCCESS; }

int aclnnConstantPadNdGetWorkspaceSize(const aclTensor* self, const aclIntArray* pad, const aclScalar* value,
                                       aclTensor* out, uint64_t* workspace, aclOpExecutor** executor) {
  return plan(workspace, executor,
              [=] { out->value.copy_(at::constant_pad_nd(self->value, pad->values, value->value)); });
}
EXECUTE(aclnnConstantPadNd)
int aclnnInplaceCopyGetWorkspaceSize(aclTensor* self, const aclTensor* source, uint64_t* workspace,
                                     aclOpExecutor** executor) {
  return plan(workspace, executor, [=] { self->value.copy_(source->value); });
}
EXECUTE(aclnnInplaceCopy)
int aclnnCastGetWorkspaceSize(const aclTensor* self, aclDataType, aclTensor* out, uint64_t* workspace,
                              aclOpExecutor** executor) {
  return plan(workspace, executor, [=] { out->value.copy_(self->value); });
}
EXECUTE(aclnnCast)
int aclnnInplaceZeroGetWorkspaceSize(aclTensor* self, uint64_t* workspace, aclOpExecutor** executor) {
  return plan(workspace, executor, [=] { self->value.zero_(); });
}
EXECUTE(aclnnInplaceZero)
int aclnnInplaceFillScalarGetWorkspaceSize(aclTensor* self, const aclScalar* value, uint64_t* workspace,
                                           aclOpExecutor** executor) {
  return plan(workspace, executor, [=] { self->value.fill_(value->value); });
}
EXECUTE(aclnnInplaceFillScalar)
}  // extern "C"

// ---- (2) npu::

namespace {
using at::Tensor;
using MaybeTensor = const std::optional<Tensor>&;

bool isGiven(MaybeTensor tensor) { return tensor && tensor->defined(); }

// Casts
Tensor cast(const Tensor& x, int64_t type, std::optional<int64_t>) {
  return x.to(static_cast<at::ScalarType>(type), false, true);
}
Tensor castTo(const Tensor& x, at::ScalarType type) { return x.to(type, false, true); }
Tensor castBackward(const Tensor& grad, at::ScalarType type, std::optional<int64_t>, std::optional<int64_t>) {
  return grad.to(type, false, true);
}

// npu_fast_gelu: x sigmoid(1.702 x), in fp32
constexpr double kFastGelu = 1.702;
Tensor fastGelu(const Tensor& input) {
  const auto x = input.to(at::kFloat);
  return (x * at::sigmoid(kFastGelu * x)).to(input.scalar_type());
}
Tensor fastGeluBackward(const Tensor& grad, const Tensor& input) {
  const auto x = input.to(at::kFloat), s = at::sigmoid(kFastGelu * x);
  return (grad.to(at::kFloat) * (s + kFastGelu * x * s * (1 - s))).to(input.scalar_type());
}

// npu_gelu: the form that is asked for, "none" (erf) or "tanh"
Tensor gelu(const Tensor& input, c10::string_view approximate) {
  return at::gelu(input.to(at::kFloat), approximate).to(input.scalar_type());
}
Tensor geluBackward(const Tensor& grad, const Tensor& input, c10::string_view approximate) {
  return at::gelu_backward(grad.to(at::kFloat), input.to(at::kFloat), approximate).to(input.scalar_type());
}

// npu_rms_norm: in fp32 also for half precision, with one fp32 number per row for the backward pass. The gradient of the
// weights is fp32 (CANN: aclnnRmsNorm.md, aclnnRmsNormGrad.md).
void checkRmsNorm(const Tensor& x, const Tensor& gamma) {
  TORCH_CHECK(gamma.dim() > 0 && gamma.dim() <= x.dim() && gamma.sizes() == x.sizes().slice(x.dim() - gamma.dim()),
              "emulated npu_rms_norm: gamma of ", gamma.sizes(), " for an input of ", x.sizes());
  for (const auto& tensor : {x, gamma})
    TORCH_CHECK(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16,
                "emulated npu_rms_norm: it takes fp16, bf16 and fp32, not ", tensor.scalar_type());
}
std::vector<int64_t> lastDimensions(const Tensor& gamma) {
  std::vector<int64_t> dimensions;
  for (int64_t i = 1; i <= gamma.dim(); i++) dimensions.push_back(-i);
  return dimensions;
}
std::tuple<Tensor, Tensor> rmsNorm(const Tensor& input, const Tensor& gamma, double epsilon) {
  checkRmsNorm(input, gamma);
  const auto x = input.to(at::kFloat);
  const auto rstd = (x.square().mean(lastDimensions(gamma), true) + epsilon).rsqrt();
  return {(x * rstd * gamma.to(at::kFloat)).to(input.scalar_type()), rstd};
}
std::tuple<Tensor, Tensor> rmsNormBackward(const Tensor& grad, const Tensor& input, const Tensor& gamma,
                                           const Tensor& rstd) {
  const auto normalized = input.to(at::kFloat) * rstd, dy = grad.to(at::kFloat);
  const auto scaled = dy * gamma.to(at::kFloat);
  const auto dx = (scaled - normalized * (scaled * normalized).mean(lastDimensions(gamma), true)) * rstd;
  return {dx.to(input.scalar_type()), (dy * normalized).reshape({-1, gamma.numel()}).sum(0).view(gamma.sizes())};
}

// npu_swiglu: silu of the first half times the second half
Tensor swiglu(const Tensor& input, int64_t dim) {
  TORCH_CHECK(input.size(dim) % 2 == 0, "emulated npu_swiglu: an odd size, ", input.size(dim));
  const auto halves = input.to(at::kFloat).chunk(2, dim);
  return (at::silu(halves[0]) * halves[1]).to(input.scalar_type());
}
Tensor swigluBackward(const Tensor& grad, const Tensor& input, int64_t dim) {
  const auto halves = input.to(at::kFloat).chunk(2, dim);
  const auto dy = grad.to(at::kFloat), sigmoid = at::sigmoid(halves[0]);
  const auto slope = sigmoid * (1 + halves[0] * (1 - sigmoid));
  return at::cat({dy * halves[1] * slope, dy * halves[0] * sigmoid}, dim).to(input.scalar_type());
}

// npu_rotary_mul: r1 * x + r2 * (x with each pair (a, b) replaced by (-b, a)). The pairs are those of the halves (mode
// "half") or adjacent (mode "interleave"). What it refuses: op-plugin's torch_npu-npu_rotary_mul.md. op-plugin casts the
// tables to the dtype of x. Boxed, because the schemas of torch_npu 2.9 and 2.13 differ.
constexpr int64_t kMaxRotaryDim = 896, kMaxRotaryHeads = 1000;

Tensor rotatePairs(const Tensor& x, bool adjacent) {
  if (adjacent) {
    const auto pairs = x.unflatten(-1, {-1, 2});
    return at::stack({-pairs.select(-1, 1), pairs.select(-1, 0)}, -1).flatten(-2);
  }
  const auto halves = x.chunk(2, -1);
  return at::cat({-halves[1], halves[0]}, -1);
}
bool isAdjacent(c10::string_view mode) {
  TORCH_CHECK(mode == "half" || mode == "interleave", "emulated npu_rotary_mul: no rotary_mode ", mode);
  return mode == "interleave";
}
void checkRotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool adjacent) {
  TORCH_CHECK(x.dim() == 4 && cos.dim() == 4 && cos.sizes() == sin.sizes(), "emulated npu_rotary_mul: it takes 4 dimensions");
  TORCH_CHECK(x.size(3) < kMaxRotaryDim && x.size(3) % 2 == 0 && cos.size(3) == x.size(3),
              "emulated npu_rotary_mul: head dim ", x.size(3));
  if (!adjacent) return;
  int64_t heads = 1, tokens = 0;
  for (int64_t i = 0; i < 3; i++) {
    if (cos.size(i) == 1) {
      heads *= x.size(i);
    } else {
      tokens++;
      TORCH_CHECK(cos.size(i) == x.size(i), "emulated npu_rotary_mul: tables of ", cos.sizes());
    }
  }
  TORCH_CHECK(tokens <= 1 && heads < kMaxRotaryHeads, "emulated npu_rotary_mul: tables of ", cos.sizes(),
              " for an input of ", x.sizes());
}
void rotaryMul(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t base = stack->size() - op.schema().arguments().size();
  const auto x = (*stack)[base].toTensor();
  const auto cos = (*stack)[base + 1].toTensor().to(x.scalar_type()), sin = (*stack)[base + 2].toTensor().to(x.scalar_type());
  const bool adjacent = isAdjacent((*stack)[base + 3].toStringView());
  checkRotary(x, cos, sin, adjacent);
  const auto wide = x.to(at::kFloat);
  const auto output = wide * cos.to(at::kFloat) + rotatePairs(wide, adjacent) * sin.to(at::kFloat);
  stack->resize(base);
  stack->emplace_back(output.to(x.scalar_type()));
}
void rotaryMulBackward(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t base = stack->size() - op.schema().arguments().size();
  const auto dtype = (*stack)[base + 1].toTensor().scalar_type();
  const auto wide = [&](size_t i) { return (*stack)[base + i].toTensor().to(at::kFloat); };
  const auto grad = wide(0), x = wide(1), cos = wide(2), sin = wide(3);
  const bool adjacent = isAdjacent((*stack)[base + 4].toStringView());
  const auto dx = grad * cos - rotatePairs(grad * sin, adjacent);  // the rotation of pairs is its own negative transpose
  const auto dcos = (grad * x).sum_to_size(cos.sizes());
  const auto dsin = (grad * rotatePairs(x, adjacent)).sum_to_size(sin.sizes());
  stack->resize(base);
  for (const auto& gradient : {dx, dcos, dsin}) stack->emplace_back(gradient.to(dtype));
}

// The float status operators (op_plugin/ops/aclops/FloatStatusKernelNpu.cpp). On chips with saturation mode the status is
// written into the argument, which is returned; on later chips it is always clear.
constexpr int64_t kFloatStatusSize = 8;
Tensor allocFloatStatus(const Tensor&) { return at::zeros({kFloatStatusSize}, at::kFloat); }
Tensor getFloatStatus(const Tensor& status, int64_t) {
  if (!emulator::isFirstGeneration()) return at::zeros({kFloatStatusSize}, at::kInt);
  if (emulator::overflowStatus()) status.select(0, 0).fill_(1);
  return status;
}
Tensor clearFloatStatus(const Tensor&, int64_t) {
  emulator::overflowStatus() = false;
  return at::zeros({kFloatStatusSize}, at::kFloat);
}

// npu_fusion_attention: CANN's FlashAttentionScore, with what it refuses (op-plugin's FlashAttentionKernelNpuOpApi.cpp
// and torch_npu-npu_fusion_attention.md, CANN's aclnn_flash_attention_score.cpp). Its mask is the opposite of PyTorch's:
// True is hidden. sparse_mode 2 is causal with the diagonal from the upper left corner, 3 from the lower right; both
// take a compressed mask of 2048 x 2048 and ignore its values here. Without a mask, sparse_mode has no effect.
// Layout TND: packed sequences, of which actual_seq_qlen and actual_seq_kvlen give the ends (aclnnFlashAttentionVarLenScore).
// Not emulated: CANN copies inputs that are not contiguous (three kernels in each direction, which no counter here sees).
enum { kDefaultMask = 0, kAllMask = 1, kSparseCausalUpperLeft = 2, kSparseCausalLowerRight = 3, kPrefixCompress = 6 };
constexpr int64_t kCompressed = 2048, kMaxHeads = 256, kMaxHeadDim = 768;
constexpr int64_t kMaxPackedHeadDim = 512, kMaxSequences = 1024, kMaxPackedTokens = 1 << 20;
constexpr int64_t kHiddenRowsAreZero = 2;  // inner_precise; sparse_mode 3 sets it
constexpr float kHidden = std::numeric_limits<float>::lowest();  // a hidden score: finite, as in the kernel

struct AttentionArguments {
  int64_t heads;
  c10::string_view layout;  // BNSD, BSND, BSH, SBH, TND
  double scale;
  double keepProbability;
  int64_t innerPrecise;
  int64_t sparseMode;
  int64_t seed;  // of dropout
  std::vector<int64_t> queryEnds, keyEnds;  // of packed sequences
};
std::vector<int64_t> endsOf(at::OptionalIntArrayRef ends) {
  return ends ? ends->vec() : std::vector<int64_t>();
}

Tensor toBnsd(const Tensor& x, int64_t heads, c10::string_view layout) {
  if (layout == "BNSD") return x;
  if (layout == "BSND") return x.transpose(1, 2);
  if (layout == "BSH") return x.reshape({x.size(0), x.size(1), heads, -1}).transpose(1, 2);
  return x.reshape({x.size(0), x.size(1), heads, -1}).permute({1, 2, 0, 3});
}
Tensor fromBnsd(const Tensor& x, c10::string_view layout) {
  if (layout == "BNSD") return x.contiguous();
  if (layout == "BSND") return x.transpose(1, 2).contiguous();
  if (layout == "BSH") return x.transpose(1, 2).flatten(2).contiguous();
  return x.permute({2, 0, 1, 3}).flatten(2).contiguous();
}
int64_t keyHeads(const Tensor& key, int64_t headDim, c10::string_view layout) {
  if (layout == "BNSD") return key.size(1);
  if (layout == "BSND") return key.size(2);
  return key.size(2) / headDim;
}

void checkPacked(const Tensor& query, const Tensor& key, const Tensor& value, MaybeTensor mask,
                 const AttentionArguments& arguments) {
  const auto check = [](bool holds, const auto&... text) { TORCH_CHECK(holds, "emulated npu_fusion_attention: TND ", text...); };
  for (const auto& x : {query, key, value}) {
    check(x.dim() == 3, "of ", x.dim(), " dimensions");
    check(x.scalar_type() == query.scalar_type(), "of several dtypes");
    check(x.size(0) > 0 && x.size(0) <= kMaxPackedTokens, "of ", x.size(0), " tokens");
  }
  check(query.scalar_type() == at::kFloat || query.scalar_type() == at::kHalf || query.scalar_type() == at::kBFloat16,
        "of ", query.scalar_type());
  check(key.sizes() == value.sizes() && key.size(2) == query.size(2), "with key and value of ", key.sizes(), ", ", value.sizes());
  check(query.size(1) == arguments.heads && arguments.heads <= kMaxHeads && arguments.heads % key.size(1) == 0, "with ",
        arguments.heads, " heads over ", key.size(1), " of keys");
  check(query.size(2) <= kMaxPackedHeadDim, "with head dim ", query.size(2));
  check(arguments.keepProbability == 1, "with dropout has no formula in npu_ops.cpp");
  const auto &ends = arguments.queryEnds, &keyEnds = arguments.keyEnds;
  check(!ends.empty() && ends.size() == keyEnds.size(), "needs actual_seq_qlen and actual_seq_kvlen of one length");
  check(static_cast<int64_t>(ends.size()) <= kMaxSequences, "of ", ends.size(), " sequences");
  check(ends.back() == query.size(0) && keyEnds.back() == key.size(0), "with ends ", ends.back(), " and ", keyEnds.back(),
        " for ", query.size(0), " and ", key.size(0), " tokens");
  check(std::is_sorted(ends.begin(), ends.end()) && std::is_sorted(keyEnds.begin(), keyEnds.end()), "needs ends, not lengths");
  if (!isGiven(mask)) return;
  check(mask->scalar_type() == at::kBool || mask->scalar_type() == at::kByte, "with a mask of ", mask->scalar_type());
  check(arguments.sparseMode == kSparseCausalUpperLeft || arguments.sparseMode == kSparseCausalLowerRight,
        "with a mask and sparse_mode ", arguments.sparseMode, " has no formula in npu_ops.cpp");
  check(mask->sizes() == at::IntArrayRef({kCompressed, kCompressed}), "takes an atten_mask of 2048 x 2048, but got ", mask->sizes());
}

void checkAttention(const Tensor& query, const Tensor& key, const Tensor& value, MaybeTensor mask,
                    const AttentionArguments& arguments) {
  const auto layout = arguments.layout;
  if (layout == "TND") return checkPacked(query, key, value, mask, arguments);
  const bool isOfHeads = layout == "BNSD" || layout == "BSND";
  TORCH_CHECK(isOfHeads || layout == "BSH" || layout == "SBH", "emulated npu_fusion_attention: no layout ", layout);
  for (const auto& x : {query, key, value}) {
    TORCH_CHECK(x.dim() == (isOfHeads ? 4 : 3), "emulated npu_fusion_attention: ", layout, " of ", x.dim(), " dimensions");
    TORCH_CHECK(x.scalar_type() == query.scalar_type(), "emulated npu_fusion_attention: query, key and value differ in dtype");
  }
  TORCH_CHECK(query.scalar_type() == at::kFloat || query.scalar_type() == at::kHalf || query.scalar_type() == at::kBFloat16,
              "emulated npu_fusion_attention: it takes fp16, bf16 and fp32, not ", query.scalar_type());
  TORCH_CHECK(arguments.keepProbability > 0 && arguments.keepProbability <= 1,
              "emulated npu_fusion_attention: keep_prob must be in (0, 1], but got ", arguments.keepProbability);
  TORCH_CHECK(arguments.sparseMode >= kDefaultMask && arguments.sparseMode <= kPrefixCompress,
              "emulated npu_fusion_attention: sparse_mode must be in [0, 6], but got ", arguments.sparseMode);
  TORCH_CHECK(arguments.sparseMode <= kSparseCausalLowerRight, "emulated npu_fusion_attention: sparse_mode ",
              arguments.sparseMode, " has no formula in npu_ops.cpp");
  TORCH_CHECK(key.sizes() == value.sizes(), "emulated npu_fusion_attention: key and value must have one shape");
  const auto q = toBnsd(query, arguments.heads, layout);
  const int64_t groups = keyHeads(key, q.size(3), layout);
  const auto k = toBnsd(key, groups, layout);
  TORCH_CHECK(q.size(1) == arguments.heads && arguments.heads <= kMaxHeads && groups && arguments.heads % groups == 0,
              "emulated npu_fusion_attention: ", arguments.heads, " heads over ", groups, " of keys");
  TORCH_CHECK(q.size(0) == k.size(0), "emulated npu_fusion_attention: query and key differ in batch size");
  TORCH_CHECK(q.size(3) == k.size(3) && q.size(3) <= kMaxHeadDim, "emulated npu_fusion_attention: head dim ", q.size(3));
  if (!isGiven(mask)) return;
  TORCH_CHECK(mask->scalar_type() == at::kBool || mask->scalar_type() == at::kByte,
              "emulated npu_fusion_attention: atten_mask must be bool or uint8, but got ", mask->scalar_type());
  if (arguments.sparseMode > kAllMask) {
    TORCH_CHECK(mask->sizes() == at::IntArrayRef({kCompressed, kCompressed}), "emulated npu_fusion_attention: sparse_mode ",
                arguments.sparseMode, " takes an atten_mask of 2048 x 2048, but got ", mask->sizes());
    return;
  }
  const int64_t batch = q.size(0), rows = q.size(2), columns = k.size(2);
  const auto fits = [&](std::vector<int64_t> sizes) { return mask->sizes() == at::IntArrayRef(sizes); };
  TORCH_CHECK(fits({rows, columns}) || fits({1, 1, rows, columns}) || fits({batch, 1, rows, columns}) ||
                  fits({batch, arguments.heads, rows, columns}),
              "emulated npu_fusion_attention: atten_mask must be [B,N,S,S], [B,1,S,S], [1,1,S,S] or [S,S], but got ",
              mask->sizes());
}

// (output, row maxima, row sums), the two last expanded to 8 as the kernel returns them
std::tuple<Tensor, Tensor, Tensor> attend(const Tensor& query, const Tensor& key, const Tensor& value, MaybeTensor mask,
                                          const AttentionArguments& arguments);

// Each packed sequence alone, as a batch of one
std::tuple<Tensor, Tensor, Tensor> attendPacked(const Tensor& query, const Tensor& key, const Tensor& value,
                                                MaybeTensor mask, const AttentionArguments& arguments) {
  std::vector<Tensor> outputs, maxima, sums;
  auto alone = arguments;
  alone.layout = "BSND";
  for (size_t i = 0; i < arguments.queryEnds.size(); i++) {
    const auto part = [i](const Tensor& x, const std::vector<int64_t>& ends) {
      return x.slice(0, i ? ends[i - 1] : 0, ends[i]).unsqueeze(0);
    };
    const auto q = part(query, arguments.queryEnds), k = part(key, arguments.keyEnds), v = part(value, arguments.keyEnds);
    const auto [output, maximum, sum] = attend(q, k, v, mask, alone);
    outputs.push_back(output[0]);
    maxima.push_back(maximum[0].transpose(0, 1));
    sums.push_back(sum[0].transpose(0, 1));
  }
  return {at::cat(outputs), at::cat(maxima), at::cat(sums)};
}

std::tuple<Tensor, Tensor, Tensor> attend(const Tensor& query, const Tensor& key, const Tensor& value, MaybeTensor mask,
                                          const AttentionArguments& arguments) {
  const auto layout = arguments.layout;
  if (layout == "TND") return attendPacked(query, key, value, mask, arguments);
  const auto q = toBnsd(query, arguments.heads, layout).to(at::kFloat);
  const int64_t groups = keyHeads(key, q.size(3), layout);
  auto k = toBnsd(key, groups, layout).to(at::kFloat), v = toBnsd(value, groups, layout).to(at::kFloat);
  if (groups != arguments.heads) {
    k = k.repeat_interleave(arguments.heads / groups, 1);
    v = v.repeat_interleave(arguments.heads / groups, 1);
  }
  auto scores = at::matmul(q, k.transpose(-1, -2)) * arguments.scale;
  const int64_t rows = q.size(2), columns = k.size(2);
  const bool isCausal = arguments.sparseMode == kSparseCausalUpperLeft || arguments.sparseMode == kSparseCausalLowerRight;
  auto hidden = at::zeros({rows, columns}, at::kBool);
  if (isGiven(mask) && isCausal) {
    const int64_t diagonal = arguments.sparseMode == kSparseCausalUpperLeft ? 1 : columns - rows + 1;
    hidden = at::ones({rows, columns}, at::kBool).triu(diagonal);
  } else if (isGiven(mask)) {
    hidden = mask->to(at::kBool);
  }
  scores = scores.masked_fill(hidden, kHidden);
  const auto maximum = std::get<0>(scores.max(-1, true)), powers = (scores - maximum).exp(), sum = powers.sum(-1, true);
  auto weights = powers / sum;
  if (arguments.innerPrecise == kHiddenRowsAreZero || arguments.sparseMode == kSparseCausalLowerRight)
    weights = weights.masked_fill(hidden.all(-1, true), 0);
  if (arguments.keepProbability < 1) {
    const auto generator = at::detail::createCPUGenerator(arguments.seed);
    const auto kept = at::empty(weights.sizes(), weights.options()).bernoulli_(arguments.keepProbability, generator);
    weights = weights * kept / arguments.keepProbability;
  }
  return {fromBnsd(at::matmul(weights, v), layout).to(query.scalar_type()), maximum.expand({-1, -1, -1, 8}).contiguous(),
          sum.expand({-1, -1, -1, 8}).contiguous()};
}

// The seed of the dropout; 0 where nothing is dropped.
int64_t drawSeed(double keepProbability) {
  if (keepProbability == 1.0) return 0;
  const c10::Device device = c10::impl::VirtualGuardImpl(c10::DeviceType::PrivateUse1).getDevice();
  return static_cast<int64_t>(emulator::nextSeed(emulator::defaultGenerator(device)));
}

// The forward once more, under the CPU's autograd: right by construction, and slow.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attendBackward(const Tensor& query, const Tensor& key,
                                                                  const Tensor& value, const Tensor& grad,
                                                                  MaybeTensor mask,
                                                                  const AttentionArguments& arguments) {
  const at::AutoGradMode recorded(true);
  const c10::impl::ForceDispatchKeyGuard outsideOfDispatch{c10::default_included_set, c10::default_excluded_set};
  const auto q = query.detach().requires_grad_(), k = key.detach().requires_grad_(), v = value.detach().requires_grad_();
  const auto output = std::get<0>(attend(q, k, v, mask, arguments));
  const auto grads = torch::autograd::grad({output}, {q, k, v}, {grad});
  const auto none = at::empty({0}, query.options());
  return {grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous(), none, none};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t, int64_t, int64_t> fusionAttention(
    const Tensor& query, const Tensor& key, const Tensor& value, int64_t heads, c10::string_view layout, MaybeTensor pse,
    MaybeTensor, MaybeTensor mask, double scale, double keepProbability, int64_t, int64_t, int64_t innerPrecise,
    at::OptionalIntArrayRef, at::OptionalIntArrayRef queryEnds, at::OptionalIntArrayRef keyEnds, int64_t sparseMode, bool,
    bool, c10::string_view, MaybeTensor, MaybeTensor, int64_t, int64_t) {
  TORCH_CHECK(!isGiven(pse), "emulated npu_fusion_attention: there is no pse");
  const AttentionArguments arguments{heads, layout, scale, keepProbability, innerPrecise, sparseMode, drawSeed(keepProbability),
                                     endsOf(queryEnds), endsOf(keyEnds)};
  checkAttention(query, key, value, mask, arguments);
  auto [output, maximum, sum] = attend(query, key, value, mask, arguments);
  return {output, maximum, sum, at::empty({0}, query.options()), arguments.seed, 0, 0};
}
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fusionAttentionGrad(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& grad, int64_t heads,
    c10::string_view layout, MaybeTensor, MaybeTensor, MaybeTensor mask, MaybeTensor, MaybeTensor, MaybeTensor,
    MaybeTensor, double scale, double keepProbability, int64_t, int64_t, int64_t innerPrecise, int64_t seed, int64_t,
    int64_t, at::OptionalIntArrayRef, at::OptionalIntArrayRef queryEnds, at::OptionalIntArrayRef keyEnds,
    int64_t sparseMode, bool, bool, c10::string_view, MaybeTensor) {
  return attendBackward(query, key, value, grad, mask,
                        {heads, layout, scale, keepProbability, innerPrecise, sparseMode, seed, endsOf(queryEnds), endsOf(keyEnds)});
}

// The same with lengths and seeds that are tensors: what torch_npu 2.13's scaled_dot_product_attention calls.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fusionAttentionV3(
    const Tensor& query, const Tensor& key, const Tensor& value, int64_t heads, c10::string_view layout, MaybeTensor pse,
    MaybeTensor, MaybeTensor mask, double scale, double keepProbability, int64_t, int64_t, int64_t innerPrecise,
    at::OptionalSymIntArrayRef, MaybeTensor, MaybeTensor, int64_t sparseMode, bool, bool, c10::string_view,
    MaybeTensor) {
  TORCH_CHECK(!isGiven(pse), "emulated npu_fusion_attention_v3: there is no pse");
  const AttentionArguments arguments{heads, layout, scale, keepProbability, innerPrecise, sparseMode, drawSeed(keepProbability), {}, {}};
  checkAttention(query, key, value, mask, arguments);
  auto [output, maximum, sum] = attend(query, key, value, mask, arguments);
  return {output,
          maximum,
          sum,
          at::empty({0}, query.options()),
          at::full({1}, arguments.seed, at::TensorOptions(at::kLong)),
          at::zeros({1}, at::TensorOptions(at::kLong))};
}
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fusionAttentionGradV3(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& grad, int64_t heads,
    c10::string_view layout, MaybeTensor, MaybeTensor, MaybeTensor mask, MaybeTensor, MaybeTensor, MaybeTensor,
    MaybeTensor, double scale, double keepProbability, int64_t, int64_t, int64_t innerPrecise, MaybeTensor seed,
    MaybeTensor, at::OptionalSymIntArrayRef, MaybeTensor, MaybeTensor, int64_t sparseMode, bool, bool,
    c10::string_view, MaybeTensor) {
  const int64_t drawn = isGiven(seed) ? seed->item<int64_t>() : 0;
  return attendBackward(query, key, value, grad, mask,
                        {heads, layout, scale, keepProbability, innerPrecise, sparseMode, drawn, {}, {}});
}
}  // namespace

TORCH_LIBRARY_IMPL(npu, CPU, library) {
  library.impl("npu_dtype_cast", cast);
  library.impl("_npu_dtype_cast", castTo);
  library.impl("npu_dtype_cast_backward", castBackward);
  library.impl("_npu_dtype_cast_backward", castTo);
  library.impl("npu_fast_gelu", fastGelu);
  library.impl("fast_gelu", fastGelu);
  library.impl("npu_fast_gelu_backward", fastGeluBackward);
  library.impl("npu_gelu", gelu);
  library.impl("npu_gelu_backward", geluBackward);
  library.impl("npu_rms_norm", rmsNorm);
  library.impl("npu_rms_norm_backward", rmsNormBackward);
  library.impl("npu_swiglu", swiglu);
  library.impl("npu_swiglu_backward", swigluBackward);
  library.impl("npu_rotary_mul", torch::CppFunction::makeFromBoxedFunction<rotaryMul>());
  library.impl("npu_rotary_mul_backward", torch::CppFunction::makeFromBoxedFunction<rotaryMulBackward>());
  library.impl("npu_alloc_float_status", allocFloatStatus);
  library.impl("npu_get_float_status", getFloatStatus);
  library.impl("npu_clear_float_status", clearFloatStatus);
  library.impl("npu_fusion_attention", fusionAttention);
  library.impl("npu_fusion_attention_grad", fusionAttentionGrad);
  library.impl("npu_fusion_attention_v3", fusionAttentionV3);
  library.impl("npu_fusion_attention_grad_v3", fusionAttentionGradV3);
}
