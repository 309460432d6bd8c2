// Element types of the emulated HCCL, and the reduction of elements over ranks.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cann.h"

namespace {

// Bytes of an element.
size_t width(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT16:
    case HCCL_DATA_TYPE_UINT16:
    case HCCL_DATA_TYPE_FP16:
    case HCCL_DATA_TYPE_BFP16:
      return 2;
    case HCCL_DATA_TYPE_INT32:
    case HCCL_DATA_TYPE_UINT32:
    case HCCL_DATA_TYPE_FP32:
      return 4;
    case HCCL_DATA_TYPE_INT64:
    case HCCL_DATA_TYPE_UINT64:
    case HCCL_DATA_TYPE_FP64:
      return 8;
    case HCCL_DATA_TYPE_INT128:
      return 16;
    default:
      return 1;
  }
}

float halfToFloat(uint16_t bits) {
  _Float16 value;
  memcpy(&value, &bits, sizeof bits);
  return static_cast<float>(value);
}
uint16_t floatToHalf(float value) {
  const auto half = static_cast<_Float16>(value);
  uint16_t bits;
  memcpy(&bits, &half, sizeof bits);
  return bits;
}
float bfloatToFloat(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}
uint16_t floatToBfloat(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const bool isNan = (bits & 0x7fffffff) > 0x7f800000;
  if (isNan) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

template <class T>
T combine(T a, T b, int operation) {
  switch (operation) {
    case HCCL_REDUCE_SUM:
      return static_cast<T>(a + b);
    case HCCL_REDUCE_PROD:
      return static_cast<T>(a * b);
    case HCCL_REDUCE_MAX:
      return std::max(a, b);
    default:
      return std::min(a, b);
  }
}

// Reduces `count` elements, a source per rank. Half precisions are accumulated in fp32.
class Reducer {
 public:
  Reducer(HcclDataType type, int operation, size_t count) : type_(type), operation_(operation), count_(count) {}

  void add(const char* source) {
    if (isHalf())
      addHalf(reinterpret_cast<const uint16_t*>(source));
    else if (first_)
      bytes_.assign(source, source + count_ * width(type_));
    else
      addWhole(source);
    first_ = false;
  }

  void store(void* target) const {
    if (!isHalf()) {
      memcpy(target, bytes_.data(), bytes_.size());
      return;
    }
    auto* out = static_cast<uint16_t*>(target);
    for (size_t i = 0; i < count_; i++)
      out[i] = type_ == HCCL_DATA_TYPE_FP16 ? floatToHalf(sums_[i]) : floatToBfloat(sums_[i]);
  }

 private:
  bool isHalf() const { return type_ == HCCL_DATA_TYPE_FP16 || type_ == HCCL_DATA_TYPE_BFP16; }

  void addHalf(const uint16_t* source) {
    if (first_) sums_.resize(count_);
    for (size_t i = 0; i < count_; i++) {
      const float value = type_ == HCCL_DATA_TYPE_FP16 ? halfToFloat(source[i]) : bfloatToFloat(source[i]);
      sums_[i] = first_ ? value : combine(sums_[i], value, operation_);
    }
  }

  template <class T>
  void addAs(const char* source) {
    auto* into = reinterpret_cast<T*>(bytes_.data());
    auto* from = reinterpret_cast<const T*>(source);
    for (size_t i = 0; i < count_; i++) into[i] = combine(into[i], from[i], operation_);
  }

  void addWhole(const char* source) {
    switch (type_) {
      case HCCL_DATA_TYPE_FP32:
        return addAs<float>(source);
      case HCCL_DATA_TYPE_FP64:
        return addAs<double>(source);
      case HCCL_DATA_TYPE_INT8:
        return addAs<int8_t>(source);
      case HCCL_DATA_TYPE_UINT8:
        return addAs<uint8_t>(source);
      case HCCL_DATA_TYPE_INT16:
        return addAs<int16_t>(source);
      case HCCL_DATA_TYPE_INT32:
        return addAs<int32_t>(source);
      case HCCL_DATA_TYPE_INT64:
        return addAs<int64_t>(source);
      default:
        fprintf(stderr, "[emulated HCCL] no reduction of dtype %d\n", type_);
        abort();
    }
  }

  HcclDataType type_;
  int operation_;
  size_t count_;
  bool first_ = true;
  std::vector<char> bytes_;
  std::vector<float> sums_;
};

}  // namespace
