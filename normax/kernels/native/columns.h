// Columns: sums down them, rows being read as they lie, a few in float32 and all in double
// precision; and groups of columns.

// Rows whose sums are kept in float32: so few that, of equal entries, roundings that are all alike
// stay near one unit in the last place.
template <class T>
constexpr int64_t kFewRows = sizeof(T) == 2 ? 8 : 4;
// Columns of them at a time, whose sums stay in a near cache; and how far ahead to ask for more.
constexpr int64_t kSlice = 1024, kAhead = 256;

enum class Sum { kMoments, kGradients, kBoth };

// The sums of some vectors of columns: d and d^2, or dy and dy d, or all four. The next rows are
// asked for: that they come one after the other is more than a processor finds out.
template <Sum kSum, class A, int kVectors, class P, class T, class O>
INLINE void sum_block(const T* x, const O* dy, int64_t first, int64_t rows, int64_t stride,
                      const double* pivot, const double* rstd, double* sums, int64_t width,
                      int count) {
  constexpr bool moments = kSum != Sum::kGradients, gradients = kSum != Sum::kMoments;
  constexpr int kLanes = kWidth<A>;
  V<A> center[kVectors], factor[kVectors], d_sum[kVectors] = {}, squares[kVectors] = {};
  V<A> t_sum[kVectors] = {}, products[kVectors] = {};
  for (int k = 0; k < kVectors; ++k) {
    center[k] = P::template load<A>(pivot + k * kLanes, count);
    if constexpr (!moments) factor[k] = P::template load<A>(rstd + k * kLanes, count);
  }
  const int64_t ahead = rows * stride;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = first + r * stride;
    __builtin_prefetch(x + at + ahead);
    if constexpr (gradients) __builtin_prefetch(dy + at + ahead);
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      V<A> d = P::template load<A>(x + at + k * kLanes, count) - center[k];
      if constexpr (moments) {
        d_sum[k] += d;
        squares[k] = plus_product(squares[k], d, d);
      } else {
        d *= factor[k];
      }
      if constexpr (gradients) {
        V<A> t = P::template load<A>(dy + at + k * kLanes, count);
        t_sum[k] += t;
        products[k] = plus_product(products[k], d, t);
      }
    }
  }
  for (int k = 0; k < kVectors; ++k) {
    double* line = sums + k * kLanes;
    if constexpr (moments) {
      add_to<P>(line, d_sum[k], count);
      add_to<P>(line + width, squares[k], count);
    }
    if constexpr (gradients) {
      add_to<P>(line + (moments ? 2 : 0) * width, t_sum[k], count);
      add_to<P>(line + (moments ? 3 : 1) * width, products[k], count);
    }
  }
}

// The same where there is a dy, of a few rows in float32 at a time. Of two arrays more is gained by
// reading rows from end to end, and keeping the sums of these few beside.
template <Sum kSum, class T, class O>
INLINE void sum_roughly(const Columns& columns, int64_t begin, int64_t end, const double* pivot,
                        const double* rstd, double* sums, int64_t width) {
  constexpr bool moments = kSum == Sum::kBoth;
  constexpr int kSums = moments ? 4 : 2, kOfDy = moments ? 2 : 0;
  auto x = static_cast<const T*>(columns.x);
  auto dy = static_cast<const O*>(columns.dy);
  alignas(32) float found[kSums][kSlice], high[kSlice], low[kSlice], factor[kSlice];
  for (int64_t start = 0; start < columns.rows; start += kFewRows<T>) {
    const int64_t stop = start + kFewRows<T> < columns.rows ? start + kFewRows<T> : columns.rows;
    for (int64_t c = begin; c < end; c += kSlice) {
      const int64_t n = end - c < kSlice ? end - c : kSlice;
      for (int64_t i = 0; i < n; ++i) {
        const double center = pivot[c - begin + i];
        high[i] = float(center);
        low[i] = float(center - high[i]);
        factor[i] = float(rstd[c - begin + i]);
        for (int k = 0; k < kSums; ++k) found[k][i] = 0;
      }
      for (int64_t r = start; r < stop; ++r) {
        const int64_t at = r * columns.stride + c;
        each<float>(0, n, [&](auto place, int half, int64_t i, int count) INLINE_LAMBDA {
          typedef decltype(place) P;
          typedef V<float> F;
          if (half == 0) {
            __builtin_prefetch(x + at + i + kAhead);
            __builtin_prefetch(dy + at + i + kAhead);
          }
          auto of = [&](const auto* line) INLINE_LAMBDA {
            return P::template load<float>(line + i, count);
          };
          auto sum = [&](int k) INLINE_LAMBDA { return of(found[k]); };
          auto keep = [&](int k, F v) INLINE_LAMBDA {
            P::template store<float>(found[k] + i, v, count);
          };
          F d = of(x + at) - of(high);
          if constexpr (moments) {
            keep(0, sum(0) + d);
            keep(1, plus_product(sum(1), d, d));
          } else {
            // Otherwise the pivot is an entry, which lacks nothing.
            d = (d - of(low)) * of(factor);
          }
          F t = of(dy + at);
          keep(kOfDy, sum(kOfDy) + t);
          keep(kOfDy + 1, plus_product(sum(kOfDy + 1), d, t));
        });
      }
      for (int k = 0; k < kSums; ++k) {
        double* line = sums + k * width + c - begin;
        for (int64_t i = 0; i < n; ++i) line[i] += found[k][i];
      }
    }
  }
}

