// Sums over rows, in pieces, for the gradients of scale and bias.

#ifndef NORMAX_SUMS_H_
#define NORMAX_SUMS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "buffers.h"

namespace normax {

constexpr int64_t kRowsOfSums = 16;

// How many examples, of so many rows each, a piece has at least. Each has sums of its own, of more
// than a few rows: of fewer, one for each thread.
inline int64_t least_with_sums(int64_t examples, int64_t rows, int64_t threads) {
  return std::clamp<int64_t>(examples / threads, 1, (kRowsOfSums + rows - 1) / rows);
}

// A line for scale and one for bias for each piece, added up in the order of pieces. A call that is
// one piece is done with the sums of a strip of columns when that ends: then each worker has some.
class GradientSums {
 public:
  struct Lines {
    double *found, *lost;
  };

  GradientSums(int pair, const Cuts& cuts, int64_t width, int64_t strip, int64_t workers)
      : pair_(pair),
        cuts_(cuts),
        width_(width),
        apart_(cuts.pieces == 1),
        stride_(apart_ ? strip : width),
        count_(2 * stride_ * (apart_ ? workers : cuts.number())),
        sums_(zeros(count_)),
        lost_(zeros(pair == kF64 ? count_ : 0)) {}

  bool are_there() const { return sums_ && lost_; }
  int64_t stride() const { return stride_; }  // from a column's sum for scale to that for bias

  Lines lines_of(int64_t piece, int64_t worker, int64_t column = 0) {
    const int64_t place = 2 * stride_ * (apart_ ? worker : piece) + (apart_ ? 0 : column);
    const Lines lines{&sums_[place], lost_.get() + (pair_ == kF64 ? place : 0)};
    if (apart_) {
      std::fill_n(lines.found, 2 * stride_, 0.0);
      if (pair_ == kF64) std::fill_n(lines.lost, 2 * stride_, 0.0);
    }
    return lines;
  }

  void finish(const Lines& lines, int64_t call, int64_t begin, int64_t end,
              const AnyBuffer& dscale, const AnyBuffer& dbias) const {
    if (!apart_) return;
    give_back(lines.found, lines.lost, 2 * stride_);
    write(lines.found, end - begin, dscale, call * width_ + begin);
    write(lines.found + stride_, end - begin, dbias, call * width_ + begin);
  }

  void finish_all(const AnyBuffer& dscale, const AnyBuffer& dbias) {
    if (apart_) return;
    give_back(sums_.get(), lost_.get(), count_);
    for (int64_t call = 0; call < cuts_.batch; ++call) {
      const double* line = sums_of_call(cuts_, sums_.get(), 2 * width_, call);
      write(line, width_, dscale, call * width_);
      write(line + width_, width_, dbias, call * width_);
    }
  }

 private:
  // What sums of float64 entries lose, one for each of them; of others nothing is kept.
  void give_back(double* sums, const double* lost, int64_t count) const {
    for (int64_t i = 0; i < count && pair_ == kF64; ++i) {
      if (std::isfinite(sums[i])) sums[i] += lost[i];
    }
  }

  int pair_;
  Cuts cuts_;
  int64_t width_;
  bool apart_;
  int64_t stride_, count_;
  Memory sums_, lost_;
};

}  // namespace normax

#endif  // NORMAX_SUMS_H_
