// What XLA calls: checks of shapes, and sums of pieces in a fixed order.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <string>

#include "kernels.h"
#include "pieces.h"
#include "xla/ffi/api/ffi.h"

namespace normax {
namespace {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using Output = ffi::Result<AnyBuffer>;
using Memory = std::unique_ptr<double[]>;

constexpr int64_t kGroupEntries = 1 << 15;  // of groups together: they are to stay in cache
constexpr int64_t kTogether = 16;  // columns, at least: a line of cache
constexpr int64_t kGroupLines = 12, kMargin = 8;  // what kernels.h asks for

const Kernels& kernels() {
#ifdef NORMAX_AVX2
  // What has AVX2 has F16C, which older compilers cannot ask for.
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has) return avx2::kernels;
#endif
  return baseline::kernels;
}

int pair_of(const AnyBuffer& x_buffer, const AnyBuffer& y_buffer) {
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

int64_t count_of(const AnyBuffer& buffer) { return int64_t(buffer.element_count()); }

// An array that is not there came with no entries.
const void* at(const AnyBuffer& buffer, int64_t entries) {
  if (!buffer.element_count()) return nullptr;
  int64_t bytes = entries * int64_t(ffi::ByteWidth(buffer.element_type()));
  return static_cast<const char*>(buffer.untyped_data()) + bytes;
}

void* to(const AnyBuffer& buffer, int64_t entries) { return const_cast<void*>(at(buffer, entries)); }

ffi::Error refused(const char* what) {
  return ffi::Error::InvalidArgument(std::string("normax: unexpected ") + what);
}

ffi::Error no_memory() {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "normax: no memory for sums");
}

Memory zeros(int64_t count) { return Memory(new (std::nothrow) double[count]()); }

// Writes the sums of the pieces of each call, `lines` of them, rounded to the outputs' dtype.
template <class... Outputs>
void add_up(const Cuts& cuts, const double* sums, int64_t length, const Outputs&... outputs) {
  constexpr int64_t lines = sizeof...(Outputs);
  int64_t line = 0;
  auto write = [&](const AnyBuffer& output) {
    for (int64_t call = 0; call < cuts.batch; ++call) {
      for (int64_t i = 0; i < length; ++i) {
        double sum = 0;
        for (int64_t piece = call * cuts.pieces; piece < (call + 1) * cuts.pieces; ++piece) {
          sum += sums[(piece * lines + line) * length + i];
        }
        if (output.element_type() == ffi::F64) {
          static_cast<double*>(output.untyped_data())[call * length + i] = sum;
        } else {
          static_cast<float*>(output.untyped_data())[call * length + i] = float(sum);
        }
      }
    }
    ++line;
  };
  (write(outputs), ...);
}

ffi::Error run_forward(ffi::ThreadPool& pool, const AnyBuffer& x, const AnyBuffer& residual,
                       const AnyBuffer& scale, const AnyBuffer& bias, const AnyBuffer* sum,
                       const AnyBuffer& y, bool centered, double epsilon) {
  const int pair = pair_of(x, y);
  if (pair == kPairs) return refused("dtypes of x and y");
  if (!count_of(x)) return ffi::Error::Success();
  const int64_t length = x.dimensions().back(), rows = count_of(x) / length;
  const int64_t lines = std::max(count_of(scale), count_of(bias)) / length;
  const Cuts cuts(std::max<int64_t>(1, lines), rows, length, threads_of(pool));
  in_parallel(pool, cuts.number(), [&](int64_t piece) {
    const int64_t call = cuts.call(piece), first = call * cuts.rows * length;
    Rows task{};
    task.x = at(x, first);
    task.added = sum ? at(residual, first) : nullptr;
    task.scale = at(scale, call * length);
    task.bias = at(bias, call * length);
    task.sum = sum ? to(*sum, first) : nullptr;
    task.out = to(y, first);
    task.length = length;
    task.epsilon = epsilon;
    task.centered = centered;
    kernels().forward[pair](task, cuts.begin(piece), cuts.end(piece));
  });
  return ffi::Error::Success();
}

ffi::Error forward(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer scale, AnyBuffer bias, Output y,
                   bool centered, double epsilon) {
  return run_forward(pool, x, x, scale, bias, nullptr, *y, centered, epsilon);
}

ffi::Error add_forward(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer residual, AnyBuffer scale,
                       AnyBuffer bias, Output sum, Output y, bool centered, double epsilon) {
  if (residual.element_type() != x.element_type() || count_of(residual) != count_of(x)) {
    return refused("residual");
  }
  return run_forward(pool, x, residual, scale, bias, &*sum, *y, centered, epsilon);
}

ffi::Error backward(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer scale, AnyBuffer dy,
                    AnyBuffer dsum, Output dx, Output dscale, Output dbias, bool centered,
                    double epsilon) {
  const int pair = pair_of(x, dy);
  if (pair == kPairs) return refused("dtypes of x and dy");
  if (count_of(dy) != count_of(x)) return refused("shape of dy");
  if (count_of(dsum) && dsum.element_type() != x.element_type()) return refused("dtype of ds");
  const int64_t length = dscale->dimensions().back();
  if (!length || !count_of(*dscale)) return ffi::Error::Success();
  const Cuts cuts(count_of(*dscale) / length, count_of(x) / length, length, threads_of(pool));
  const int64_t line = 2 * length;
  Memory sums = zeros(cuts.number() * line);
  Memory work(new (std::nothrow) double[cuts.number() * line]);
  if (!sums || !work) return no_memory();
  in_parallel(pool, cuts.number(), [&](int64_t piece) {
    const int64_t call = cuts.call(piece), first = call * cuts.rows * length;
    Rows task{};
    task.x = at(x, first);
    task.added = at(dsum, first);
    task.dy = at(dy, first);
    task.scale = at(scale, call * length);
    task.out = to(*dx, first);
    task.length = length;
    task.epsilon = epsilon;
    task.centered = centered;
    kernels().backward[pair](task, cuts.begin(piece), cuts.end(piece), &sums[piece * line],
                             &work[piece * line]);
  });
  add_up(cuts, sums.get(), length, *dscale, *dbias);
  return ffi::Error::Success();
}

// Sums down the columns of each call; of dy too, where there is one.
ffi::Error run_columns(ffi::ThreadPool& pool, const AnyBuffer& x, const AnyBuffer* dy,
                       const double* pivots, const Cuts& cuts, int64_t length, Memory& sums) {
  const int pair = pair_of(x, dy ? *dy : x);
  if (pair == kPairs || pair == kF64) return refused("dtypes of columns");
  const int64_t lines = (dy ? 4 : 2) * length;
  sums = zeros(cuts.number() * lines);
  if (!sums) return no_memory();
  in_parallel(pool, cuts.number(), [&](int64_t piece) {
    const int64_t call = cuts.call(piece), begin = cuts.begin(piece);
    const int64_t first = (call * cuts.rows + begin) * length;
    const Columns columns{at(x, first), dy ? at(*dy, first) : nullptr, cuts.end(piece) - begin,
                          length};
    kernels().columns[pair](columns, 0, length, pivots + call * length, &sums[piece * lines],
                            length);
  });
  return ffi::Error::Success();
}

// A power of two that brings a deviation to 2^50; one, for those that are no larger.
double unit_of(double var) {
  if (!(var > 0x1p100 && std::isfinite(var))) return 1;
  return std::ldexp(1, std::ilogb(std::sqrt(var)) - 50);
}

ffi::Error column_moments(ffi::ThreadPool pool, AnyBuffer x, Output unit, Output mean, Output rest,
                          Output var) {
  const int64_t length = unit->dimensions().back();
  if (!length || !count_of(*unit) || !count_of(x)) return refused("empty columns");
  const int64_t batch = count_of(*unit) / length;
  const Cuts cuts(batch, count_of(x) / length, length, threads_of(pool));
  // Columns are summed about their first entries: what a row adds up to by itself.
  Memory pivots = zeros(batch * length), sums, zero = zeros(length);
  Memory row = zeros(2 * length);
  if (!pivots || !zero || !row) return no_memory();
  const int pair = pair_of(x, x);
  if (pair == kPairs || pair == kF64) return refused("dtype of columns");
  for (int64_t call = 0; call < batch; ++call) {
    const Columns first{at(x, call * cuts.rows * length), nullptr, 1, length};
    std::fill_n(row.get(), 2 * length, 0.0);
    kernels().columns[pair](first, 0, length, zero.get(), row.get(), length);
    std::copy_n(row.get(), length, &pivots[call * length]);
  }
  if (auto error = run_columns(pool, x, nullptr, pivots.get(), cuts, length, sums);
      error.failure()) {
    return error;
  }
  const double n = double(cuts.rows);
  for (int64_t i = 0; i < batch * length; ++i) {
    double d = 0, squares = 0;
    for (int64_t piece = i / length * cuts.pieces; piece < (i / length + 1) * cuts.pieces; ++piece) {
      d += sums[2 * piece * length + i % length];
      squares += sums[(2 * piece + 1) * length + i % length];
    }
    const double above = d / n, variance = std::max(squares / n - above * above, 0.0);
    const double per_unit = 1 / unit_of(variance);
    const double center = (pivots[i] + above) * per_unit;
    auto write = [i](const AnyBuffer& output, double value) {
      static_cast<float*>(output.untyped_data())[i] = float(value);
    };
    write(*unit, 1 / per_unit);
    write(*mean, center);
    write(*rest, center - double(float(center)));
    // A sum that is no number is none here, either.
    write(*var, std::isnan(squares) ? squares : variance * per_unit * per_unit);
  }
  return ffi::Error::Success();
}

ffi::Error column_gradients(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer dy, AnyBuffer unit,
                            AnyBuffer mean, AnyBuffer rest, AnyBuffer var, Output dscale,
                            Output dbias, double epsilon) {
  const int64_t length = dscale->dimensions().back();
  if (!length || !count_of(*dscale) || !count_of(x)) return refused("empty columns");
  if (count_of(dy) != count_of(x)) return refused("shape of dy");
  const int64_t lines = count_of(*dscale);
  const Cuts cuts(lines / length, count_of(x) / length, length, threads_of(pool));
  Memory pivots = zeros(lines), sums;
  if (!pivots) return no_memory();
  auto given = [](const AnyBuffer& buffer, int64_t i, double otherwise) {
    return buffer.element_count() ? double(static_cast<const float*>(buffer.untyped_data())[i])
                                  : otherwise;
  };
  for (int64_t i = 0; i < lines; ++i) {
    pivots[i] = (given(mean, i, 0) + given(rest, i, 0)) * given(unit, i, 1);
  }
  if (auto error = run_columns(pool, x, &dy, pivots.get(), cuts, length, sums); error.failure()) {
    return error;
  }
  for (int64_t i = 0; i < lines; ++i) {
    double ones = 0, along = 0;
    for (int64_t piece = i / length * cuts.pieces; piece < (i / length + 1) * cuts.pieces; ++piece) {
      ones += sums[(4 * piece + 2) * length + i % length];
      along += sums[(4 * piece + 3) * length + i % length];
    }
    const double size = given(unit, i, 1);
    const double squared = given(var, i, 0) * size * size + epsilon;
    static_cast<float*>(dscale->untyped_data())[i] =
        float(squared == 0 ? 0 : along / std::sqrt(squared));
    static_cast<float*>(dbias->untyped_data())[i] = float(ones);
  }
  return ffi::Error::Success();
}

// Calls task(groups, piece, begin, end, work) for each piece of examples and strip of groups.
template <class Task>
ffi::Error each_strip(ffi::ThreadPool& pool, const Cuts& cuts, const Groups& like, int64_t width,
                      const Task& task) {
  const int64_t members = like.members, rows = std::max<int64_t>(1, like.columns.rows);
  int64_t strip = std::max(kTogether, kGroupEntries / rows);
  strip = std::min(width, (strip + members - 1) / members * members);
  const int64_t strips = (width + strip - 1) / strip;
  const int64_t room = kGroupLines * (strip + kMargin);
  Memory work(new (std::nothrow) double[cuts.number() * strips * room]);
  if (!work) return no_memory();
  in_parallel(pool, cuts.number() * strips, [&](int64_t item) {
    const int64_t piece = item / strips, begin = item % strips * strip;
    task(piece, begin, std::min(begin + strip, width), &work[item * room]);
  });
  return ffi::Error::Success();
}

ffi::Error groups_forward(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer scale, AnyBuffer bias,
                          Output y, bool centered, double epsilon) {
  const int pair = pair_of(x, *y);
  if (pair == kPairs || pair == kF64) return refused("dtypes of groups");
  const auto shape = x.dimensions();
  if (shape.size() < 4) return refused("rank of groups");
  if (!count_of(x)) return ffi::Error::Success();
  const int64_t members = shape.back(), width = members * shape[shape.size() - 2];
  const int64_t rows = shape[shape.size() - 3];
  const int64_t batch = std::max<int64_t>(1, std::max(count_of(scale), count_of(bias)) / width);
  const Cuts cuts(batch, count_of(x) / (rows * width), rows * width, threads_of(pool));
  Groups like{{nullptr, nullptr, rows, width}, nullptr, nullptr, nullptr, members, epsilon, centered};
  auto task = [&](int64_t piece, int64_t begin, int64_t end, double* work) {
    const int64_t call = cuts.call(piece);
    Groups groups = like;
    groups.scale = static_cast<const float*>(at(scale, call * width));
    groups.bias = static_cast<const float*>(at(bias, call * width));
    for (int64_t example = cuts.begin(piece); example < cuts.end(piece); ++example) {
      const int64_t first = (call * cuts.rows + example) * rows * width;
      groups.columns.x = at(x, first);
      groups.out = to(*y, first);
      kernels().groups_forward[pair](groups, begin, end, work);
    }
  };
  return each_strip(pool, cuts, like, width, task);
}

ffi::Error groups_backward(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer scale, AnyBuffer dy,
                           Output dx, Output dscale, Output dbias, bool centered, double epsilon) {
  const int pair = pair_of(x, dy);
  if (pair == kPairs || pair == kF64) return refused("dtypes of groups");
  const auto shape = x.dimensions();
  if (shape.size() < 4) return refused("rank of groups");
  if (count_of(dy) != count_of(x)) return refused("shape of dy");
  const int64_t members = shape.back(), width = members * shape[shape.size() - 2];
  const int64_t rows = shape[shape.size() - 3];
  if (!rows || !count_of(*dscale)) return refused("empty groups");
  const Cuts cuts(count_of(*dscale) / width, count_of(x) / (rows * width), rows * width,
                  threads_of(pool));
  Memory sums = zeros(cuts.number() * 2 * width);
  if (!sums) return no_memory();
  Groups like{{nullptr, nullptr, rows, width}, nullptr, nullptr, nullptr, members, epsilon, centered};
  auto task = [&](int64_t piece, int64_t begin, int64_t end, double* work) {
    const int64_t call = cuts.call(piece);
    Groups groups = like;
    groups.scale = static_cast<const float*>(at(scale, call * width));
    for (int64_t example = cuts.begin(piece); example < cuts.end(piece); ++example) {
      const int64_t first = (call * cuts.rows + example) * rows * width;
      groups.columns.x = at(x, first);
      groups.columns.dy = at(dy, first);
      groups.out = to(*dx, first);
      kernels().groups_backward[pair](groups, begin, end, work, &sums[piece * 2 * width], width);
    }
  };
  if (auto error = each_strip(pool, cuts, like, width, task); error.failure()) return error;
  add_up(cuts, sums.get(), width, *dscale, *dbias);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace normax

using xla::ffi::AnyBuffer;
using xla::ffi::Ffi;
using xla::ffi::ThreadPool;

XLA_FFI_DEFINE_HANDLER_SYMBOL(normax_forward, normax::forward,
                              Ffi::Bind()
                                  .Ctx<ThreadPool>()
                                  .Arg<AnyBuffer>()  // x
                                  .Arg<AnyBuffer>()  // scale
                                  .Arg<AnyBuffer>()  // bias
                                  .Ret<AnyBuffer>()  // y
                                  .Attr<bool>("centered")
                                  .Attr<double>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(normax_add_forward, normax::add_forward,
                              Ffi::Bind()
                                  .Ctx<ThreadPool>()
                                  .Arg<AnyBuffer>()  // x
                                  .Arg<AnyBuffer>()  // residual
                                  .Arg<AnyBuffer>()  // scale
                                  .Arg<AnyBuffer>()  // bias
                                  .Ret<AnyBuffer>()  // x + residual
                                  .Ret<AnyBuffer>()  // y
                                  .Attr<bool>("centered")
                                  .Attr<double>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(normax_backward, normax::backward,
                              Ffi::Bind()
                                  .Ctx<ThreadPool>()
                                  .Arg<AnyBuffer>()  // x
                                  .Arg<AnyBuffer>()  // scale
                                  .Arg<AnyBuffer>()  // dy
                                  .Arg<AnyBuffer>()  // cotangent of x + residual
                                  .Ret<AnyBuffer>()  // dx
                                  .Ret<AnyBuffer>()  // dscale
                                  .Ret<AnyBuffer>()  // dbias
                                  .Attr<bool>("centered")
                                  .Attr<double>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(normax_groups_forward, normax::groups_forward,
                              Ffi::Bind()
                                  .Ctx<ThreadPool>()
                                  .Arg<AnyBuffer>()  // x
                                  .Arg<AnyBuffer>()  // scale
                                  .Arg<AnyBuffer>()  // bias
                                  .Ret<AnyBuffer>()  // y
                                  .Attr<bool>("centered")
                                  .Attr<double>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(normax_groups_backward, normax::groups_backward,
                              Ffi::Bind()
                                  .Ctx<ThreadPool>()
                                  .Arg<AnyBuffer>()  // x
                                  .Arg<AnyBuffer>()  // scale
                                  .Arg<AnyBuffer>()  // dy
                                  .Ret<AnyBuffer>()  // dx
                                  .Ret<AnyBuffer>()  // dscale
                                  .Ret<AnyBuffer>()  // dbias
                                  .Attr<bool>("centered")
                                  .Attr<double>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(normax_column_moments, normax::column_moments,
                              Ffi::Bind()
                                  .Ctx<ThreadPool>()
                                  .Arg<AnyBuffer>()  // x
                                  .Ret<AnyBuffer>()  // unit
                                  .Ret<AnyBuffer>()  // mean
                                  .Ret<AnyBuffer>()  // rest
                                  .Ret<AnyBuffer>());  // var

XLA_FFI_DEFINE_HANDLER_SYMBOL(normax_column_gradients, normax::column_gradients,
                              Ffi::Bind()
                                  .Ctx<ThreadPool>()
                                  .Arg<AnyBuffer>()  // x
                                  .Arg<AnyBuffer>()  // dy
                                  .Arg<AnyBuffer>()  // unit
                                  .Arg<AnyBuffer>()  // mean
                                  .Arg<AnyBuffer>()  // rest
                                  .Arg<AnyBuffer>()  // var
                                  .Ret<AnyBuffer>()  // dscale
                                  .Ret<AnyBuffer>()  // dbias
                                  .Attr<double>("epsilon"));

// A runtime older than the headers refuses their handlers, and then has no devices at all: so it
// is asked first.
extern "C" void normax_ffi_version(int32_t* major, int32_t* minor) {
  *major = XLA_FFI_API_MAJOR;
  *minor = XLA_FFI_API_MINOR;
}
