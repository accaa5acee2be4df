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
  bool past;  // the output, of whole lines of cache, is written past it
};

struct Columns {
  const void* x;
  const void* dy;
  void* out;  // y or dx
  int64_t rows;
  int64_t stride;  // from a row to the next, in entries
  bool past;       // as in Rows
};

// How many rows to take as one: short ones, that are no whole vectors, cost most by their ends.
static inline __attribute__((always_inline)) int64_t rows_as_one(const Columns& columns,
                                                                 int64_t width) {
  const int64_t stride = columns.stride;
  if (width != stride || stride >= 64) return 1;
  int64_t many = 16;
  while (many > 1 && many / 2 * stride % 16 == 0) many /= 2;
  while (many * stride < 128) many *= 2;
  return columns.rows >= 4 * many ? many : 1;
}

// What columns are summed about, a number for each.
struct About {
  const double *pivot, *rstd;
  const double* per_unit;  // of float64 entries alone: squares of others are in range
  __attribute__((always_inline)) About from(int64_t column) const {
    return {pivot + column, rstd + column, per_unit + column};
  }
};

// What outputs are made from, a number for each column, d being (x per_unit - mean) - rest:
// y = d gain + shift, or dx = ((dy gain - shift) - d rstd along) rstd per_unit.
// Entries that are not float64 have no rest, and 1 per unit. Of those that are the gain is the
// scale, y = d rstd gain + shift: the product of the two may leave the range.
struct Lines {
  double *mean, *rest, *gain, *shift, *rstd, *along, *per_unit;
};
constexpr int64_t kLines = 7;

// Such lines one after the other, in memory for kLines of them.
static inline __attribute__((always_inline)) Lines lines_in(double* memory, int64_t width) {
  double* line[kLines];
  for (int64_t i = 0; i < kLines; ++i) line[i] = memory + i * width;
  return {line[0], line[1], line[2], line[3], line[4], line[5], line[6]};
}

struct Groups {
  Columns columns;  // of one example
  const void* scale;  // or null, like the bias
  const void* bias;
  int64_t members;
  double epsilon;
  bool centered;
};

struct Kernels {
  // Rows from `begin` to `end`.
  void (*forward[kPairs])(const Rows&, int64_t begin, int64_t end);
  // Likewise; adds its share of dscale and dbias to `sums`, two lines, and what sums of float64
  // lose to `lost`. `work` has room for two lines of the parameters' dtype.
  void (*backward[kPairs])(const Rows&, int64_t begin, int64_t end, double* sums, double* lost,
                           void* work);
  // Adds, for each column, the sums of d and d^2, d being x less its pivot; or, where there is a
  // dy, of dy and dy d times rstd. Of each a line of `width`. If not `exact`, of a few rows in
  // float32, in which the pivots are to be numbers.
  void (*sum_columns[kPairs])(const Columns&, bool exact, const About&, double* sums,
                              int64_t width);
  // Makes what columns are written by: kFactorLines lines for `many` rows of a width, in `work`;
  // returns whether they are in float32.
  bool (*make_factors[kPairs])(const Lines&, int64_t width, int64_t many, bool backward,
                               double* work);
  // Writes the columns by them, so many rows as one.
  void (*write_columns[kPairs])(const Columns&, int64_t many, bool rough, double* work);
  // Whole groups of columns from `begin` to `end`; `work` has room for kGroupLines
  // lines of end - begin.
  void (*groups_forward[kPairs])(const Groups&, int64_t begin, int64_t end, double* work);
  // Likewise; adds to dscale and dbias, from `begin` on, `width` apart, as rows do.
  void (*groups_backward[kPairs])(const Groups&, int64_t begin, int64_t end, double* work,
                                  double* sums, double* lost, int64_t width);
};

// What a group is measured in, for each column: four sums and what Lines has.
constexpr int64_t kSumLines = 4, kMeasureLines = kSumLines + kLines, kFactorLines = 8;
constexpr int64_t kGroupLines = kMeasureLines + kFactorLines;

// Where factors are of this size, what they are made for, and products of them and it, can be had
// in float32.
constexpr double kLeast = 1e-30, kMost = 1e30;
static inline __attribute__((always_inline)) bool fits(double factor) {
  return factor >= kLeast && factor <= kMost;
}

constexpr double kLeastEpsilon = 1e-24;

// Whether float32 was enough for the sums of a few d and d^2: no square left its range, and the
// pivot is not so far from the mean that the digits of d are those of the distance. Squares that
// add up to nothing may all be too small; to an epsilon that is larger it is the same.
static inline __attribute__((always_inline)) bool are_enough(double mean, double var,
                                                             double epsilon) {
  if (var == 0 && mean == 0) return epsilon >= kLeastEpsilon;
  return var > 1e-28 && var < 1e36 && mean * mean < 4 * var;
}

// Likewise of t and t d, n of them, which are not to leave it either.
static inline __attribute__((always_inline)) bool are_enough_with(double mean, double var,
                                                                  double epsilon, double t,
                                                                  double products, double n) {
  const bool equal = var == 0 && mean == 0;
  if (!are_enough(mean, var, epsilon) || !(equal || (var > 1e-12 && var < 1e12))) return false;
  const double part = 1 / n;
  const double of_t = __builtin_fabs(t) * part, of_products = __builtin_fabs(products) * part;
  if (!(of_t < 1e30 && of_products < 1e30)) return false;
  return of_t + of_products == 0 || of_t > 1e-26 || of_products > 1e-30;
}

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace normax

#endif  // NORMAX_KERNELS_H_
