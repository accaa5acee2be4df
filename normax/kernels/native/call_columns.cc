// What XLA calls for columns: their moments, sums with a gradient, and what they are made into.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "buffers.h"

namespace normax {
namespace {

constexpr int64_t kExactRows = 256;  // of fewer, one rounding to float32 would show
constexpr int64_t kSamples = 16;     // a power of two: of equal entries the mean is exact
constexpr int64_t kWriters = 4;      // more pieces than of sums: what is written is in no order
constexpr double kPerUnitOfLarge = 0x1p-600;  // so that squares of 1e150 to 1e308 are in range

// Sums down the columns of each call, as kernels.h has them.
ffi::Error run_columns(ffi::ThreadPool& pool, const AnyBuffer& x, const AnyBuffer* dy, bool exact,
                       const About& about, const Cuts& cuts, int64_t length, Memory& sums) {
  const int pair = pair_of(x, dy ? *dy : x);
  if (pair == kPairs) return refused("dtypes of columns");
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
    kernels().sum_columns[pair](columns, exact, about.from(call * length),
                                &sums[2 * piece * length], length);
  });
  return ffi::Error::Success();
}

// A power of two that brings a deviation to 2^50; one, for those that are no larger.
double unit_of(double deviation) {
  if (!(deviation > 0x1p50 && std::isfinite(deviation))) return 1;
  return std::ldexp(1, std::ilogb(deviation) - 50);
}

// The moments of a column in units of which there are `per_unit` in one: its mean is pivot + above.
struct Moments {
  double pivot, above, var, per_unit;
};

// Those of column i of all calls, by what it was summed about.
Moments moments_of(const Cuts& cuts, const double* sums, int64_t length, int64_t i, double pivot,
                   double per_unit) {
  auto mean_of = [&](int line) {
    return sum_of_pieces(cuts, sums, length, i / length, 2, line, i % length) / double(cuts.rows);
  };
  const double above = mean_of(0);
  return {pivot, above, mean_of(1) - above * above, per_unit};
}

void write(const Moments& m, int64_t i, const Line& unit, const Line& mean, const Line& rest,
           const Line& var) {
  // A sum that is no number is none here, either.
  const double variance = m.var < 0 ? 0 : m.var, size = unit_of(std::sqrt(variance) / m.per_unit);
  const double factor = 1 / size / m.per_unit, pivot = m.pivot * factor, above = m.above * factor;
  unit.write(i, size);
  mean.write(i, pivot + above);
  rest.write(i, (pivot - mean[i]) + above);
  var.write(i, variance * factor * factor);
}

// Of float64 entries all 16 digits are asked for: columns are summed about their first entries, and
// again about the mean; in a unit where the squares of large ones are not in range.
ffi::Error moments_of_doubles(ffi::ThreadPool& pool, const AnyBuffer& x, const Cuts& cuts,
                              int64_t length, std::vector<Moments>& found) {
  const int64_t all = cuts.batch * length;
  Memory pivots = zeros(all), per_units = zeros(all), sums;
  if (!pivots || !per_units) return no_memory();
  std::fill_n(per_units.get(), all, 1.0);
  found.resize(size_t(all));
  auto measure = [&] {
    const About about{pivots.get(), pivots.get(), per_units.get()};
    auto error = run_columns(pool, x, nullptr, true, about, cuts, length, sums);
    for (int64_t i = 0; i < all && error.success(); ++i) {
      found[i] = moments_of(cuts, sums.get(), length, i, pivots[i], per_units[i]);
    }
    return error;
  };
  for (bool in_range = false; !in_range;) {
    for (int64_t i = 0; i < all; ++i) {
      auto first = static_cast<const double*>(at(x, i / length * cuts.rows * length));
      pivots[i] = first[i % length] * per_units[i];
    }
    if (auto error = measure(); error.failure()) return error;
    in_range = true;
    for (int64_t i = 0; i < all; ++i) {
      pivots[i] += found[i].above;
      if (std::isfinite(found[i].var) || per_units[i] != 1) continue;
      per_units[i] = kPerUnitOfLarge;
      in_range = false;
    }
  }
  return measure();
}

