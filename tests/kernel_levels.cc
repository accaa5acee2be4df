// Holds the kernels of each set of instructions that this processor has to long double.
//
// The tests in Python see the one that is chosen for it. This is linked with the library, or with
// kernels.cc compiled for each; it prints how many numbers were held, and what is off.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "kernels.h"

// A library that was built without them lacks them.
namespace normax {
namespace avx2 {
extern const Kernels kernels __attribute__((weak));
}
namespace avx512 {
extern const Kernels kernels __attribute__((weak));
}
}  // namespace normax

using namespace normax;
typedef long double Long;
typedef std::vector<Long> Numbers;

enum Type { F32, BF16, F16, F64 };
constexpr Type kX[kPairs] = {F32, BF16, F16, F64, BF16, F16};
constexpr Type kY[kPairs] = {F32, BF16, F16, F64, F32, F32};
constexpr int kSize[] = {4, 2, 2, 8};
constexpr double kUnit[] = {0x1p-23, 0x1p-7, 0x1p-10, 0x1p-52};

std::mt19937_64 generator(0);
const char* level;
int64_t held = 0, wrong = 0;

// Aligned to lines of cache, with room behind that is to stay as it is.
class Array {
 public:
  Array(Type type, int64_t count) : type_(type), count_(count) {
    const size_t bytes = size_t(count * kSize[type] + 128) / 64 * 64;
    data_ = static_cast<unsigned char*>(std::aligned_alloc(64, bytes));
    std::memset(data_, 0x5a, bytes);
  }
  Array(const Array&) = delete;
  ~Array() {
    for (int64_t i = 0; i < 32; ++i) wrong += data_[count_ * kSize[type_] + i] != 0x5a;
    std::free(data_);
  }
  void* data() { return data_; }
  void* from(int64_t i) { return data_ + i * kSize[type_]; }

  Long at(int64_t i) const {
    const unsigned char* p = data_ + i * kSize[type_];
    uint16_t half;
    uint32_t word;
    float single;
    double wide;
    switch (type_) {
      case F64: std::memcpy(&wide, p, 8); return wide;
      case F32: std::memcpy(&single, p, 4); return single;
      case BF16:
        std::memcpy(&half, p, 2);
        word = uint32_t(half) << 16;
        std::memcpy(&single, &word, 4);
        return single;
      default:
        std::memcpy(&half, p, 2);
        const int exponent = half >> 10 & 31, mantissa = half & 1023;
        const Long size = exponent ? std::ldexp(Long(1024 + mantissa), exponent - 25)
                                   : std::ldexp(Long(mantissa), -24);
        return half >> 15 ? -size : size;
    }
  }
  void set(int64_t i, double value) {
    unsigned char* p = data_ + i * kSize[type_];
    const float single = float(value);
    uint32_t word;
    uint16_t half;
    std::memcpy(&word, &single, 4);
    switch (type_) {
      case F64: std::memcpy(p, &value, 8); break;
      case F32: std::memcpy(p, &single, 4); break;
      case BF16:
        half = uint16_t(word >> 16);
        std::memcpy(p, &half, 2);
        break;
      default:  // ten digits of a normal number, or zero
        const double size = std::fabs(value);
        const int exponent = size < 0x1p-14 ? -15 : std::ilogb(size);
        const int mantissa = exponent < -14 ? 0 : int(std::ldexp(size, 10 - exponent)) & 1023;
        half = uint16_t((value < 0) << 15 | (exponent + 15) << 10 | mantissa);
        std::memcpy(p, &half, 2);
    }
  }
  void fill(double mean) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < count_; ++i) set(i, mean + normal(generator));
  }
  Type type() const { return type_; }

 private:
  Type type_;
  int64_t count_;
  unsigned char* data_;
};

// Holds numbers to what is right, in units of the last place at the largest.
void hold(const char* what, int pair, int64_t n, const Array& found, int64_t first,
          const Numbers& right, double limit) {
  Long most = 0, off = 0;
  for (size_t i = 0; i < right.size(); ++i) {
    most = std::fmax(most, std::fabs(right[i]));
    const Long apart = std::fabs(found.at(first + int64_t(i)) - right[i]);
    off = apart <= off ? off : apart;  // NaN is off
  }
  ++held;
  if (!(off <= limit * kUnit[found.type()] * most)) {
    ++wrong;
    std::printf("%s: %s, pair %d, %ld numbers: off by %Lg of %Lg\n", level, what, pair, long(n),
                off, most);
  }
}