// Adds up columns: with A float, where there is no dy, a few rows in that. The pivots are entries
// then, which lack nothing in float32.
template <Sum kSum, class A, class T, class O>
INLINE void sum_down(const Columns& columns, int64_t begin, int64_t end, const double* pivot,
                     const double* rstd, double* sums, int64_t width) {
  constexpr int kLanes = kWidth<A>, kVectors = 16 / kLanes / (kSum == Sum::kBoth ? 2 : 1);
  auto x = static_cast<const T*>(columns.x);
  auto dy = static_cast<const O*>(columns.dy);
  for (int64_t start = 0; start < columns.rows; start += kFewRows<T>) {
    const int64_t left = columns.rows - start, rows = left < kFewRows<T> ? left : kFewRows<T>;
    const int64_t first = start * columns.stride, stride = columns.stride;
    int64_t c = begin;
    for (; c + kVectors * kLanes <= end; c += kVectors * kLanes) {
      sum_block<kSum, A, kVectors, Whole>(x, dy, first + c, rows, stride, pivot + c - begin,
                                          rstd + c - begin, sums + c - begin, width, kLanes);
    }
    for (; c + kLanes <= end; c += kLanes) {
      sum_block<kSum, A, 1, Whole>(x, dy, first + c, rows, stride, pivot + c - begin,
                                   rstd + c - begin, sums + c - begin, width, kLanes);
    }
    if (c < end) {
      sum_block<kSum, A, 1, Part>(x, dy, first + c, rows, stride, pivot + c - begin,
                                  rstd + c - begin, sums + c - begin, width, int(end - c));
    }
  }
}

template <Sum kSum, class A, class T, class O>
__attribute__((noinline)) void sum_part(const Columns& columns, int64_t begin, int64_t end,
                                        const double* pivot, const double* rstd, double* sums,
                                        int64_t width) {
  if constexpr (sizeof(A) == 4 && kSum != Sum::kMoments) {
    sum_roughly<kSum, T, O>(columns, begin, end, pivot, rstd, sums, width);
  } else {
    sum_down<kSum, A, T, O>(columns, begin, end, pivot, rstd, sums, width);
  }
}

// How many rows to take as one: short ones, that are no whole vectors, cost most by their ends.
INLINE int64_t rows_as_one(const Columns& columns, int64_t width) {
  const int64_t stride = columns.stride;
  if (width != stride || stride >= 64) return 1;
  int64_t many = 16;
  while (many > 1 && many / 2 * stride % 16 == 0) many /= 2;
  while (many * stride < 128) many *= 2;
  return columns.rows >= 4 * many ? many : 1;
}

template <Sum kSum, class A, class T, class O>
INLINE void sum_all(const Columns& columns, int64_t begin, int64_t end, const double* pivot,
                    const double* rstd, double* sums, int64_t width) {
  const int64_t many = rows_as_one(columns, end - begin), wide = many * columns.stride;
  if (many == 1) return sum_part<kSum, A, T, O>(columns, begin, end, pivot, rstd, sums, width);
  constexpr int kSums = kSum == Sum::kBoth ? 4 : 2;
  double pivots[kSlice], rstds[kSlice], found[kSums * kSlice];
  for (int64_t c = 0; c < wide; ++c) {
    pivots[c] = pivot[c % columns.stride];
    rstds[c] = rstd[c % columns.stride];
    for (int k = 0; k < kSums; ++k) found[k * wide + c] = 0;
  }
  Columns joined = columns, rest = columns;
  joined.stride = wide;
  joined.rows = columns.rows / many;
  sum_part<kSum, A, T, O>(joined, 0, wide, pivots, rstds, found, wide);
  for (int k = 0; k < kSums; ++k) {
    for (int64_t c = 0; c < wide; ++c) sums[k * width + c % columns.stride] += found[k * wide + c];
  }
  rest.rows = columns.rows % many;
  rest.x = static_cast<const T*>(columns.x) + joined.rows * wide;
  if (columns.dy) rest.dy = static_cast<const O*>(columns.dy) + joined.rows * wide;
  if (rest.rows) sum_part<kSum, A, T, O>(rest, begin, end, pivot, rstd, sums, width);
}