// Others are summed about what is near their mean, in float32: that of a few entries, each being
// what a row of it adds up to.
ffi::Error moments_of_floats(ffi::ThreadPool& pool, int pair, const AnyBuffer& x, const Cuts& cuts,
                             int64_t length, std::vector<Moments>& found) {
  const int64_t all = cuts.batch * length;
  Memory pivots = zeros(all), zero = zeros(length), row = zeros(2 * length), sums;
  if (!pivots || !zero || !row) return no_memory();
  const int64_t samples = cuts.rows < kExactRows ? 1 : kSamples;
  for (int64_t call = 0; call < cuts.batch; ++call) {
    std::fill_n(row.get(), 2 * length, 0.0);
    for (int64_t i = 0; i < samples; ++i) {
      Columns one{};
      one.x = at(x, (call * cuts.rows + cuts.rows * i / samples) * length);
      one.rows = 1;
      one.stride = length;
      const About about{zero.get(), zero.get(), zero.get()};
      kernels().sum_columns[pair](one, true, about, row.get(), length);
    }
    for (int64_t i = 0; i < length; ++i) {
      pivots[call * length + i] = double(float(row[i] / double(samples)));
    }
  }
  found.resize(size_t(all));
  for (bool exact : {false, true}) {
    if (!exact && cuts.rows < kExactRows) continue;
    const About about{pivots.get(), pivots.get(), pivots.get()};
    auto error = run_columns(pool, x, nullptr, exact, about, cuts, length, sums);
    if (error.failure()) return error;
    bool enough = true;
    for (int64_t i = 0; i < all; ++i) {
      found[i] = moments_of(cuts, sums.get(), length, i, pivots[i], 1);
      enough = enough && are_enough(found[i].above, found[i].var, kLeastEpsilon);
    }
    if (enough) break;
  }
  return ffi::Error::Success();
}

ffi::Error column_moments(ffi::ThreadPool pool, AnyBuffer x, Output unit, Output mean, Output rest,
                          Output var) {
  const int64_t length = unit->dimensions().back();
  if (!length || !count_of(*unit) || !count_of(x)) return refused("empty columns");
  const int pair = pair_of(x, x);
  if (pair == kPairs) return refused("dtype of columns");
  const Cuts cuts(count_of(*unit) / length, count_of(x) / length, length, threads_of(pool));
  std::vector<Moments> found;
  auto error = pair == kF64 ? moments_of_doubles(pool, x, cuts, length, found)
                            : moments_of_floats(pool, pair, x, cuts, length, found);
  if (error.failure()) return error;
  for (size_t i = 0; i < found.size(); ++i) {
    write(found[i], int64_t(i), Line(*unit), Line(*mean), Line(*rest), Line(*var));
  }
  return ffi::Error::Success();
}

// Whether each buffer has so many numbers of a type; or, of those that may be absent, none.
template <class... Buffers>
bool are_lines(ffi::DataType type, int64_t count, const Buffers&... buffers) {
  return ((buffers.element_type() == type && count_of(buffers) == count) && ...);
}
template <class... Buffers>
bool may_be_lines(ffi::DataType type, int64_t count, const Buffers&... buffers) {
  return ((!count_of(buffers) || are_lines(type, count, buffers)) && ...);
}

// What was measured of columns, as it was kept: in units, an array that is not there being one or
// zero. Of entries that are not float64 it is given back in none, in double precision.
struct Measured {
  Line unit_, mean_, rest_, var_;
  double epsilon;
  bool wide;

  Measured(const AnyBuffer& x, const AnyBuffer& unit, const AnyBuffer& mean, const AnyBuffer& rest,
           const AnyBuffer& var, double epsilon)
      : unit_(unit),
        mean_(mean),
        rest_(rest),
        var_(var),
        epsilon(epsilon),
        wide(x.element_type() == ffi::F64) {}

  double size(int64_t i) const { return wide ? 1 : unit_.or_else(i, 1); }
  double per_unit(int64_t i) const { return wide ? 1 / unit_.or_else(i, 1) : 1; }
  double mean(int64_t i) const {
    return (mean_.or_else(i, 0) + (wide ? 0 : rest_.or_else(i, 0))) * size(i);
  }
  double rest(int64_t i) const { return wide ? rest_.or_else(i, 0) : 0; }
  double reciprocal(int64_t i) const {
    const double squared = var_[i] * size(i) * size(i) + epsilon * per_unit(i) * per_unit(i);
    return squared == 0 ? 0 : 1 / std::sqrt(squared);
  }
  void fill(const Lines& line, int64_t i) const {
    *line.mean = mean(i);
    *line.rest = rest(i);
    *line.rstd = reciprocal(i);
    *line.per_unit = per_unit(i);
  }
};