struct Standard {
  Long mean = 0, rstd = 0;
};

// Of the numbers at some places.
template <class Place>
Standard standard(const Array& x, int64_t n, bool centered, double epsilon, const Place& place) {
  Standard found;
  Long squares = 0;
  for (int64_t i = 0; i < n && centered; ++i) found.mean += x.at(place(i)) / Long(n);
  for (int64_t i = 0; i < n; ++i) {
    const Long d = x.at(place(i)) - found.mean;
    squares += d * d / Long(n);
  }
  found.rstd = 1 / std::sqrt(squares + Long(epsilon));
  return found;
}

Long backward_of(const Standard& s, bool centered, Long x, Long t, Long mean_t, Long along) {
  return s.rstd * (t - (centered ? mean_t : 0) - (x - s.mean) * s.rstd * along);
}

constexpr double kEpsilon = 1e-5;

void check_rows(const Kernels& kernels, int pair, int64_t n, bool centered, bool full) {
  const Type type = kX[pair], line_type = type == F64 ? F64 : F32;
  const int64_t count = 5;
  Array x(type, count * n), added(type, count * n), dy(kY[pair], count * n), scale(line_type, n),
      bias(line_type, n), sum(type, count * n), y(kY[pair], count * n), dx(type, count * n);
  x.fill(3);
  added.fill(1);
  dy.fill(0);
  scale.fill(0);
  bias.fill(0);
  Rows rows{};
  rows.x = x.data();
  rows.length = n;
  rows.epsilon = kEpsilon;
  rows.centered = centered;
  rows.past = full && n * kSize[type] % 64 == 0 && n * kSize[kY[pair]] % 64 == 0;
  if (full) {
    rows.scale = scale.data();
    rows.bias = bias.data();
    rows.added = added.data();
    rows.sum = sum.data();
  }
  rows.out = y.data();
  kernels.forward[pair](rows, 0, count);
  Array& given = full ? sum : x;
  rows.x = given.data();
  rows.dy = dy.data();
  rows.out = dx.data();
  std::vector<double> sums(size_t(2 * n), 0.0), lost(sums);
  Array work(F64, 2 * n);
  kernels.backward[pair](rows, 0, count, sums.data(), lost.data(), work.data());
  const bool wide = type == F64;
  for (int64_t r = 0; r < count; ++r) {
    const Standard s = standard(given, n, centered, kEpsilon, [&](int64_t i) { return r * n + i; });
    Numbers right_y, right_dx;
    Long mean_t = 0, along = 0;
    auto t_of = [&](int64_t i) { return dy.at(r * n + i) * (full ? scale.at(i) : 1); };
    for (int64_t i = 0; i < n; ++i) {
      const Long xhat = (given.at(r * n + i) - s.mean) * s.rstd;
      right_y.push_back(full ? xhat * scale.at(i) + bias.at(i) : xhat);
      mean_t += t_of(i) / Long(n);
      along += t_of(i) * xhat / Long(n);
    }
    for (int64_t i = 0; i < n; ++i) {
      right_dx.push_back(backward_of(s, centered, given.at(r * n + i), t_of(i), mean_t, along) +
                         (full ? added.at(r * n + i) : 0));
    }
    if (n > 1) hold("rows", pair, n, y, r * n, right_y, wide ? 8 : 4);
    if (n > 3) hold("rows backward", pair, n, dx, r * n, right_dx, wide ? 16 : 8);
  }
}

