// What XLA calls for groups of columns: an example at a time, or strips of one.

#include <algorithm>
#include <cstdint>

#include "buffers.h"
#include "sums.h"

namespace normax {
namespace {

constexpr int64_t kStrip = 8192;  // columns, of which a worker has many lines

// Strips of whole groups. Memory is read best as it lies, so that there are several only where
// threads would have no piece, or a row is long.
struct Strips {
  int64_t width, size, number;

  Strips(const ffi::ThreadPool& pool, const Cuts& cuts, int64_t width, int64_t members)
      : width(width) {
    const int64_t groups = width / members, least = std::max<int64_t>(1, kStrip / members);
    const int64_t wanted = std::max((threads_of(pool) + cuts.number() - 1) / cuts.number(),
                                    (groups + least - 1) / least);
    size = (groups + wanted - 1) / wanted * members;
    number = (width + size - 1) / size;
  }
};

// Calls task(piece, begin, end, worker, work) for each piece of examples and strip of columns.
template <class Task>
ffi::Error each_strip(ffi::ThreadPool& pool, const Cuts& cuts, const Strips& strips,
                      const Task& task) {
  const int64_t items = cuts.number() * strips.number, room = kGroupLines * strips.size;
  Memory work = room_for(workers_for(pool, items) * room);
  if (!work) return no_memory();
  in_parallel(pool, items, [&](int64_t item, int64_t worker) {
    const int64_t piece = item / strips.number, begin = item % strips.number * strips.size;
    task(piece, begin, std::min(begin + strips.size, strips.width), worker, &work[worker * room]);
  });
  return ffi::Error::Success();
}

Groups groups_of(int64_t rows, int64_t width, int64_t members, double epsilon, bool centered) {
  Groups groups{};
  groups.columns.rows = rows;
  groups.columns.stride = width;
  groups.members = members;
  groups.epsilon = epsilon;
  groups.centered = centered;
  return groups;
}

ffi::Error groups_forward(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer scale, AnyBuffer bias,
                          Output y, bool centered, double epsilon) {
  const int pair = pair_of(x, *y);
  if (pair == kPairs) return refused("dtypes of groups");
  const auto shape = x.dimensions();
  if (shape.size() < 4) return refused("rank of groups");
  if (!count_of(x)) return ffi::Error::Success();
  const int64_t members = shape.back(), width = members * shape[shape.size() - 2];
  const int64_t rows = shape[shape.size() - 3];
  const int64_t batch = std::max<int64_t>(1, std::max(count_of(scale), count_of(bias)) / width);
  const Cuts cuts(batch, count_of(x) / (rows * width), rows * width, threads_of(pool));
  const Groups like = groups_of(rows, width, members, epsilon, centered);
  auto task = [&](int64_t piece, int64_t begin, int64_t end, int64_t, double* work) {
    const int64_t call = cuts.call(piece);
    Groups groups = like;
    groups.columns.past = is_past(*y, width, begin, end);
    groups.scale = at(scale, call * width);
    groups.bias = at(bias, call * width);
    for (int64_t example = cuts.begin(piece); example < cuts.end(piece); ++example) {
      const int64_t first = (call * cuts.rows + example) * rows * width;
      groups.columns.x = at(x, first);
      groups.columns.out = to(*y, first);
      kernels().groups_forward[pair](groups, begin, end, work);
    }
  };
  return each_strip(pool, cuts, Strips(pool, cuts, width, members), task);
}

ffi::Error groups_backward(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer scale, AnyBuffer dy,
                           Output dx, Output dscale, Output dbias, bool centered, double epsilon) {
  const int pair = pair_of(x, dy);
  if (pair == kPairs) return refused("dtypes of groups");
  const auto shape = x.dimensions();
  if (shape.size() < 4) return refused("rank of groups");
  if (count_of(dy) != count_of(x)) return refused("shape of dy");
  const int64_t members = shape.back(), width = members * shape[shape.size() - 2];
  const int64_t rows = shape[shape.size() - 3];
  if (!rows || !count_of(*dscale)) return refused("empty groups");
  const int64_t calls = count_of(*dscale) / width, examples = count_of(x) / (rows * width);
  const int64_t least = least_with_sums(examples / calls, rows, threads_of(pool));
  const Cuts cuts(calls, examples, rows * width, threads_of(pool), least);
  const Strips strips(pool, cuts, width, members);
  const int64_t workers = workers_for(pool, cuts.number() * strips.number);
  GradientSums sums(pair, cuts, width, strips.size, workers);
  if (!sums.are_there()) return no_memory();
  const Groups like = groups_of(rows, width, members, epsilon, centered);
  auto task = [&](int64_t piece, int64_t begin, int64_t end, int64_t worker, double* work) {
    const int64_t call = cuts.call(piece);
    const GradientSums::Lines lines = sums.lines_of(piece, worker, begin);
    Groups groups = like;
    groups.columns.past = is_past(*dx, width, begin, end);
    groups.scale = at(scale, call * width);
    for (int64_t example = cuts.begin(piece); example < cuts.end(piece); ++example) {
      const int64_t first = (call * cuts.rows + example) * rows * width;
      groups.columns.x = at(x, first);
      groups.columns.dy = at(dy, first);
      groups.columns.out = to(*dx, first);
      kernels().groups_backward[pair](groups, begin, end, work, lines.found, lines.lost,
                                      sums.stride());
    }
    sums.finish(lines, call, begin, end, *dscale, *dbias);
  };
  if (auto error = each_strip(pool, cuts, strips, task); error.failure()) return error;
  sums.finish_all(*dscale, *dbias);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(normax_groups_forward, groups_forward,
                              Ffi::Bind()
                                  .Ctx<ThreadPool>()
                                  .Arg<AnyBuffer>()  // x
                                  .Arg<AnyBuffer>()  // scale
                                  .Arg<AnyBuffer>()  // bias
                                  .Ret<AnyBuffer>()  // y
                                  .Attr<bool>("centered")
                                  .Attr<double>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(normax_groups_backward, groups_backward,
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

}  // namespace normax
