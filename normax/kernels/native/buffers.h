// Arrays as XLA hands them over, memory for sums, and the kernels for this processor.

#ifndef NORMAX_BUFFERS_H_
#define NORMAX_BUFFERS_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <string>

#include "kernels.h"
#include "pieces.h"
#include "xla/ffi/api/ffi.h"

namespace normax {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using ffi::Ffi;
using ffi::ThreadPool;
using Output = ffi::Result<AnyBuffer>;
using Memory = std::unique_ptr<double[]>;

constexpr int64_t kCacheLine = 64;
constexpr int64_t kBytesPast = 1 << 23;  // from here on an output is written past the caches

static inline const Kernels& best_kernels() {
#ifdef NORMAX_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    return avx512::kernels;
  }
#endif
#ifdef NORMAX_AVX2
  // What has AVX2 has F16C, which older compilers cannot ask for.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kernels;
#endif
  return baseline::kernels;
}

// Not shared by libraries that are loaded beside this one.
static inline const Kernels& kernels() {
  static const Kernels& best = best_kernels();
  return best;
}

inline int pair_of(const AnyBuffer& x_buffer, const AnyBuffer& y_buffer) {
  const auto x = x_buffer.element_type(), y = y_buffer.element_type();
  if (x == y) {
    return x == ffi::F32    ? kF32
           : x == ffi::BF16 ? kBF16
           : x == ffi::F16  ? kF16
           : x == ffi::F64  ? kF64
                            : kPairs;
  }
  if (y != ffi::F32) return kPairs;
  return x == ffi::BF16 ? kBF16ToF32 : x == ffi::F16 ? kF16ToF32 : kPairs;
}

// That of parameters, sums and statistics: float32, or float64 for float64 entries.
inline ffi::DataType line_type_of(const AnyBuffer& x) {
  return x.element_type() == ffi::F64 ? ffi::F64 : ffi::F32;
}

inline int64_t count_of(const AnyBuffer& buffer) { return int64_t(buffer.element_count()); }

// An array that is not there came with no entries.
inline const void* at(const AnyBuffer& buffer, int64_t entries) {
  if (!buffer.element_count()) return nullptr;
  int64_t bytes = entries * int64_t(ffi::ByteWidth(buffer.element_type()));
  return static_cast<const char*>(buffer.untyped_data()) + bytes;
}

inline void* to(const AnyBuffer& buffer, int64_t entries) {
  return const_cast<void*>(at(buffer, entries));
}

inline ffi::Error refused(const char* what) {
  return ffi::Error::InvalidArgument(std::string("normax: unexpected ") + what);
}

inline ffi::Error no_memory() {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "normax: no memory for sums");
}

// Whether rows of an output are to be written past the caches: it is more than they hold, and each
// row is whole lines of theirs, and where a part of it begins and ends, too: for a line that is
// written in parts is slow.
template <class... Entries>
bool is_past(const AnyBuffer& output, Entries... entries) {
  const int64_t size = int64_t(ffi::ByteWidth(output.element_type()));
  const bool aligned = reinterpret_cast<uintptr_t>(output.untyped_data()) % kCacheLine == 0;
  return int64_t(output.size_bytes()) >= kBytesPast && aligned &&
         ((entries * size % kCacheLine == 0) && ...);
}

inline Memory room_for(int64_t count) { return Memory(new (std::nothrow) double[count]); }

inline Memory zeros(int64_t count) { return Memory(new (std::nothrow) double[count]()); }

// Numbers of an array of float32 or float64; of one that is not there, all the same.
inline void read(const AnyBuffer& from, double otherwise, int64_t count, double* to) {
  if (!from.element_count()) {
    std::fill_n(to, count, otherwise);
  } else if (from.element_type() == ffi::F64) {
    std::copy_n(static_cast<const double*>(from.untyped_data()), count, to);
  } else {
    std::copy_n(static_cast<const float*>(from.untyped_data()), count, to);
  }
}

inline void write(const double* from, int64_t count, const AnyBuffer& to, int64_t first = 0) {
  if (to.element_type() == ffi::F64) {
    std::copy_n(from, count, static_cast<double*>(to.untyped_data()) + first);
  } else {
    auto entries = static_cast<float*>(to.untyped_data()) + first;
    for (int64_t i = 0; i < count; ++i) entries[i] = float(from[i]);
  }
}

// Adds up what the pieces of each call found, of `count` sums each; returns those of a call.
inline double* sums_of_call(const Cuts& cuts, double* sums, int64_t count, int64_t call) {
  double* first = sums + call * cuts.pieces * count;
  for (int64_t piece = 1; piece < cuts.pieces; ++piece) {
    for (int64_t i = 0; i < count; ++i) first[i] += first[piece * count + i];
  }
  return first;
}

}  // namespace normax

#endif  // NORMAX_BUFFERS_H_
