// Every handler that XLA calls, on three threads, two calls at once: the same bits each time, and
// nothing for the thread sanitizer to say. Built and run by run.sh.

#include <algorithm>
#include <cstdio>
#include <thread>

#include "runtime.h"

extern "C" {
XLA_FFI_Handler normax_forward, normax_add_forward, normax_backward;
XLA_FFI_Handler normax_column_moments, normax_columns_forward, normax_columns_backward,
    normax_column_gradients;
XLA_FFI_Handler normax_groups_forward, normax_groups_backward;
}

namespace {

constexpr int64_t kMembers = 8, kRounds = 30;

template <class T>
struct Data {
  Array<T> x, dy, scale, none;

  // Rows of so many calls that were mapped to one, and a scale of each or one for all.
  Data(int64_t rows, int64_t width, int64_t scales)
      : x({rows, width}), dy({rows, width}), scale({scales, width}), none({0}) {
    for (int64_t i = 0; i < x.count(); ++i) {
      x[i] = T(i * 2654435761u % 1000) / 500 - 1;
      dy[i] = x[i] * x[i];
    }
    for (int64_t i = 0; i < scale.count(); ++i) scale[i] = T(1) + T(i % 7) / 8;
  }
};

// The outputs of all handlers of one kind.
template <class T>
struct Rows {
  Array<T> y, sum, added, dx, dscale, dbias;

  Rows(int64_t calls, int64_t rows, int64_t width)
      : y({rows, width}),
        sum({rows, width}),
        added({rows, width}),
        dx({rows, width}),
        dscale({calls, width}),
        dbias({calls, width}) {}

  void run(Runtime& runtime, Data<T>& data) {
    void *x = data.x.buffer(), *dy = data.dy.buffer();
    void *scale = data.scale.buffer(), *none = data.none.buffer();
    runtime.call(normax_forward, {x, scale, none}, {y.buffer()},
                 {{"centered", 1}, {"epsilon", 1e-5}});
    runtime.call(normax_add_forward, {x, dy, none, none}, {sum.buffer(), added.buffer()},
                 {{"centered", 0}, {"epsilon", 1e-5}});
    runtime.call(normax_backward, {x, scale, dy, none},
                 {dx.buffer(), dscale.buffer(), dbias.buffer()},
                 {{"centered", 1}, {"epsilon", 1e-5}});
  }
  bool operator==(const Rows& other) const {
    return y == other.y && sum == other.sum && added == other.added && dx == other.dx &&
           dscale == other.dscale && dbias == other.dbias;
  }
};

template <class T>
struct Columns {
  Array<T> unit, mean, rest, var, y, dscale, dbias, dx;
  int64_t rows;

  Columns(int64_t calls, int64_t rows, int64_t width)
      : unit({calls, width}),
        mean({calls, width}),
        rest({calls, width}),
        var({calls, width}),
        y({rows, width}),
        dscale({calls, width}),
        dbias({calls, width}),
        dx({rows, width}),
        rows(rows / calls) {}

  void run(Runtime& runtime, Data<T>& data) {
    void *x = data.x.buffer(), *dy = data.dy.buffer(), *none = data.none.buffer();
    void *u = unit.buffer(), *m = mean.buffer(), *r = rest.buffer(), *v = var.buffer();
    void *ds = dscale.buffer(), *db = dbias.buffer();
    runtime.call(normax_column_moments, {x}, {u, m, r, v}, {});
    runtime.call(normax_columns_forward, {x, none, none, u, m, r, v}, {y.buffer()},
                 {{"epsilon", 1e-5}});
    runtime.call(normax_column_gradients, {x, dy, u, m, r, v}, {ds, db}, {{"epsilon", 1e-5}});
    runtime.call(normax_columns_backward, {x, none, dy, u, m, r, v, ds, db}, {dx.buffer()},
                 {{"count", double(rows)}, {"epsilon", 1e-5}});
  }
  bool operator==(const Columns& other) const {
    return mean == other.mean && rest == other.rest && var == other.var && y == other.y &&
           dscale == other.dscale && dbias == other.dbias && dx == other.dx;
  }
};

template <class T>
struct Groups {
  Array<T> y, dx, dscale, dbias, x, dy;

  Groups(Data<T>& data, int64_t examples, int64_t rows, int64_t width)
      : y({examples, rows / examples, width / kMembers, kMembers}),
        dx({examples, rows / examples, width / kMembers, kMembers}),
        dscale({1, width}),
        dbias({1, width}),
        x({examples, rows / examples, width / kMembers, kMembers}),
        dy({examples, rows / examples, width / kMembers, kMembers}) {
    for (int64_t i = 0; i < x.count(); ++i) {
      x[i] = data.x[i];
      dy[i] = data.dy[i];
    }
  }

  void run(Runtime& runtime, Data<T>& data) {
    void* none = data.none.buffer();
    runtime.call(normax_groups_forward, {x.buffer(), none, none}, {y.buffer()},
                 {{"centered", 1}, {"epsilon", 1e-5}});
    runtime.call(normax_groups_backward, {x.buffer(), none, dy.buffer()},
                 {dx.buffer(), dscale.buffer(), dbias.buffer()},
                 {{"centered", 1}, {"epsilon", 1e-5}});
  }
  bool operator==(const Groups& other) const {
    return y == other.y && dx == other.dx && dscale == other.dscale && dbias == other.dbias;
  }
};

// Runs two of a kind at once, again and again: all are equal.
template <class T, class Make>
int same(Runtime& runtime, Data<T>& data, int64_t rounds, const Make& make) {
  auto first = make(), one = make(), other = make();
  first.run(runtime, data);
  if (first.dx[1] == 0 || first.dscale[1] == 0) return 1;  // something was written
  for (int64_t round = 0; round < rounds; ++round) {
    std::thread thread([&] { other.run(runtime, data); });
    one.run(runtime, data);
    thread.join();
    if (!(one == first && other == first)) return 1;
  }
  return 0;
}

template <class T>
int all(Runtime& runtime) {
  int wrong = 0;
  struct Case {
    int64_t calls, rows, width, scales, rounds;
  };
  // One call in pieces; many calls that are a piece each; few calls in pieces; and what is so large
  // that it is written past the caches. One scale for all calls, and one for each.
  for (auto [calls, rows, width, scales, rounds] :
       {Case{1, 3000, 64, 1, kRounds}, Case{500, 3000, 64, 1, kRounds},
        Case{500, 3000, 64, 500, kRounds}, Case{3, 6000, 64, 3, kRounds},
        Case{1, 1 << 15, 64, 1, 2}}) {
    Data<T> data(rows, width, scales);
    wrong += same(runtime, data, rounds, [=] { return Rows<T>(calls, rows, width); });
    wrong += same(runtime, data, rounds, [=] { return Columns<T>(calls, rows, width); });
    for (int64_t examples : {1, 8, 100}) {
      if (rows % examples) continue;
      wrong += same(runtime, data, rounds,
                    [&] { return Groups<T>(data, examples, rows, width); });
    }
  }
  return wrong;
}

}  // namespace

int main() {
  Runtime runtime(3);
  const int wrong = all<float>(runtime) + all<double>(runtime);
  std::printf(wrong ? "%d differ\n" : "the same\n", wrong);
  return wrong != 0;
}
