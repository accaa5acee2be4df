// Rows, columns and groups on three threads, two calls at once: the same bits each time, and nothing
// for the thread sanitizer to say. Built and run by run.sh.

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "kernels.h"
#include "pieces.h"

using namespace normax;

namespace {

constexpr int64_t kRows = 3000, kWidth = 64, kEntries = kRows * kWidth;
constexpr int64_t kMembers = 8, kRounds = 100;

template <class T>
struct Data {
  std::vector<T> x, dy, scale;
  std::vector<double> zeros, ones;

  Data() : x(kEntries), dy(kEntries), scale(kWidth, 1), zeros(kWidth), ones(kWidth, 1.0) {
    for (int64_t i = 0; i < kEntries; ++i) {
      x[i] = T(i * 2654435761u % 1000) / 500 - 1;
      dy[i] = x[i] * x[i];
    }
  }
};

template <class T>
struct Memory {  // of lines of cache, for what is written past them
  T* data = static_cast<T*>(std::aligned_alloc(64, kEntries * sizeof(T)));
  ~Memory() { std::free(data); }
};

template <class T>
double rows(xla::ffi::ThreadPool pool, int pair, const Data<T>& data, T* out, int64_t round) {
  const Cuts cuts(1, kRows, kWidth, threads_of(pool));
  const int64_t line = 2 * kWidth, all = cuts.number() * line;
  std::vector<double> sums(all), lost(all), work(workers_for(pool, cuts.number()) * line);
  in_parallel(pool, cuts.number(), [&](int64_t piece, int64_t worker) {
    Rows task{};
    task.x = data.x.data();
    task.dy = data.dy.data();
    task.out = out;
    task.scale = data.scale.data();
    task.length = kWidth;
    task.epsilon = 1e-5;
    task.centered = true;
    task.past = round % 2;
    baseline::kernels.backward[pair](task, cuts.begin(piece), cuts.end(piece), &sums[piece * line],
                                     &lost[piece * line], &work[worker * line]);
  });
  double found = 0;
  for (double sum : sums) found += sum;
  return found;
}

template <class T>
double columns(xla::ffi::ThreadPool pool, int pair, const Data<T>& data, T* out, int64_t round) {
  const Cuts cuts(1, kRows, kWidth, threads_of(pool));
  const int64_t line = 2 * kWidth;
  std::vector<double> sums(cuts.number() * line);
  std::vector<double> room(workers_for(pool, cuts.number()) * kFactorLines * kWidth);
  std::vector<double> lines(kLines * kWidth, 1.0);
  auto part = [&](int64_t piece) {
    Columns task{};
    task.x = data.x.data() + cuts.begin(piece) * kWidth;
    task.dy = data.dy.data() + cuts.begin(piece) * kWidth;
    task.rows = cuts.end(piece) - cuts.begin(piece);
    task.stride = kWidth;
    return task;
  };
  in_parallel(pool, cuts.number(), [&](int64_t piece, int64_t) {
    const About about{data.zeros.data(), data.ones.data(), data.ones.data()};
    baseline::kernels.sum_columns[pair](part(piece), round % 3 == 0, about, &sums[piece * line],
                                        kWidth);
  });
  in_parallel(pool, cuts.number(), [&](int64_t piece, int64_t worker) {
    Columns task = part(piece);
    task.out = out + cuts.begin(piece) * kWidth;
    task.past = round % 2;
    if (round % 2 == 0) task.dy = nullptr;
    baseline::kernels.write_columns[pair](task, lines_in(lines.data(), kWidth), kWidth,
                                          &room[worker * kFactorLines * kWidth]);
  });
  double found = 0;
  for (double sum : sums) found += sum;
  return found;
}

template <class T>
double groups(xla::ffi::ThreadPool pool, int pair, const Data<T>& data, T* out) {
  const int64_t count = kWidth / kMembers;
  std::vector<double> room(workers_for(pool, count) * kGroupLines * kMembers);
  std::vector<double> sums(2 * kWidth), lost(2 * kWidth);
  in_parallel(pool, count, [&](int64_t i, int64_t worker) {
    Groups task{};
    task.columns.x = data.x.data();
    task.columns.dy = data.dy.data();
    task.columns.out = out;
    task.columns.rows = kRows;
    task.columns.stride = kWidth;
    task.scale = data.scale.data();
    task.members = kMembers;
    task.epsilon = 1e-5;
    task.centered = true;
    baseline::kernels.groups_backward[pair](
        task, kMembers * i, kMembers * (i + 1), &room[worker * kGroupLines * kMembers],
        sums.data(), lost.data(), kWidth);
  });
  double found = 0;
  for (double sum : sums) found += sum;
  return found;
}

template <class T>
int rounds(int pair) {
  xla::ffi::Pool pool(3);
  const Data<T> data;
  Memory<T> one, other;
  for (int64_t round = 0; round < kRounds; ++round) {
    auto call = [&](T* out) {
      xla::ffi::ThreadPool threads(pool);
      double found = rows(threads, pair, data, out, round);
      found += columns(threads, pair, data, out, round);
      found += groups(threads, pair, data, out);
      for (int64_t i = 0; i < kEntries; i += 97) found += out[i];
      return found;
    };
    double here = 0, there = 0;
    std::thread thread([&] { there = call(other.data); });
    here = call(one.data);
    thread.join();
    if (here != there) {
      std::printf("round %d: %g and %g\n", int(round), here, there);
      return 1;
    }
    std::atomic<int64_t> done{0};
    xla::ffi::ThreadPool threads(pool);
    in_parallel(threads, 1 + round % 7, [&](int64_t, int64_t) { ++done; });
    if (done != 1 + round % 7) return 1;
  }
  return 0;
}

}  // namespace

int main() {
  const int wrong = rounds<float>(kF32) + rounds<double>(kF64);
  std::printf(wrong ? "differ\n" : "the same\n");
  return wrong;
}