void check_columns(const Kernels& kernels, int pair, int64_t width, int64_t count) {
  const Type type = kX[pair], line_type = type == F64 ? F64 : F32;
  Array x(type, count * width), dy(kY[pair], count * width), scale(line_type, width),
      bias(line_type, width), y(kY[pair], count * width), dx(type, count * width);
  x.fill(2);
  dy.fill(0);
  scale.fill(0);
  bias.fill(0);
  std::vector<double> memory(size_t(kLines * width), 0.0), ones(size_t(width), 1.0);
  Lines lines = lines_in(memory.data(), width);
  Numbers right[4], sizes[4];
  std::vector<Standard> all;
  for (int64_t c = 0; c < width; ++c) {
    auto place = [&](int64_t r) { return r * width + c; };
    const Standard s = standard(x, count, true, kEpsilon, place);
    const double pivot = double(float(x.at(c)));
    Long sums[4] = {}, of_sizes[4] = {};
    for (int64_t r = 0; r < count; ++r) {
      const Long d = x.at(place(r)) - pivot, xhat = (x.at(place(r)) - s.mean) * s.rstd;
      const Long t = dy.at(place(r)), terms[4] = {d, d * d, t, t * xhat};
      for (int i = 0; i < 4; ++i) {
        sums[i] += terms[i];
        of_sizes[i] += std::fabs(terms[i]);
      }
    }
    for (int i = 0; i < 4; ++i) {
      right[i].push_back(sums[i]);
      sizes[i].push_back(of_sizes[i]);
    }
    lines.mean[c] = double(s.mean);
    lines.rest[c] = double(s.mean - Long(lines.mean[c]));
    lines.rstd[c] = double(s.rstd);
    lines.per_unit[c] = 1;
    all.push_back(s);
  }
  Columns columns{};
  columns.x = x.data();
  columns.rows = count;
  columns.stride = width;
  columns.past = width * kSize[type] % 64 == 0 && width * kSize[kY[pair]] % 64 == 0;
  std::vector<double> pivots;
  for (int64_t c = 0; c < width; ++c) pivots.push_back(double(float(x.at(c))));
  const bool wide = type == F64;
  for (bool exact : {false, true}) {
    Array sums(F64, 2 * width);
    for (int of_dy = 0; of_dy < 2; ++of_dy) {
      std::memset(sums.data(), 0, size_t(16 * width));
      columns.dy = of_dy ? dy.data() : nullptr;
      // In float32 a mean is what that can hold of it, and the sum is about that.
      std::vector<double> means(lines.mean, lines.mean + width);
      for (double& mean : means) mean = exact || wide ? mean : double(float(mean));
      const About about{of_dy ? means.data() : pivots.data(), lines.rstd, ones.data()};
      kernels.sum_columns[pair](columns, exact, about, static_cast<double*>(sums.data()), width);
      // Sums of terms that cancel: of the size of all of them.
      for (int i = 0; i < 2; ++i) {
        for (int64_t c = 0; c < width; ++c) {
          const Standard& s = all[size_t(c)];
          Long wanted = right[2 * of_dy + i][size_t(c)];
          if (of_dy && i) wanted += (s.mean - means[size_t(c)]) * s.rstd * right[2][size_t(c)];
          const Long apart = std::fabs(sums.at(i * width + c) - wanted);
          ++held;
          const double unit = wide ? 0x1p-52 : exact ? 0x1p-49 : 0x1p-23;
          if (!(apart <= 4 * unit * sizes[2 * of_dy + i][size_t(c)])) {
            ++wrong;
            std::printf("%s: sums %d of columns, pair %d, width %ld, exact %d: off by %Lg\n", level,
                        2 * of_dy + i, pair, long(width), exact, apart);
          }
        }
      }
    }
  }
  columns.dy = nullptr;
  columns.out = y.data();
  for (int64_t c = 0; c < width; ++c) {
    lines.gain[c] = double(scale.at(c) * (wide ? 1 : all[size_t(c)].rstd));
    lines.shift[c] = double(bias.at(c));
  }
  const int64_t many = rows_as_one(columns, width);
  std::vector<double> work(size_t(kFactorLines * many * width));
  bool rough = kernels.make_factors[pair](lines, width, many, false, work.data());
  kernels.write_columns[pair](columns, many, rough, work.data());
  Numbers right_y, right_dx;
  for (int64_t i = 0; i < count * width; ++i) {
    const size_t c = size_t(i % width);
    const Standard& s = all[c];
    right_y.push_back((x.at(i) - s.mean) * s.rstd * scale.at(i % width) + bias.at(i % width));
    const Long gain = scale.at(i % width);
    right_dx.push_back(backward_of(s, true, x.at(i), dy.at(i) * gain,
                                   right[2][c] / Long(count) * gain,
                                   right[3][c] / Long(count) * gain));
  }
  for (int64_t c = 0; c < width; ++c) {
    lines.gain[c] = double(scale.at(c));
    lines.shift[c] = double(right[2][size_t(c)] / Long(count) * scale.at(c));
    lines.along[c] = double(right[3][size_t(c)] / Long(count) * scale.at(c));
  }
  columns.dy = dy.data();
  columns.out = dx.data();
  rough = kernels.make_factors[pair](lines, width, many, true, work.data());
  kernels.write_columns[pair](columns, many, rough, work.data());
  hold("columns", pair, width, y, 0, right_y, wide ? 8 : 4);
  hold("columns backward", pair, width, dx, 0, right_dx, wide ? 16 : 8);
}