template <class T, class O>
void sum_columns(const Columns& columns, bool exact, const double* pivot, const double* rstd,
                 double* sums, int64_t width) {
  const int64_t end = columns.stride;
  if (columns.dy && exact) {
    sum_all<Sum::kGradients, double, T, O>(columns, 0, end, pivot, rstd, sums, width);
  } else if (columns.dy) {
    sum_all<Sum::kGradients, float, T, O>(columns, 0, end, pivot, rstd, sums, width);
  } else if (exact) {
    sum_all<Sum::kMoments, double, T, O>(columns, 0, end, pivot, pivot, sums, width);
  } else {
    sum_all<Sum::kMoments, float, T, O>(columns, 0, end, pivot, pivot, sums, width);
  }
}

// Lines in the type to compute in: the mean is two numbers, and what is left has one rounding.
template <class C>
struct Factors {
  C *high, *low, *gain, *shift, *rstd, *along;

  // `many` times one after the other, for as many rows.
  Factors(const Lines& lines, int64_t width, int64_t many, C* work)
      : high(work),
        low(high + many * width),
        gain(low + many * width),
        shift(gain + many * width),
        rstd(shift + many * width),
        along(rstd + many * width) {
    for (int64_t i = 0; i < many * width; ++i) {
      const int64_t c = many == 1 ? i : i % width;
      high[i] = C(lines.mean[c]);
      low[i] = C(lines.mean[c] - high[i]);
      gain[i] = C(lines.gain[c]);
      shift[i] = C(lines.shift[c]);
      rstd[i] = C(lines.rstd[c]);
      along[i] = C(lines.along[c]);
    }
  }
};

template <bool kBackward, class W, class C, class T, class O, class R>
INLINE void write_row(const Factors<C>& f, int64_t width, const T* x, const O* dy, int64_t at,
                      R* out) {
  each<C, W>(0, width, [&](auto place, int, int64_t c, int count) INLINE_LAMBDA {
    typedef decltype(place) P;
    V<C> v = (P::template load<C>(x + at + c, count) - P::template load<C>(f.high + c, count)) -
             P::template load<C>(f.low + c, count);
    const V<C> gain = P::template load<C>(f.gain + c, count);
    const V<C> shift = P::template load<C>(f.shift + c, count);
    if constexpr (kBackward) {
      const V<C> rstd = P::template load<C>(f.rstd + c, count);
      const V<C> along = P::template load<C>(f.along + c, count);
      v = ((P::template load<C>(dy + at + c, count) * gain - shift) - v * rstd * along) * rstd;
    } else {
      v = v * gain + shift;
    }
    P::template store<C>(out + at + c, v, count);
  });
}

template <bool kBackward, class C, class T, class O, class R>
INLINE void write_rows(const Columns& columns, int64_t begin, int64_t end, const Lines& lines,
                       R* out, double* work) {
  const int64_t width = end - begin, many = rows_as_one(columns, width);
  alignas(32) C room[kFactorLines * kSlice];
  const Factors<C> factors(lines, width, many,
                           many == 1 ? static_cast<C*>(static_cast<void*>(work)) : room);
  auto x = static_cast<const T*>(columns.x);
  auto dy = static_cast<const O*>(columns.dy);
  for (int64_t r = 0; r < columns.rows;) {
    const int64_t at = r * columns.stride + begin;
    const int64_t joined = r + many <= columns.rows ? many : 1;
    if (columns.past) {
      write_row<kBackward, WholePast>(factors, joined * width, x, dy, at, out);
    } else {
      write_row<kBackward, Whole>(factors, joined * width, x, dy, at, out);
    }
    r += joined;
  }
  settle();
}

template <class T, class O>
INLINE void write_groups(bool in_range, const Columns& columns, int64_t begin, int64_t end,
                         const Lines& lines, double* work) {
  if (columns.dy) {
    auto dx = static_cast<T*>(columns.out);
    if (in_range) {
      write_rows<true, float, T, O>(columns, begin, end, lines, dx, work);
    } else {
      write_rows<true, double, T, O>(columns, begin, end, lines, dx, work);
    }
  } else {
    auto y = static_cast<O*>(columns.out);
    if (in_range) {
      write_rows<false, float, T, O>(columns, begin, end, lines, y, work);
    } else {
      write_rows<false, double, T, O>(columns, begin, end, lines, y, work);
    }
  }
}

INLINE bool lines_fit(const Lines& lines, int64_t width, bool backward) {
  for (int64_t c = 0; c < width; ++c) {
    if (!fits(lines.rstd[c])) return false;
    if (!backward && lines.gain[c] != 0 && !fits(__builtin_fabs(lines.gain[c]))) return false;
  }
  return true;
}

