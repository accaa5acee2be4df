// What XLA calls for columns: their moments, sums with a gradient, and what they are made into.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "buffers.h"

namespace normax {
namespace {

constexpr int64_t kExactRows = 256;  // of fewer, one rounding to float32 would show
constexpr int64_t kSamples = 16;     // a power of two: of equal entries the mean is exact
constexpr int64_t kWriters = 4;      // more pieces than of sums: what is written is in no order

// Sums down the columns of each call, as kernels.h has them.
ffi::Error run_columns(ffi::ThreadPool& pool, const AnyBuffer& x, const AnyBuffer* dy, bool exact,
                       const double* pivots, const double* rstds, const Cuts& cuts, int64_t length,
                       Memory& sums) {
  const int pair = pair_of(x, dy ? *dy : x);
  if (pair == kPairs || pair == kF64) return refused("dtypes of columns");
  sums = zeros(cuts.number() * 2 * length);
  if (!sums) return no_memory();
  in_parallel(pool, cuts.number(), [&](int64_t piece, int64_t) {
    const int64_t call = cuts.call(piece), begin = cuts.begin(piece);
    const int64_t first = (call * cuts.rows + begin) * length;
    Columns columns{};
    columns.x = at(x, first);
    columns.dy = dy ? at(*dy, first) : nullptr;
    columns.rows = cuts.end(piece) - begin;
    columns.stride = length;
    kernels().sum_columns[pair](columns, exact, pivots + call * length, rstds + call * length,
                                &sums[2 * piece * length], length);
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
  Memory pivots = zeros(batch * length), sums, zero = zeros(length);
  Memory row = zeros(2 * length);
  if (!pivots || !zero || !row) return no_memory();
  const int pair = pair_of(x, x);
  if (pair == kPairs || pair == kF64) return refused("dtype of columns");
  // Columns are summed about what is near their mean, in float32: that of a few entries, each being
  // what a row of it adds up to.
  const int64_t samples = cuts.rows < kExactRows ? 1 : kSamples;
  for (int64_t call = 0; call < batch; ++call) {
    std::fill_n(row.get(), 2 * length, 0.0);
    for (int64_t i = 0; i < samples; ++i) {
      Columns one{};
      one.x = at(x, (call * cuts.rows + cuts.rows * i / samples) * length);
      one.rows = 1;
      one.stride = length;
      kernels().sum_columns[pair](one, true, zero.get(), zero.get(), row.get(), length);
    }
    for (int64_t i = 0; i < length; ++i) {
      pivots[call * length + i] = double(float(row[i] / double(samples)));
    }
  }
  const double n = double(cuts.rows);
  auto measured = [&](int64_t i) {
    auto mean_of = [&](int line) {
      return sum_of_pieces(cuts, sums.get(), length, i / length, 2, line, i % length) / n;
    };
    const double above = mean_of(0);
    return std::pair(above, mean_of(1) - above * above);
  };
  for (bool exact : {false, true}) {
    if (!exact && cuts.rows < kExactRows) continue;
    auto error = run_columns(pool, x, nullptr, exact, pivots.get(), pivots.get(), cuts, length,
                             sums);
    if (error.failure()) return error;
    bool enough = true;
    for (int64_t i = 0; i < batch * length && enough; ++i) {
      const auto [above, variance] = measured(i);
      enough = are_enough(above, variance, kLeastEpsilon);
    }
    if (enough) break;
  }
  for (int64_t i = 0; i < batch * length; ++i) {
    const auto [above, found] = measured(i);
    const double variance = std::max(found, 0.0);
    const double per_unit = 1 / unit_of(variance);
    const double center = (pivots[i] + above) * per_unit;
    auto write = [i](const AnyBuffer& output, double value) {
      static_cast<float*>(output.untyped_data())[i] = float(value);
    };
    write(*unit, 1 / per_unit);
    write(*mean, center);
    write(*rest, center - double(float(center)));
    // A sum that is no number is none here, either.
    write(*var, std::isnan(found) ? found : variance * per_unit * per_unit);
  }
  return ffi::Error::Success();
}

// Whether each buffer has so many entries of float32; or, of those that may be absent, none.
template <class... Buffers>
bool are_lines(int64_t count, const Buffers&... buffers) {
  return ((buffers.element_type() == ffi::F32 && count_of(buffers) == count) && ...);
}
template <class... Buffers>
bool may_be_lines(int64_t count, const Buffers&... buffers) {
  return ((!count_of(buffers) || are_lines(count, buffers)) && ...);
}

// What was measured of columns, as it was kept: in units, an array that is not there being one or
// zero.
struct Measured {
  const float *unit, *mean, *rest, *var;
  double epsilon;

  Measured(const AnyBuffer& unit, const AnyBuffer& mean, const AnyBuffer& rest,
           const AnyBuffer& var, double epsilon)
      : unit(entries(unit)),
        mean(entries(mean)),
        rest(entries(rest)),
        var(entries(var)),
        epsilon(epsilon) {}

  static const float* entries(const AnyBuffer& buffer) {
    return static_cast<const float*>(at(buffer, 0));
  }
  double size(int64_t i) const { return unit ? unit[i] : 1; }
  double center(int64_t i) const {
    return ((mean ? double(mean[i]) : 0) + (rest ? double(rest[i]) : 0)) * size(i);
  }
  double reciprocal(int64_t i) const {
    const double squared = double(var[i]) * size(i) * size(i) + epsilon;
    return squared == 0 ? 0 : 1 / std::sqrt(squared);
  }
};

ffi::Error column_gradients(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer dy, AnyBuffer unit,
                            AnyBuffer mean, AnyBuffer rest, AnyBuffer var, Output dscale,
                            Output dbias, double epsilon) {
  const int64_t length = dscale->dimensions().back();
  if (!length || !count_of(*dscale) || !count_of(x)) return refused("empty columns");
  if (count_of(dy) != count_of(x)) return refused("shape of dy");
  const int64_t lines = count_of(*dscale);
  if (!are_lines(lines, var) || !may_be_lines(lines, unit, mean, rest)) return refused("moments");
  const Cuts cuts(lines / length, count_of(x) / length, length, threads_of(pool));
  const Measured measured(unit, mean, rest, var, epsilon);
  Memory pivots = zeros(lines), rstds = zeros(lines), sums;
  if (!pivots || !rstds) return no_memory();
  bool exact = cuts.rows < kExactRows;
  for (int64_t i = 0; i < lines; ++i) {
    pivots[i] = measured.center(i);
    rstds[i] = measured.reciprocal(i);
    exact = exact || !(rstds[i] == 0 || fits(rstds[i]));
  }
  for (;;) {
    auto error = run_columns(pool, x, &dy, exact, pivots.get(), rstds.get(), cuts, length, sums);
    if (error.failure()) return error;
    auto is_number = [](double v) { return std::isfinite(v); };
    if (exact || std::all_of(&sums[0], &sums[0] + 2 * cuts.number() * length, is_number)) break;
    exact = true;
  }
  add_up(cuts, sums.get(), length, *dbias, *dscale);
  return ffi::Error::Success();
}

// Writes y or dx, of lines that fill(lines, i) makes for column i of all calls.
template <class Fill>
ffi::Error write_columns(ffi::ThreadPool& pool, int pair, const AnyBuffer& x, const AnyBuffer* dy,
                         const AnyBuffer& out, int64_t length, int64_t all, const Fill& fill) {
  if (pair == kPairs || pair == kF64) return refused("dtypes of columns");
  if (!length || !all || !count_of(x)) return refused("empty columns");
  constexpr int64_t kLines = 5;
  Memory memory = zeros(kLines * all);
  const Cuts cuts(all / length, count_of(x) / length, length, kWriters * threads_of(pool));
  const int64_t room = kFactorLines * length;
  Memory work = room_for(workers_for(pool, cuts.number()) * room);
  if (!memory || !work) return no_memory();
  auto from = [&](int64_t i) {
    double* line = memory.get() + i;
    return Lines{line, line + all, line + 2 * all, line + 3 * all, line + 4 * all};
  };
  for (int64_t i = 0; i < all; ++i) fill(from(i), i);
  in_parallel(pool, cuts.number(), [&](int64_t item, int64_t worker) {
    // The last piece first: of what was summed it is the last that is still in a cache.
    const int64_t piece = cuts.number() - 1 - item;
    const int64_t call = cuts.call(piece), begin = cuts.begin(piece);
    const int64_t first = (call * cuts.rows + begin) * length;
    Columns columns{};
    columns.x = at(x, first);
    columns.dy = dy ? at(*dy, first) : nullptr;
    columns.out = to(out, first);
    columns.rows = cuts.end(piece) - begin;
    columns.stride = length;
    columns.past = is_past(out, length);
    kernels().write_columns[pair](columns, from(call * length), length, &work[worker * room]);
  });
  return ffi::Error::Success();
}

ffi::Error columns_forward(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer scale, AnyBuffer bias,
                           AnyBuffer unit, AnyBuffer mean, AnyBuffer rest, AnyBuffer var, Output y,
                           double epsilon) {
  const int64_t lines = count_of(var);
  if (!are_lines(lines, var) || !may_be_lines(lines, unit, mean, rest, scale, bias)) {
    return refused("moments, scale or bias");
  }
  const Measured measured(unit, mean, rest, var, epsilon);
  auto gains = static_cast<const float*>(at(scale, 0));
  auto shifts = static_cast<const float*>(at(bias, 0));
  auto fill = [&](const Lines& line, int64_t i) {
    *line.mean = measured.center(i);
    *line.rstd = measured.reciprocal(i);
    *line.gain = gains ? gains[i] * *line.rstd : *line.rstd;
    *line.shift = shifts ? shifts[i] : 0;
  };
  return write_columns(pool, pair_of(x, *y), x, nullptr, *y, x.dimensions().back(), lines, fill);
}

ffi::Error columns_backward(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer scale, AnyBuffer dy,
                            AnyBuffer unit, AnyBuffer mean, AnyBuffer rest, AnyBuffer var,
                            AnyBuffer along, AnyBuffer ones, Output dx, double epsilon,
                            double count) {
  if (count_of(dy) != count_of(x)) return refused("shape of dy");
  const int64_t lines = count_of(var);
  if (!are_lines(lines, var, along, ones) || !may_be_lines(lines, unit, mean, rest, scale)) {
    return refused("moments, sums or scale");
  }
  const Measured measured(unit, mean, rest, var, epsilon);
  auto gains = static_cast<const float*>(at(scale, 0));
  auto dscale = static_cast<const float*>(at(along, 0));
  auto dbias = static_cast<const float*>(at(ones, 0));
  auto fill = [&](const Lines& line, int64_t i) {
    *line.mean = measured.center(i);
    *line.rstd = measured.reciprocal(i);
    *line.gain = gains ? gains[i] : 1;
    *line.shift = *line.gain * dbias[i] / count;
    *line.along = *line.gain * dscale[i] / count;
  };
  return write_columns(pool, pair_of(x, dy), x, &dy, *dx, x.dimensions().back(), lines, fill);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(normax_column_moments, column_moments,
                              Ffi::Bind()
                                  .Ctx<ThreadPool>()
                                  .Arg<AnyBuffer>()  // x
                                  .Ret<AnyBuffer>()  // unit
                                  .Ret<AnyBuffer>()  // mean
                                  .Ret<AnyBuffer>()  // rest
                                  .Ret<AnyBuffer>());  // var

XLA_FFI_DEFINE_HANDLER_SYMBOL(normax_columns_forward, columns_forward,
                              Ffi::Bind()
                                  .Ctx<ThreadPool>()
                                  .Arg<AnyBuffer>()  // x
                                  .Arg<AnyBuffer>()  // scale
                                  .Arg<AnyBuffer>()  // bias
                                  .Arg<AnyBuffer>()  // unit
                                  .Arg<AnyBuffer>()  // mean
                                  .Arg<AnyBuffer>()  // rest
                                  .Arg<AnyBuffer>()  // var
                                  .Ret<AnyBuffer>()  // y
                                  .Attr<double>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(normax_columns_backward, columns_backward,
                              Ffi::Bind()
                                  .Ctx<ThreadPool>()
                                  .Arg<AnyBuffer>()  // x
                                  .Arg<AnyBuffer>()  // scale
                                  .Arg<AnyBuffer>()  // dy
                                  .Arg<AnyBuffer>()  // unit
                                  .Arg<AnyBuffer>()  // mean
                                  .Arg<AnyBuffer>()  // rest
                                  .Arg<AnyBuffer>()  // var
                                  .Arg<AnyBuffer>()  // dscale
                                  .Arg<AnyBuffer>()  // dbias
                                  .Ret<AnyBuffer>()  // dx
                                  .Attr<double>("epsilon")
                                  .Attr<double>("count"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(normax_column_gradients, column_gradients,
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

}  // namespace normax
