// What XLA calls to sum columns: for their moments, and with a gradient.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "lines.h"

namespace normax {
namespace {

constexpr int64_t kExactRows = 256;  // of fewer, one rounding to float32 would show
constexpr int64_t kSamples = 16;     // a power of two: of equal entries the mean is exact
constexpr double kPerUnitOfLarge = 0x1p-600;  // so that squares of 1e150 to 1e308 are in range

// Sums down the columns of each call, as kernels.h has them.
ffi::Error run_columns(ffi::ThreadPool& pool, const AnyBuffer& x, const AnyBuffer* dy, bool exact,
                       const About& about, const Cuts& cuts, int64_t length, Memory& sums) {
  const int pair = pair_of(x, dy ? *dy : x);
  if (pair == kPairs) return refused("dtypes of columns");
  sums = room_for(cuts.number() * 2 * length);
  if (!sums) return no_memory();
  in_parallel(pool, cuts.number(), [&](int64_t piece, int64_t) {
    const int64_t call = cuts.call(piece), begin = cuts.begin(piece);
    const int64_t first = (call * cuts.rows + begin) * length;
    Columns columns{};
    columns.x = at(x, first);
    columns.dy = dy ? at(*dy, first) : nullptr;
    columns.rows = cuts.end(piece) - begin;
    columns.stride = length;
    double* found = &sums[2 * piece * length];
    std::fill_n(found, 2 * length, 0.0);
    kernels().sum_columns[pair](columns, exact, about.from(call * length), found, length);
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

// Those of all columns, by what they were summed about; the sums are spent.
void find_moments(const Cuts& cuts, double* sums, int64_t length, const double* pivots,
                  const double* per_units, std::vector<Moments>& found) {
  found.resize(size_t(cuts.batch * length));
  const double n = double(cuts.rows);
  for (int64_t call = 0; call < cuts.batch; ++call) {
    const double* line = sums_of_call(cuts, sums, 2 * length, call);
    for (int64_t i = 0; i < length; ++i) {
      const int64_t at = call * length + i;
      const double above = line[i] / n;
      found[size_t(at)] = {pivots[at], above, line[length + i] / n - above * above,
                           per_units ? per_units[at] : 1};
    }
  }
}

// Of float64 entries all 16 digits are asked for: columns are summed about their first entries, and
// again about the mean; in a unit where the squares of large ones are not in range.
ffi::Error moments_of_doubles(ffi::ThreadPool& pool, const AnyBuffer& x, const Cuts& cuts,
                              int64_t length, std::vector<Moments>& found) {
  const int64_t all = cuts.batch * length;
  Memory pivots = zeros(all), per_units = zeros(all), sums;
  if (!pivots || !per_units) return no_memory();
  std::fill_n(per_units.get(), all, 1.0);
  auto measure = [&] {
    const About about{pivots.get(), pivots.get(), per_units.get()};
    auto error = run_columns(pool, x, nullptr, true, about, cuts, length, sums);
    if (error.success()) {
      find_moments(cuts, sums.get(), length, pivots.get(), per_units.get(), found);
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
  for (bool exact : {false, true}) {
    if (!exact && cuts.rows < kExactRows) continue;
    const About about{pivots.get(), pivots.get(), pivots.get()};
    auto error = run_columns(pool, x, nullptr, exact, about, cuts, length, sums);
    if (error.failure()) return error;
    find_moments(cuts, sums.get(), length, pivots.get(), nullptr, found);
    auto enough = [](const Moments& m) { return are_enough(m.above, m.var, kLeastEpsilon); };
    if (std::all_of(found.begin(), found.end(), enough)) break;
  }
  return ffi::Error::Success();
}

ffi::Error column_moments(ffi::ThreadPool pool, AnyBuffer x, Output unit, Output mean, Output rest,
                          Output var) {
  const int64_t length = unit->dimensions().back();
  if (!length || !count_of(*unit) || !count_of(x)) return refused("empty columns");
  const int pair = pair_of(x, x);
  if (pair == kPairs) return refused("dtype of columns");
  const Cuts cuts(count_of(*unit) / length, count_of(x) / length, length, threads_of(pool),
                  kLeastRows);
  std::vector<Moments> found;
  auto error = pair == kF64 ? moments_of_doubles(pool, x, cuts, length, found)
                            : moments_of_floats(pool, pair, x, cuts, length, found);
  if (error.failure()) return error;
  const int64_t all = int64_t(found.size());
  Memory lines = zeros(4 * all);
  if (!lines) return no_memory();
  double *units = lines.get(), *means = units + all, *rests = means + all, *vars = rests + all;
  const bool wide = pair == kF64;
  for (int64_t i = 0; i < all; ++i) {
    const Moments& m = found[size_t(i)];
    // A sum that is no number is none here, either.
    const double variance = m.var < 0 ? 0 : m.var;
    double size = 1, factor = 1;
    if (m.per_unit != 1 || variance > 0x1p100) {
      size = unit_of(std::sqrt(variance) / m.per_unit);
      factor = 1 / size / m.per_unit;
    }
    const double pivot = m.pivot * factor, above = m.above * factor, sum = pivot + above;
    units[i] = size;
    means[i] = sum;
    // What the mean lacks, rounded to its dtype.
    rests[i] = (pivot - (wide ? sum : double(float(sum)))) + above;
    vars[i] = variance * factor * factor;
  }
  write(units, all, *unit);
  write(means, all, *mean);
  write(rests, all, *rest);
  write(vars, all, *var);
  return ffi::Error::Success();
}

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
  const Cuts cuts(lines / length, count_of(x) / length, length, threads_of(pool), kLeastRows);
  Memory memory = zeros(kLines * lines), sums;
  if (!memory) return no_memory();
  const Lines line = lines_in(memory.get(), lines);
  const bool wide = type == ffi::F64;
  Measured{unit, mean, rest, var, epsilon, wide}.fill(lines, line);
  bool exact = cuts.rows < kExactRows || wide;
  for (int64_t i = 0; i < lines && !exact; ++i) {
    exact = !(line.rstd[i] == 0 || fits(line.rstd[i]));
  }
  // What float32 lacks of a mean is not subtracted from entries, but its share from their sums.
  for (int64_t i = 0; i < lines && !exact; ++i) {
    const double mean = double(float(line.mean[i]));
    line.rest[i] = line.mean[i] - mean;
    line.mean[i] = mean;
  }
  const About about{line.mean, line.rstd, line.per_unit};
  for (;;) {
    auto error = run_columns(pool, x, &dy, exact, about, cuts, length, sums);
    if (error.failure()) return error;
    bool are_numbers = true;
    for (int64_t call = 0; call < cuts.batch; ++call) {
      const double* sum = sums_of_call(cuts, sums.get(), 2 * length, call);
      for (int64_t i = 0; i < 2 * length; ++i) are_numbers = are_numbers && std::isfinite(sum[i]);
    }
    if (exact || are_numbers) break;
    exact = true;
    for (int64_t i = 0; i < lines; ++i) line.mean[i] += line.rest[i], line.rest[i] = 0;
  }
  for (int64_t call = 0; call < cuts.batch; ++call) {
    double* sum = &sums[call * cuts.pieces * 2 * length];
    const int64_t first = call * length;
    for (int64_t i = 0; i < length; ++i) {
      // An infinite sum stays what it is.
      const double share = line.rest[first + i] * line.rstd[first + i] * sum[i];
      sum[length + i] -= std::isfinite(share) ? share : 0;
    }
    write(sum, length, *dbias, first);
    write(sum + length, length, *dscale, first);
  }
  return ffi::Error::Success();
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
