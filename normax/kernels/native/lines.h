// What is known of each column, as a call has it: lines of numbers in buffers.

#ifndef NORMAX_LINES_H_
#define NORMAX_LINES_H_

#include <cmath>
#include <cstdint>

#include "buffers.h"

namespace normax {

constexpr int64_t kLeastRows = 64;  // of a piece, which makes sums or factors of its own

// Whether each buffer has so many numbers of a type; or, of those that may be absent, none.
template <class... Buffers>
bool are_lines(ffi::DataType type, int64_t count, const Buffers&... buffers) {
  return ((buffers.element_type() == type && count_of(buffers) == count) && ...);
}
template <class... Buffers>
bool may_be_lines(ffi::DataType type, int64_t count, const Buffers&... buffers) {
  return ((!count_of(buffers) || are_lines(type, count, buffers)) && ...);
}

// What was measured of columns, as it was kept: in units, an array that is not there being one or
// zero. Of entries that are not float64 it is given back in none, in double precision.
struct Measured {
  const AnyBuffer &unit, &mean, &rest, &var;
  double epsilon;
  bool wide;

  // Fills the lines but for gain, shift and along.
  void fill(int64_t count, const Lines& line) const {
    read(unit, 1, count, line.per_unit);
    read(mean, 0, count, line.mean);
    read(rest, 0, count, line.rest);
    read(var, 0, count, line.rstd);
    for (int64_t i = 0; i < count; ++i) {
      const double size = wide ? 1 : line.per_unit[i], per_unit = wide ? 1 / line.per_unit[i] : 1;
      line.mean[i] = (line.mean[i] + (wide ? 0 : line.rest[i])) * size;
      line.rest[i] = wide ? line.rest[i] : 0;
      line.per_unit[i] = per_unit;
      line.rstd[i] = line.rstd[i] * size * size + epsilon * per_unit * per_unit;
    }
    for (int64_t i = 0; i < count; ++i) {
      line.rstd[i] = line.rstd[i] == 0 ? 0 : 1 / std::sqrt(line.rstd[i]);
    }
  }
};

}  // namespace normax

#endif  // NORMAX_LINES_H_