ffi::Error column_gradients(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer dy, AnyBuffer unit,
                            AnyBuffer mean, AnyBuffer rest, AnyBuffer var, Output dscale,
                            Output dbias, double epsilon) {
  const int64_t length = dscale->dimensions().back();
  if (!length || !count_of(*dscale) || !count_of(x)) return refused("empty columns");
  if (count_of(dy) != count_of(x)) return refused("shape of dy");
  const int64_t lines = count_of(*dscale);
  const auto type = line_type_of(x);
  if (!are_lines(type, lines, var, *dscale, *dbias) ||
      !may_be_lines(type, lines, unit, mean, rest)) {
    return refused("moments");
  }
  const Cuts cuts(lines / length, count_of(x) / length, length, threads_of(pool));
  const Measured measured(x, unit, mean, rest, var, epsilon);
  Memory pivots = zeros(lines), rstds = zeros(lines), per_units = zeros(lines), sums;
  if (!pivots || !rstds || !per_units) return no_memory();
  bool exact = cuts.rows < kExactRows || measured.wide;
  for (int64_t i = 0; i < lines; ++i) {
    pivots[i] = measured.mean(i);
    rstds[i] = measured.reciprocal(i);
    per_units[i] = measured.per_unit(i);
    exact = exact || !(rstds[i] == 0 || fits(rstds[i]));
  }
  const About about{pivots.get(), rstds.get(), per_units.get()};
  for (;;) {
    auto error = run_columns(pool, x, &dy, exact, about, cuts, length, sums);
    if (error.failure()) return error;
    auto is_number = [](double v) { return std::isfinite(v); };
    if (exact || std::all_of(&sums[0], &sums[0] + 2 * cuts.number() * length, is_number)) break;
    exact = true;
  }
  for (int64_t piece = 0; piece < cuts.number() && measured.wide; ++piece) {
    for (int64_t i = 0; i < length; ++i) {
      const int64_t at = cuts.call(piece) * length + i;
      double* line = &sums[2 * piece * length + i];
      line[length] -= measured.rest(at) * rstds[at] * line[0];
    }
  }
  add_up(cuts, sums.get(), length, *dbias, *dscale);
  return ffi::Error::Success();
}

// Writes y or dx, of lines that fill(lines, i) makes for column i of all calls.
template <class Fill>
ffi::Error write_columns(ffi::ThreadPool& pool, int pair, const AnyBuffer& x, const AnyBuffer* dy,
                         const AnyBuffer& out, int64_t length, int64_t all, const Fill& fill) {
  if (pair == kPairs) return refused("dtypes of columns");
  if (!length || !all || !count_of(x)) return refused("empty columns");
  Memory memory = zeros(kLines * all);
  const Cuts cuts(all / length, count_of(x) / length, length, kWriters * threads_of(pool));
  const int64_t room = kFactorLines * length;
  Memory work = room_for(workers_for(pool, cuts.number()) * room);
  if (!memory || !work) return no_memory();
  auto from = [&](int64_t i) { return lines_in(memory.get() + i, all); };
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
  const auto type = line_type_of(x);
  if (!are_lines(type, lines, var) || !may_be_lines(type, lines, unit, mean, rest, scale, bias)) {
    return refused("moments, scale or bias");
  }
  const Measured measured(x, unit, mean, rest, var, epsilon);
  const Line gains(scale), shifts(bias);
  auto fill = [&](const Lines& line, int64_t i) {
    measured.fill(line, i);
    *line.gain = gains.or_else(i, 1) * (measured.wide ? 1 : *line.rstd);
    *line.shift = shifts.or_else(i, 0);
  };
  return write_columns(pool, pair_of(x, *y), x, nullptr, *y, x.dimensions().back(), lines, fill);
}

ffi::Error columns_backward(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer scale, AnyBuffer dy,
                            AnyBuffer unit, AnyBuffer mean, AnyBuffer rest, AnyBuffer var,
                            AnyBuffer along, AnyBuffer ones, Output dx, double epsilon,
                            double count) {
  if (count_of(dy) != count_of(x)) return refused("shape of dy");
  const int64_t lines = count_of(var);
  const auto type = line_type_of(x);
  if (!are_lines(type, lines, var, along, ones) ||
      !may_be_lines(type, lines, unit, mean, rest, scale)) {
    return refused("moments, sums or scale");
  }
  const Measured measured(x, unit, mean, rest, var, epsilon);
  const Line gains(scale), dscale(along), dbias(ones);
  auto fill = [&](const Lines& line, int64_t i) {
    measured.fill(line, i);
    *line.gain = gains.or_else(i, 1);
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
