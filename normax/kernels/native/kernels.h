// What the kernels are asked for, and the tables of them, one for each set of instructions.

#ifndef NORMAX_KERNELS_H_
#define NORMAX_KERNELS_H_

#include <cstdint>

namespace normax {

// Dtypes of x and of y, which dy shares.
enum Pair { kF32, kBF16, kF16, kF64, kBF16ToF32, kF16ToF32, kPairs };

// Parameters and their gradients are float64 for float64 entries, else float32.
struct Rows {
  const void* x;
  const void* added;  // forward, the residual; backward, the cotangent of the sum; or null
  const void* dy;
  const void* scale;  // or null, like the bias
  const void* bias;
  void* sum;  // x + residual, or null
  void* out;  // y or dx
  int64_t length;
  double epsilon;
  bool centered;
};

struct Columns {
  const void* x;
  const void* dy;
  int64_t rows;
  int64_t stride;  // from a row to the next, in entries
};

struct Groups {
  Columns columns;  // of one example
  void* out;
  const float* scale;
  const float* bias;
  int64_t members;
  double epsilon;
  bool centered;
};

struct Kernels {
  // Rows from `begin` to `end`.
  void (*forward[kPairs])(const Rows&, int64_t begin, int64_t end);
  // Likewise; adds its share of dscale and dbias to `sums`, two lines. `work` has room for two
  // lines of the parameters' dtype.
  void (*backward[kPairs])(const Rows&, int64_t begin, int64_t end, double* sums, void* work);
  // Adds, for each column from `begin` to `end`, the sums of d and d^2, d being x less its pivot;
  // or, where there is a dy, of d, d^2, dy and dy d. Of each a line of `width`.
  void (*columns[kPairs])(const Columns&, int64_t begin, int64_t end, const double* pivot,
                          double* sums, int64_t width);
  // Whole groups of columns from `begin` to `end`; `work` has room for 12 lines of end - begin.
  void (*groups_forward[kPairs])(const Groups&, int64_t begin, int64_t end, double* work);
  // Likewise; adds to dscale and dbias, `width` apart.
  void (*groups_backward[kPairs])(const Groups&, int64_t begin, int64_t end, double* work,
                                  double* sums, int64_t width);
};

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}

}  // namespace normax

#endif  // NORMAX_KERNELS_H_
