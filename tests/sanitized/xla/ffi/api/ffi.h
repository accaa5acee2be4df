// In place of XLA's: a pool of threads, so that a sanitizer sees all of them.

#ifndef NORMAX_TESTS_FFI_H_
#define NORMAX_TESTS_FFI_H_

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <queue>
#include <thread>
#include <vector>

namespace xla::ffi {

class Pool {
 public:
  explicit Pool(int count) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this] { run(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ends_ = true;
    }
    changed_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  int64_t size() const { return int64_t(threads_.size()); }
  void add(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push(std::move(task));
    }
    changed_.notify_one();
  }

 private:
  void run() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return ends_ || !tasks_.empty(); });
        if (tasks_.empty()) return;
        task = std::move(tasks_.front());
        tasks_.pop();
      }
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::queue<std::function<void()>> tasks_;
  bool ends_ = false;
  std::vector<std::thread> threads_;
};

class ThreadPool {
 public:
  explicit ThreadPool(Pool& pool) : pool_(pool) {}
  int64_t num_threads() const { return pool_.size(); }
  void Schedule(std::function<void()> task) { pool_.add(std::move(task)); }

 private:
  Pool& pool_;
};

}  // namespace xla::ffi

#endif  // NORMAX_TESTS_FFI_H_