void check_groups(const Kernels& kernels, int pair, int64_t number, int64_t members, int64_t count,
                  bool centered) {
  const Type type = kX[pair], line_type = type == F64 ? F64 : F32;
  const int64_t width = number * members, n = count * members;
  Array x(type, count * width), dy(kY[pair], count * width), scale(line_type, width),
      bias(line_type, width), y(kY[pair], count * width), dx(type, count * width),
      work(F64, kGroupLines * width);
  x.fill(2);
  dy.fill(0);
  scale.fill(0);
  bias.fill(0);
  Groups groups{};
  groups.columns.x = x.data();
  groups.columns.out = y.data();
  groups.columns.rows = count;
  groups.columns.stride = width;
  groups.scale = scale.data();
  groups.bias = bias.data();
  groups.members = members;
  groups.epsilon = kEpsilon;
  groups.centered = centered;
  groups.columns.past = width * kSize[type] % 64 == 0 && width * kSize[kY[pair]] % 64 == 0;
  auto room = static_cast<double*>(work.data());
  kernels.groups_forward[pair](groups, 0, width, room);
  groups.columns.dy = dy.data();
  groups.columns.out = dx.data();
  std::vector<double> sums(size_t(2 * width), 0.0), lost(sums);
  kernels.groups_backward[pair](groups, 0, width, room, sums.data(), lost.data(), width);
  Numbers right_y(size_t(count * width)), right_dx(size_t(count * width));
  for (int64_t g = 0; g < number; ++g) {
    auto place = [&](int64_t i) { return i / members * width + g * members + i % members; };
    const Standard s = standard(x, n, centered, kEpsilon, place);
    Long mean_t = 0, along = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = place(i), c = at % width;
      const Long xhat = (x.at(at) - s.mean) * s.rstd, t = dy.at(at) * scale.at(c);
      right_y[size_t(at)] = xhat * scale.at(c) + bias.at(c);
      mean_t += t / Long(n);
      along += t * xhat / Long(n);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = place(i);
      right_dx[size_t(at)] = backward_of(s, centered, x.at(at), dy.at(at) * scale.at(at % width),
                                         mean_t, along);
    }
  }
  const bool wide = type == F64;
  hold("groups", pair, width, y, 0, right_y, wide ? 8 : 4);
  hold("groups backward", pair, width, dx, 0, right_dx, wide ? 16 : 8);
}

void check(const char* name, const Kernels& kernels) {
  level = name;
  held = 0;
  const int64_t before = wrong;
  for (int pair = 0; pair < kPairs; ++pair) {
    for (int64_t n = 1; n <= 70; ++n) {
      for (bool centered : {true, false}) {
        for (bool full : {true, false}) check_rows(kernels, pair, n, centered, full);
      }
    }
    for (int64_t n : {128, 255, 512, 1001}) check_rows(kernels, pair, n, true, true);
    for (int64_t width = 1; width <= 70; ++width) check_columns(kernels, pair, width, 37);
    for (int64_t width : {128, 255, 1025}) check_columns(kernels, pair, width, 300);
    // Of so many, short rows are taken as one, and these end within a vector.
    for (int64_t width : {1, 3, 7, 21, 33, 63}) check_columns(kernels, pair, width, 600);
    check_columns(kernels, pair, 20000, 20);
    for (int64_t number : {1, 3, 8}) {
      for (int64_t members : {1, 2, 5, 8, 17}) {
        for (bool centered : {true, false}) {
          check_groups(kernels, pair, number, members, 45, centered);
        }
      }
    }
  }
  std::printf("%s: %ld held, %ld wrong\n", name, long(held), long(wrong - before));
}

int main() {
  check("baseline", baseline::kernels);
#ifdef __x86_64__
  if (&avx2::kernels && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    check("avx2", avx2::kernels);
  }
  if (&avx512::kernels && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq")) {
    check("avx512", avx512::kernels);
  }
#endif
  return wrong != 0;
}
