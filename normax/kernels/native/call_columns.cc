// What XLA calls for columns: their moments, sums with a gradient, and what they are made into.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "buffers.h"

namespace normax {
namespace {

constexpr int64_t kExactRows = 256;  // of fewer, one rounding to float32 would show
constexpr int64_t kSamples = 16;     // a power of two: of equal entries the mean is exact
constexpr int64_t kLeastRows = 64;  // of a piece, which makes sums or factors of its own
constexpr int64_t kWriters = 4;      // more pieces than of sums: what is written is in no order
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
  const AnyBuffer &unit, &mean, &rest, &var;
  double epsilon;
  bool wide;

  // Fills the lines but for gain, shift and along.
  void fill(int64_t count, const Lines& line) const {
    read(unit, 1, count, line.per_unit);
    read(mean, 0, count, line.mean);
    read(rest, 0, count, line.rest);
    read(var, 0, count, line.rstd);
    for (int64_t i = 0; i < count; ++i) {
      const double size = wide ? 1 : line.per_unit[i], per_unit = wide ? 1 / line.per_unit[i] : 1;
      line.mean[i] = (line.mean[i] + (wide ? 0 : line.rest[i])) * size;
      line.rest[i] = wide ? line.rest[i] : 0;
      line.per_unit[i] = per_unit;
      line.rstd[i] = line.rstd[i] * size * size + epsilon * per_unit * per_unit;
    }
    for (int64_t i = 0; i < count; ++i) {
      line.rstd[i] = line.rstd[i] == 0 ? 0 : 1 / std::sqrt(line.rstd[i]);
    }
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

// Writes y or dx, of lines that `fill` makes for the columns of all calls.
template <class Fill>
ffi::Error write_columns(ffi::ThreadPool& pool, int pair, const AnyBuffer& x, const AnyBuffer* dy,
                         const AnyBuffer& out, int64_t length, int64_t all, const Fill& fill) {
  if (pair == kPairs) return refused("dtypes of columns");
  if (!length || !all || !count_of(x)) return refused("empty columns");
  Memory memory = zeros(kLines * all);
  const Cuts cuts(all / length, count_of(x) / length, length, kWriters * threads_of(pool),
                  kLeastRows);
  Columns like{};
  like.rows = cuts.rows / cuts.pieces;
  like.stride = length;
  like.past = is_past(out, length);
  const int64_t many = rows_as_one(like, length), room = kFactorLines * many * length;
  const int64_t workers = workers_for(pool, cuts.number());
  Memory work = room_for(workers * room);
  if (!memory || !work) return no_memory();
  // The call whose factors a worker has, and whether they are in float32.
  std::vector<std::pair<int64_t, bool>> has(size_t(workers), {-1, false});
  auto from = [&](int64_t i) { return lines_in(memory.get() + i, all); };
  fill(from(0));
  in_parallel(pool, cuts.number(), [&](int64_t item, int64_t worker) {
    // The last piece first: of what was summed it is the last that is still in a cache.
    const int64_t piece = cuts.number() - 1 - item;
    const int64_t call = cuts.call(piece), begin = cuts.begin(piece);
    const int64_t first = (call * cuts.rows + begin) * length;
    Columns columns = like;
    columns.x = at(x, first);
    columns.dy = dy ? at(*dy, first) : nullptr;
    columns.out = to(out, first);
    columns.rows = cuts.end(piece) - begin;
    double* factors = &work[worker * room];
    auto& [whose, rough] = has[size_t(worker)];
    if (whose != call) {
      rough = kernels().make_factors[pair](from(call * length), length, many, dy, factors);
      whose = call;
    }
    kernels().write_columns[pair](columns, many, rough, factors);
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
  const bool wide = type == ffi::F64;
  auto fill = [&](const Lines& line) {
    Measured{unit, mean, rest, var, epsilon, wide}.fill(lines, line);
    read(scale, 1, lines, line.gain);
    read(bias, 0, lines, line.shift);
    for (int64_t i = 0; i < lines && !wide; ++i) line.gain[i] *= line.rstd[i];
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
  auto fill = [&](const Lines& line) {
    Measured{unit, mean, rest, var, epsilon, type == ffi::F64}.fill(lines, line);
    read(scale, 1, lines, line.gain);
    read(ones, 0, lines, line.shift);
    read(along, 0, lines, line.along);
    for (int64_t i = 0; i < lines; ++i) {
      line.shift[i] = line.gain[i] * line.shift[i] / count;
      line.along[i] = line.gain[i] * line.along[i] / count;
    }
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
