// Work in pieces, for the threads that XLA lends.

#ifndef NORMAX_PIECES_H_
#define NORMAX_PIECES_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace normax {

constexpr int64_t kLeastPiece = 16384;  // entries that are worth a thread
constexpr int64_t kPiecesOfThread = 4;  // so that none waits long for the last

constexpr int kTurns = 2000;  // some 20 to 50 microseconds

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// While it lives, this thread reads and writes subnormal numbers as what they are. XLA's threads
// take them for zero, and a row may have little else.
class WithSubnormals {
 public:
  WithSubnormals() : before_(get()) { set(before_ & ~kAsZero); }
  ~WithSubnormals() { set(before_); }
  WithSubnormals(const WithSubnormals&) = delete;
  WithSubnormals& operator=(const WithSubnormals&) = delete;

 private:
#if defined(__SSE__)
  static constexpr unsigned kAsZero = 0x8040;
  static unsigned get() { return _mm_getcsr(); }
  static void set(unsigned control) { _mm_setcsr(control); }
#elif defined(__aarch64__)
  static constexpr uint64_t kAsZero = 1 << 24;
  static uint64_t get() {
    uint64_t control;
    asm volatile("mrs %0, fpcr" : "=r"(control));
    return control;
  }
  static void set(uint64_t control) { asm volatile("msr fpcr, %0" : : "r"(control)); }
#else
  static constexpr unsigned kAsZero = 0;
  static unsigned get() { return 0; }
  static void set(unsigned) {}
#endif
  decltype(get()) before_;
};

inline int64_t threads_of(const xla::ffi::ThreadPool& pool) {
  return std::max<int64_t>(1, pool.num_threads());
}

inline int64_t workers_for(const xla::ffi::ThreadPool& pool, int64_t count) {
  return std::min(threads_of(pool), count);
}

// Runs task(i, worker) for each i below count, on this thread and on those of the pool that are
// free; a worker, of workers_for(pool, count), does one at a time. What waits in the pool's queue
// is not waited for: all its threads may be here.
template <class Task>
void in_parallel(xla::ffi::ThreadPool& pool, int64_t count, const Task& task) {
  const int64_t workers = workers_for(pool, count);
  if (workers <= 1) {
    WithSubnormals as_they_are;
    for (int64_t i = 0; i < count; ++i) task(i, 0);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto state = std::make_shared<State>();
  // The task is there for as long as there is an i to take.
  auto work = [state, count, task = &task](int64_t worker) {
    WithSubnormals as_they_are;
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      (*task)(i, worker);
      if (state->done.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->all_done.notify_all();
      }
    }
  };
  for (int64_t helper = 1; helper < workers; ++helper) {
    pool.Schedule(std::function<void()>([work, helper] { work(helper); }));
  }
  work(0);
  // The last pieces end soon: to sleep until then, and be woken, takes longer.
  for (int i = 0; i < kTurns && state->done.load() < count; ++i) pause();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done.load() == count; });
}

// How rows are cut into pieces. Arrays that are mapped over lead with axes more: `batch` calls in
// one, of so many rows each.
struct Cuts {
  int64_t batch, rows, pieces;

  Cuts(int64_t batch, int64_t all_rows, int64_t length, int64_t threads, int64_t least_rows = 1)
      : batch(batch), rows(all_rows / batch) {
    int64_t wanted = (kPiecesOfThread * threads + batch - 1) / batch;
    int64_t most = std::min(rows * length / kLeastPiece, rows / least_rows);
    pieces = std::max<int64_t>(1, std::min(wanted, most));
  }
  int64_t number() const { return batch * pieces; }
  int64_t call(int64_t piece) const { return piece / pieces; }
  int64_t begin(int64_t piece) const { return rows * (piece % pieces) / pieces; }
  int64_t end(int64_t piece) const { return rows * (piece % pieces + 1) / pieces; }
};

}  // namespace normax

#endif  // NORMAX_PIECES_H_
