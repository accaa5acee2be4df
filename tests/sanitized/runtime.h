// What calls the handlers in XLA's place, with a pool of threads that a sanitizer sees all of.

#ifndef NORMAX_TESTS_RUNTIME_H_
#define NORMAX_TESTS_RUNTIME_H_

#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <queue>
#include <string>
#include <thread>
#include <vector>

#include "xla/ffi/api/c_api.h"

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

// An array of a handler, in lines of cache, as XLA's are.
template <class T>
class Array {
 public:
  explicit Array(std::vector<int64_t> shape) : shape_(std::move(shape)) {
    for (int64_t size : shape_) count_ *= size;
    const size_t bytes = (size_t(count_) * sizeof(T) + 63) / 64 * 64 + 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    for (int64_t i = 0; i < count_; ++i) data_[i] = 0;
    buffer_ = {XLA_FFI_Buffer_STRUCT_SIZE, nullptr, kType, data_, int64_t(shape_.size()),
               shape_.data()};
  }
  Array(const Array&) = delete;
  ~Array() { std::free(data_); }

  int64_t count() const { return count_; }
  T& operator[](int64_t i) { return data_[i]; }
  void* buffer() { return &buffer_; }
  bool operator==(const Array& other) const {
    return std::equal(data_, data_ + count_, other.data_);
  }

 private:
  static constexpr XLA_FFI_DataType kType =
      sizeof(T) == 8 ? XLA_FFI_DataType_F64 : XLA_FFI_DataType_F32;
  std::vector<int64_t> shape_;
  int64_t count_ = 1;
  T* data_;
  XLA_FFI_Buffer buffer_;
};

class Runtime {
 public:
  explicit Runtime(int threads) : pool_(threads) {
    api_.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    api_.api_version.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE;
    api_.XLA_FFI_ThreadPool_NumThreads = [](XLA_FFI_ThreadPool_NumThreads_Args* args) {
      *args->num_threads = pool_of(args->ctx).size();
      return static_cast<XLA_FFI_Error*>(nullptr);
    };
    api_.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) {
      pool_of(args->ctx).add([task = args->task, data = args->data] { task(data); });
      return static_cast<XLA_FFI_Error*>(nullptr);
    };
    // Nothing that is called here is refused.
    api_.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) -> XLA_FFI_Error* {
      std::printf("refused: %s\n", args->message);
      std::exit(1);
    };
  }

  // Calls a handler; attributes are in the order of their names.
  void call(XLA_FFI_Handler* handler, std::vector<void*> inputs, std::vector<void*> outputs,
            std::vector<std::pair<std::string, double>> attributes) {
    std::vector<XLA_FFI_ArgType> in(inputs.size(), XLA_FFI_ArgType_BUFFER);
    std::vector<XLA_FFI_RetType> out(outputs.size(), XLA_FFI_RetType_BUFFER);
    std::vector<XLA_FFI_AttrType> kinds(attributes.size(), XLA_FFI_AttrType_SCALAR);
    std::vector<XLA_FFI_ByteSpan> spans;
    std::vector<XLA_FFI_Scalar> scalars;
    bool centered = false;
    for (auto& [name, value] : attributes) {
      spans.push_back({name.data(), name.size()});
      const bool is_flag = name == "centered";
      if (is_flag) centered = value != 0;
      scalars.push_back(is_flag ? XLA_FFI_Scalar{XLA_FFI_DataType_PRED, &centered}
                                : XLA_FFI_Scalar{XLA_FFI_DataType_F64, &value});
    }
    std::vector<XLA_FFI_ByteSpan*> names;
    std::vector<void*> values;
    for (auto& span : spans) names.push_back(&span);
    for (auto& scalar : scalars) values.push_back(&scalar);
    XLA_FFI_CallFrame frame{};
    frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
    frame.api = &api_;
    frame.ctx = reinterpret_cast<XLA_FFI_ExecutionContext*>(&pool_);
    frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
    frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, int64_t(in.size()), in.data(), inputs.data()};
    frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, int64_t(out.size()), out.data(),
                  outputs.data()};
    frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr,      int64_t(kinds.size()),
                   kinds.data(),              names.data(), values.data()};
    handler(&frame);
  }

 private:
  static Pool& pool_of(XLA_FFI_ExecutionContext* context) {
    return *reinterpret_cast<Pool*>(context);
  }

  Pool pool_;
  XLA_FFI_Api api_{};
};

#endif  // NORMAX_TESTS_RUNTIME_H_
