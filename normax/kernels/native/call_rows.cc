// What XLA calls for rows: checks, and rows in pieces.

#include <algorithm>
#include <cstdint>

#include "buffers.h"
#include "sums.h"

namespace normax {
namespace {

ffi::Error run_forward(ffi::ThreadPool& pool, const AnyBuffer& x, const AnyBuffer& residual,
                       const AnyBuffer& scale, const AnyBuffer& bias, const AnyBuffer* sum,
                       const AnyBuffer& y, bool centered, double epsilon) {
  const int pair = pair_of(x, y);
  if (pair == kPairs) return refused("dtypes of x and y");
  if (!count_of(x)) return ffi::Error::Success();
  const int64_t length = x.dimensions().back(), rows = count_of(x) / length;
  const int64_t lines = std::max(count_of(scale), count_of(bias)) / length;
  const Cuts cuts(std::max<int64_t>(1, lines), rows, length, threads_of(pool));
  in_parallel(pool, cuts.number(), [&](int64_t piece, int64_t) {
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
    task.past = is_past(y, length);
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
  const int64_t calls = count_of(*dscale) / length, rows = count_of(x) / length;
  const int64_t least = least_with_sums(rows / calls, 1, threads_of(pool));
  const Cuts cuts(calls, rows, length, threads_of(pool), least);
  const int64_t line = 2 * length, workers = workers_for(pool, cuts.number());
  GradientSums sums(pair, cuts, length, length, workers);
  Memory work = room_for(workers * line);
  if (!sums.are_there() || !work) return no_memory();
  const bool is_shared = count_of(scale) == length;
  in_parallel(pool, cuts.number(), [&](int64_t piece, int64_t worker) {
    const int64_t call = cuts.call(piece), first = call * cuts.rows * length;
    const GradientSums::Lines lines = sums.lines_of(piece, worker);
    Rows task{};
    task.x = at(x, first);
    task.added = at(dsum, first);
    task.dy = at(dy, first);
    task.scale = at(scale, is_shared ? 0 : call * length);
    task.out = to(*dx, first);
    task.length = length;
    task.epsilon = epsilon;
    task.centered = centered;
    task.past = is_past(*dx, length);
    kernels().backward[pair](task, cuts.begin(piece), cuts.end(piece), lines.found, lines.lost,
                             &work[worker * line]);
    sums.finish(lines, call, 0, length, *dscale, *dbias);
  });
  sums.finish_all(*dscale, *dbias);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(normax_forward, forward,
                              Ffi::Bind()
                                  .Ctx<ThreadPool>()
                                  .Arg<AnyBuffer>()  // x
                                  .Arg<AnyBuffer>()  // scale
                                  .Arg<AnyBuffer>()  // bias
                                  .Ret<AnyBuffer>()  // y
                                  .Attr<bool>("centered")
                                  .Attr<double>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(normax_add_forward, add_forward,
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(normax_backward, backward,
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

}  // namespace normax
