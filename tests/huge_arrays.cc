// More than 2^31 entries: what the handlers write is what they write of the first part, of which
// all the others are the same memory again, and what they add up is that so many times. Parts are
// no power of two, so that an offset that lost its upper digits is one of other entries.

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "sanitized/runtime.h"

extern "C" {
XLA_FFI_Handler normax_forward, normax_backward;
XLA_FFI_Handler normax_column_moments, normax_column_gradients;
XLA_FFI_Handler normax_columns_forward, normax_columns_backward;
XLA_FFI_Handler normax_groups_forward, normax_groups_backward;
}

namespace {

constexpr int64_t kPart = 13 << 20, kTimes = 225, kChunk = 1 << 20;  // entries; the last, bytes
static_assert(kPart * kTimes > int64_t(1) << 31, "and some pieces begin after 2^32 bytes");

// Entries of bfloat16, the same part again and again. It is known which chunks were written.
class Again {
 public:
  Again() {
    const size_t bytes = kPart * sizeof(uint16_t);
    const int file = memfd_create("part", 0);
    if (file < 0 || ftruncate(file, bytes)) fail("no memory");
    void* room = mmap(nullptr, bytes * kTimes, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) fail("no addresses");
    for (int64_t i = 0; i < kTimes; ++i) {
      void* place = static_cast<char*>(room) + i * bytes;
      if (mmap(place, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) != place) {
        fail("no memory");
      }
    }
    close(file);
    entries_ = static_cast<uint16_t*>(room);
    struct sigaction action {};
    action.sa_sigaction = note;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, nullptr);
  }

  void fill(uint64_t state, float shift) {
    for (int64_t i = 0; i < kPart; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const float value = float(int64_t(state) >> 40) / float(1 << 22) + shift;
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      entries_[i] = uint16_t(bits >> 16);
    }
  }
  // The first part of what was written whole, which goes.
  std::vector<uint16_t> take() {
    for (char is_written : written_) {
      if (!is_written) fail("a chunk was not written");
    }
    written_.clear();
    std::vector<uint16_t> part(entries_, entries_ + kPart);
    std::fill_n(entries_, kPart, uint16_t(0));
    return part;
  }
  void* to_write(const std::vector<int64_t>& shape) {
    int64_t bytes = sizeof(uint16_t);
    for (int64_t size : shape) bytes *= size;
    written_.assign(size_t(bytes / kChunk), 0);
    mprotect(entries_, size_t(bytes), PROT_NONE);
    watched = this;
    return of_shape(shape);
  }
  void* of_shape(const std::vector<int64_t>& shape) {
    shape_ = shape;
    buffer_ = {XLA_FFI_Buffer_STRUCT_SIZE, nullptr, XLA_FFI_DataType_BF16, entries_,
               int64_t(shape_.size()), shape_.data()};
    return &buffer_;
  }

  [[noreturn]] static void fail(const char* what) {
    std::printf("%s\n", what);
    std::exit(1);
  }

 private:
  static void note(int, siginfo_t* info, void*) {
    char* first = reinterpret_cast<char*>(watched->entries_);
    const int64_t chunk = (static_cast<char*>(info->si_addr) - first) / kChunk;
    if (chunk < 0 || chunk >= int64_t(watched->written_.size())) _exit(2);
    mprotect(first + chunk * kChunk, kChunk, PROT_READ | PROT_WRITE);
    watched->written_[size_t(chunk)] = 1;
  }

  static inline Again* watched = nullptr;
  std::vector<char> written_;
  uint16_t* entries_;
  std::vector<int64_t> shape_;
  XLA_FFI_Buffer buffer_;
};

using Part = std::vector<uint16_t>;
using Attributes = std::vector<std::pair<std::string, double>>;

// Entries that may differ: those next to a rounding, by sums that were rounded otherwise.
void same(const char* what, const Part& small, const Part& huge) {
  int64_t differ = 0;
  for (int64_t i = 0; i < kPart; ++i) differ += small[size_t(i)] != huge[size_t(i)];
  std::printf("%s: %ld differ\n", what, long(differ));
  if (differ > kPart / 100000) Again::fail("too many");
}

