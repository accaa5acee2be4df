// What XLA calls to write what columns are made into: y, or dx.

#include <cstdint>
#include <utility>
#include <vector>

#include "lines.h"

namespace normax {
namespace {

constexpr int64_t kWriters = 4;  // more pieces than of sums: what is written is in no order

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

}  // namespace normax