template <class T, class O>
void write_columns(const Columns& columns, const Lines& lines, int64_t width, double* work) {
  const bool in_range = lines_fit(lines, width, columns.dy);
  write_groups<T, O>(in_range, columns, 0, width, lines, work);
}

// A number in float32 that is near the mean, of a few entries of a group: of equal ones, theirs.
template <class T>
INLINE double about_the_middle(const Groups& groups, const T* x, int64_t first) {
  double sum = 0;
  for (int i = 0; i < 4; ++i) {
    const int64_t row = groups.columns.rows * i / 4;
    sum += number(x + row * groups.columns.stride + first + i % groups.members);
  }
  return double(float(sum / 4));
}

// The sums of the groups' columns, and their lines; returns whether float32 was enough for A.
template <Sum kSum, class A, class T, class O>
INLINE bool measure_groups_in(const Groups& groups, int64_t begin, int64_t end, double* sums,
                              int64_t width, const Lines& lines) {
  constexpr bool backward = kSum == Sum::kBoth;
  for (int64_t i = 0; i < kMeasureLines * width; ++i) sums[i] = 0;
  double* pivot = lines.mean;
  bool enough = true;
  auto x = static_cast<const T*>(groups.columns.x);
  const int64_t members = groups.members;
  for (int64_t c = begin; c < end && groups.centered; ++c) {
    pivot[c - begin] = about_the_middle(groups, x, c / members * members);
  }
  sum_all<kSum, A, T, O>(groups.columns, begin, end, pivot, pivot, sums, width);
  const double n = double(groups.columns.rows) * double(members);
  for (int64_t g = 0; g < end - begin; g += members) {
    Sums all;
    for (int64_t c = g; c < g + members; ++c) {
      double scale = groups.scale ? groups.scale[begin + c] : 1;
      all.d += sums[c];
      all.squares += sums[width + c];
      all.t += scale * sums[2 * width + c];
      all.products += scale * sums[3 * width + c];
    }
    const double above = groups.centered ? all.d / n : 0;
    double var = all.squares / n - above * above;
    const double epsilon = groups.epsilon;
    enough = enough && (backward ? are_enough_with(above, var, epsilon, all.t, all.products, n)
                                 : are_enough(above, var, epsilon));
    if (var < 0) var = 0;
    var += epsilon;
    const double rstd = var == 0 ? 0 : 1 / __builtin_sqrt(var);
    const double mean_t = groups.centered ? all.t / n : 0;
    const double along = (all.products - above * all.t) / n * rstd;
    for (int64_t c = g; c < g + members; ++c) {
      double scale = groups.scale ? groups.scale[begin + c] : 1;
      lines.mean[c] += above;
      lines.rstd[c] = rstd;
      if (backward) {
        lines.gain[c] = scale;
        lines.shift[c] = mean_t;
        lines.along[c] = along;
        // What the gradients of scale and bias are.
        sums[c] = (sums[3 * width + c] - above * sums[2 * width + c]) * rstd;
      } else {
        lines.gain[c] = scale * rstd;
        lines.shift[c] = groups.bias ? groups.bias[begin + c] : 0;
      }
    }
  }
  return enough;
}

template <Sum kSum, class T, class O>
INLINE Lines measure_groups(const Groups& groups, int64_t begin, int64_t end, double* sums,
                            int64_t width) {
  double* mean = sums + 4 * width;
  const Lines lines{mean, mean + width, mean + 2 * width, mean + 3 * width, mean + 4 * width};
  if (!measure_groups_in<kSum, float, T, O>(groups, begin, end, sums, width, lines)) {
    measure_groups_in<kSum, double, T, O>(groups, begin, end, sums, width, lines);
  }
  return lines;
}

template <class T, class O>
void groups_forward(const Groups& groups, int64_t begin, int64_t end, double* work) {
  const int64_t width = end - begin;
  const Lines lines = measure_groups<Sum::kMoments, T, O>(groups, begin, end, work, width);
  const bool in_range = lines_fit(lines, width, false);
  write_groups<T, O>(in_range, groups.columns, begin, end, lines, work + kMeasureLines * width);
}

template <class T, class O>
void groups_backward(const Groups& groups, int64_t begin, int64_t end, double* work,
                     double* gradients, int64_t apart) {
  const int64_t width = end - begin;
  const Lines lines = measure_groups<Sum::kBoth, T, O>(groups, begin, end, work, width);
  for (int64_t c = 0; c < width; ++c) {
    gradients[begin + c] += work[c];
    gradients[apart + begin + c] += work[2 * width + c];
  }
  const bool in_range = lines_fit(lines, width, true);
  write_groups<T, O>(in_range, groups.columns, begin, end, lines, work + kMeasureLines * width);
}