void so_many_times(const char* what, Array<float>& small, Array<float>& huge, double times) {
  double most = 0, off = 0;
  for (int64_t i = 0; i < small.count(); ++i) {
    most = std::max(most, std::fabs(times * small[i]));
    off = std::max(off, std::fabs(times * small[i] - huge[i]));
  }
  std::printf("%s: %g of %g\n", what, off, most);
  if (!(off <= 1e-6 * most)) Again::fail("too far");
}

// Calls run(times, y, dx, dscale, dbias) for the first part, and for all of them: it fills what it
// is given by its last four.
template <class Run>
void hold(const char* what, const std::vector<int64_t>& line, const Run& run) {
  Array<float> scales[2]{Array<float>(line), Array<float>(line)};
  Array<float> biases[2]{Array<float>(line), Array<float>(line)};
  Part y[2], dx[2];
  for (int i = 0; i < 2; ++i) {
    run(i ? kTimes : 1, y[i], dx[i], scales[i].buffer(), biases[i].buffer());
  }
  std::printf("of %s\n", what);
  same("y", y[0], y[1]);
  same("dx", dx[0], dx[1]);
  so_many_times("dscale", scales[0], scales[1], kTimes);
  so_many_times("dbias", biases[0], biases[1], kTimes);
}

}  // namespace

int main() {
  Runtime runtime(2);
  Again x, dy, out;
  x.fill(1, 0.5f);
  dy.fill(2, 0);
  Array<float> no_line({0});
  XLA_FFI_Buffer no_entries = *static_cast<XLA_FFI_Buffer*>(no_line.buffer());
  no_entries.dtype = XLA_FFI_DataType_BF16;
  const Attributes rule{{"centered", 1}, {"epsilon", 1e-5}}, epsilon{{"epsilon", 1e-5}};
  void* none = no_line.buffer();

  hold("rows", {1024}, [&](int64_t times, Part& y, Part& dx, void* dscale, void* dbias) {
    const std::vector<int64_t> shape{kPart / 1024 * times, 1024};
    runtime.call(normax_forward, {x.of_shape(shape), none, none}, {out.to_write(shape)}, rule);
    y = out.take();
    runtime.call(normax_backward, {x.of_shape(shape), none, dy.of_shape(shape), &no_entries},
                 {out.to_write(shape), dscale, dbias}, rule);
    dx = out.take();
  });

  Array<float> unit({64}), mean({64}), rest({64}), var({64});
  const std::vector<void*> lines{unit.buffer(), mean.buffer(), rest.buffer(), var.buffer()};
  auto with = [&](std::vector<void*> first, const std::vector<void*>& last) {
    first.insert(first.end(), lines.begin(), lines.end());
    first.insert(first.end(), last.begin(), last.end());
    return first;
  };
  hold("columns", {64}, [&](int64_t times, Part& y, Part& dx, void* dscale, void* dbias) {
    const std::vector<int64_t> shape{kPart / 64 * times, 64};
    runtime.call(normax_column_moments, {x.of_shape(shape)}, lines, {});
    runtime.call(normax_columns_forward, with({x.of_shape(shape), none, none}, {}),
                 {out.to_write(shape)}, epsilon);
    y = out.take();
    runtime.call(normax_column_gradients, with({x.of_shape(shape), dy.of_shape(shape)}, {}),
                 {dscale, dbias}, epsilon);
    runtime.call(normax_columns_backward,
                 with({x.of_shape(shape), none, dy.of_shape(shape)}, {dscale, dbias}),
                 {out.to_write(shape)}, {{"count", double(shape[0])}, {"epsilon", 1e-5}});
    dx = out.take();
  });

  hold("groups", {4, 8}, [&](int64_t times, Part& y, Part& dx, void* dscale, void* dbias) {
    const std::vector<int64_t> shape{1, kPart / 32 * times, 4, 8};
    runtime.call(normax_groups_forward, {x.of_shape(shape), none, none}, {out.to_write(shape)},
                 rule);
    y = out.take();
    runtime.call(normax_groups_backward, {x.of_shape(shape), none, dy.of_shape(shape)},
                 {out.to_write(shape), dscale, dbias}, rule);
    dx = out.take();
  });
  std::printf("all is the same\n");
}
