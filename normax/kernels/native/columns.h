// Columns: sums down them, rows being read as they lie, a few in float32 and all in double
// precision; and groups of columns.

// Rows whose sums are kept in float32: so few that, of equal entries, roundings that are all alike
// stay near one unit in the last place.
template <class T>
constexpr int64_t kFewRows = sizeof(T) == 2 ? 8 : 4;
// Columns of them at a time, whose sums stay in a near cache; and how far ahead to ask for more.
constexpr int64_t kSlice = 1024, kAhead = 256;

enum class Sum { kMoments, kGradients, kBoth };
template <Sum kSum>
constexpr int kSums = kSum == Sum::kBoth ? 4 : 2;

// The sums of some vectors of columns: d and d^2, or dy and dy d, or all four. The next rows are
// asked for: that they come one after the other is more than a processor finds out.
template <Sum kSum, class A, int kVectors, class P, class T, class O>
INLINE void sum_block(const T* x, const O* dy, int64_t first, int64_t rows, int64_t stride,
                      const About& about, double* sums, int64_t width, double* lost, int count) {
  constexpr bool moments = kSum != Sum::kGradients, gradients = kSum != Sum::kMoments;
  constexpr bool in_units = sizeof(T) == 8;
  constexpr int kLanes = kWidth<A>;
  V<A> center[kVectors], factor[kVectors], d_sum[kVectors] = {}, squares[kVectors] = {};
  V<A> t_sum[kVectors] = {}, products[kVectors] = {}, per_unit[kVectors];
  for (int k = 0; k < kVectors; ++k) {
    center[k] = P::template load<A>(about.pivot + k * kLanes, count);
    if constexpr (!moments) factor[k] = P::template load<A>(about.rstd + k * kLanes, count);
    if constexpr (in_units) per_unit[k] = P::template load<A>(about.per_unit + k * kLanes, count);
  }
  const int64_t ahead = rows * stride;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = first + r * stride;
    __builtin_prefetch(x + at + ahead);
    if constexpr (gradients) __builtin_prefetch(dy + at + ahead);
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      V<A> d = P::template load<A>(x + at + k * kLanes, count);
      if constexpr (in_units) d *= per_unit[k];
      d -= center[k];
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
    auto add = [&](int i, V<A> sum) INLINE_LAMBDA {
      double* line = sums + i * width + k * kLanes;
      if constexpr (in_units) {
        add_exactly<P>(line, lost + i * kSlice + k * kLanes, sum, count);
      } else {
        add_to<P>(line, sum, count);
      }
    };
    if constexpr (moments) {
      add(0, d_sum[k]);
      add(1, squares[k]);
    }
    if constexpr (gradients) {
      add(moments ? 2 : 0, t_sum[k]);
      add(moments ? 3 : 1, products[k]);
    }
  }
}

// The same where there is a dy, of a few rows in float32 at a time. Of two arrays more is gained by
// reading rows from end to end, and keeping the sums of these few beside.
template <Sum kSum, class T, class O>
INLINE void sum_roughly(const Columns& columns, int64_t begin, int64_t end, const About& about,
                        double* sums, int64_t width) {
  constexpr bool moments = kSum == Sum::kBoth;
  constexpr int kOfDy = moments ? 2 : 0;
  auto x = static_cast<const T*>(columns.x);
  auto dy = static_cast<const O*>(columns.dy);
  alignas(kBytes) float found[kSums<kSum>][kSlice], high[kSlice], low[kSlice], factor[kSlice];
  for (int64_t c = begin; c < end; c += kSlice) {
    const int64_t n = end - c < kSlice ? end - c : kSlice;
    for (int64_t i = 0; i < n; ++i) {
      const double center = about.pivot[c - begin + i];
      high[i] = float(center);
      low[i] = float(center - high[i]);
      factor[i] = float(about.rstd[c - begin + i]);
      for (int k = 0; k < kSums<kSum>; ++k) found[k][i] = 0;
    }
    for (int64_t start = 0; start < columns.rows; start += kFewRows<T>) {
      const int64_t stop = start + kFewRows<T> < columns.rows ? start + kFewRows<T> : columns.rows;
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
      for (int k = 0; k < kSums<kSum>; ++k) {
        double* line = sums + k * width + c - begin;
        for (int64_t i = 0; i < n; ++i) {
          line[i] += found[k][i];
          found[k][i] = 0;
        }
      }
    }
  }
}

// Adds up columns: with A float, where there is no dy, a few rows in that. The pivots are entries
// then, which lack nothing in float32. Of float64 entries what sums lose goes to lines of kSlice.
template <Sum kSum, class A, class T, class O>
INLINE void sum_down(const Columns& columns, int64_t begin, int64_t end, const About& about,
                     double* sums, int64_t width, double* lost = nullptr) {
  constexpr int kLanes = kWidth<A>;
  constexpr int kVectors = 2 * kWidth<float> / kLanes / (kSum == Sum::kBoth ? 2 : 1);
  auto x = static_cast<const T*>(columns.x);
  auto dy = static_cast<const O*>(columns.dy);
  auto from = [&](int64_t c) INLINE_LAMBDA { return lost ? lost + c : nullptr; };
  for (int64_t start = 0; start < columns.rows; start += kFewRows<T>) {
    const int64_t left = columns.rows - start, rows = left < kFewRows<T> ? left : kFewRows<T>;
    const int64_t first = start * columns.stride, stride = columns.stride;
    int64_t c = begin;
    for (; c + kVectors * kLanes <= end; c += kVectors * kLanes) {
      sum_block<kSum, A, kVectors, Whole>(x, dy, first + c, rows, stride, about.from(c - begin),
                                          sums + c - begin, width, from(c - begin), kLanes);
    }
    for (; c + kLanes <= end; c += kLanes) {
      sum_block<kSum, A, 1, Whole>(x, dy, first + c, rows, stride, about.from(c - begin),
                                   sums + c - begin, width, from(c - begin), kLanes);
    }
    if (c < end) {
      sum_block<kSum, A, 1, Part>(x, dy, first + c, rows, stride, about.from(c - begin),
                                  sums + c - begin, width, from(c - begin), int(end - c));
    }
  }
}

template <Sum kSum, class A, class T, class O>
__attribute__((noinline)) void sum_part(const Columns& columns, int64_t begin, int64_t end,
                                        const About& about, double* sums, int64_t width) {
  if constexpr (sizeof(A) == 4 && kSum != Sum::kMoments) {
    sum_roughly<kSum, T, O>(columns, begin, end, about, sums, width);
  } else if constexpr (sizeof(T) == 8) {
    for (int64_t c = begin; c < end; c += kSlice) {
      const int64_t stop = end - c < kSlice ? end : c + kSlice;
      double lost[kSums<kSum> * kSlice] = {};
      double* slice = sums + c - begin;
      sum_down<kSum, A, T, O>(columns, c, stop, about.from(c - begin), slice, width, lost);
      for (int k = 0; k < kSums<kSum>; ++k) {
        for (int64_t i = 0; i < stop - c; ++i) {
          double& sum = slice[k * width + i];
          sum = whole_of(sum, lost[k * kSlice + i]);
        }
      }
    }
  } else {
    sum_down<kSum, A, T, O>(columns, begin, end, about, sums, width);
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
INLINE void sum_all(const Columns& columns, int64_t begin, int64_t end, const About& about,
                    double* sums, int64_t width) {
  const int64_t many = rows_as_one(columns, end - begin), wide = many * columns.stride;
  if (many == 1) return sum_part<kSum, A, T, O>(columns, begin, end, about, sums, width);
  double pivots[kSlice], rstds[kSlice], per_units[kSlice], found[kSums<kSum> * kSlice];
  for (int64_t c = 0; c < wide; ++c) {
    pivots[c] = about.pivot[c % columns.stride];
    rstds[c] = about.rstd[c % columns.stride];
    per_units[c] = about.per_unit[c % columns.stride];
    for (int k = 0; k < kSums<kSum>; ++k) found[k * wide + c] = 0;
  }
  Columns joined = columns, rest = columns;
  joined.stride = wide;
  joined.rows = columns.rows / many;
  sum_part<kSum, A, T, O>(joined, 0, wide, {pivots, rstds, per_units}, found, wide);
  for (int k = 0; k < kSums<kSum>; ++k) {
    for (int64_t i = 0; i < columns.stride; ++i) {
      Total<sizeof(T) == 8> all{sums[k * width + i]};
      for (int64_t c = i; c < wide; c += columns.stride) all.add(found[k * wide + c]);
      sums[k * width + i] = all.whole();
    }
  }
  rest.rows = columns.rows % many;
  rest.x = static_cast<const T*>(columns.x) + joined.rows * wide;
  if (columns.dy) rest.dy = static_cast<const O*>(columns.dy) + joined.rows * wide;
  if (rest.rows) sum_part<kSum, A, T, O>(rest, begin, end, about, sums, width);
}

template <class T, class O>
void sum_columns(const Columns& columns, bool exact, const About& about, double* sums,
                 int64_t width) {
  const int64_t end = columns.stride;
  if constexpr (sizeof(T) < 8) {
    if (columns.dy && !exact) {
      return sum_all<Sum::kGradients, float, T, O>(columns, 0, end, about, sums, width);
    } else if (!exact) {
      return sum_all<Sum::kMoments, float, T, O>(columns, 0, end, about, sums, width);
    }
  }
  if (columns.dy) {
    sum_all<Sum::kGradients, double, T, O>(columns, 0, end, about, sums, width);
  } else {
    sum_all<Sum::kMoments, double, T, O>(columns, 0, end, about, sums, width);
  }
}

// Lines in the type to compute in: the mean is two numbers, and what is left has one rounding.
template <class C>
struct Factors {
  C *high, *low, *gain, *shift, *rstd, *along, *per_unit, *size;

  // `many` times one after the other, for as many rows.
  Factors(const Lines& lines, int64_t width, int64_t many, C* work)
      : high(work),
        low(high + many * width),
        gain(low + many * width),
        shift(gain + many * width),
        rstd(shift + many * width),
        along(rstd + many * width),
        per_unit(along + many * width),
        size(per_unit + many * width) {
    for (int64_t i = 0; i < many * width; ++i) {
      const int64_t c = many == 1 ? i : i % width;
      high[i] = C(lines.mean[c]);
      low[i] = C((lines.mean[c] - high[i]) + lines.rest[c]);
      gain[i] = C(lines.gain[c]);
      shift[i] = C(lines.shift[c]);
      rstd[i] = C(lines.rstd[c]);
      along[i] = C(lines.along[c]);
      if constexpr (sizeof(C) == 8) {
        per_unit[i] = lines.per_unit[c];
        size[i] = lines.rstd[c] * lines.per_unit[c];
      }
    }
  }
};

template <bool kBackward, class W, class C, class T, class O, class R>
INLINE void write_row(const Factors<C>& f, int64_t width, const T* x, const O* dy, int64_t at,
                      R* out) {
  constexpr bool in_units = sizeof(T) == 8;
  each<C, W>(0, width, [&](auto place, int, int64_t c, int count) INLINE_LAMBDA {
    typedef decltype(place) P;
    V<C> v = P::template load<C>(x + at + c, count);
    if constexpr (in_units) v *= P::template load<C>(f.per_unit + c, count);
    v = (v - P::template load<C>(f.high + c, count)) - P::template load<C>(f.low + c, count);
    const V<C> gain = P::template load<C>(f.gain + c, count);
    const V<C> shift = P::template load<C>(f.shift + c, count);
    if constexpr (kBackward) {
      const V<C> rstd = P::template load<C>(f.rstd + c, count);
      const V<C> along = P::template load<C>(f.along + c, count);
      v = (P::template load<C>(dy + at + c, count) * gain - shift) - v * rstd * along;
      v *= in_units ? P::template load<C>(f.size + c, count) : rstd;
    } else {
      if constexpr (in_units) v *= P::template load<C>(f.rstd + c, count);
      v = v * gain + shift;
    }
    P::template store<C>(out + at + c, v, count);
  });
}

template <bool kBackward, class C, class T, class O, class R>
INLINE void write_rows(const Columns& columns, int64_t begin, int64_t end, const Lines& lines,
                       R* out, double* work) {
  const int64_t width = end - begin, many = rows_as_one(columns, width);
  alignas(kBytes) C room[kFactorLines * kSlice];
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

template <class C, class T, class O>
INLINE void write_in(const Columns& columns, int64_t begin, int64_t end, const Lines& lines,
                     double* work) {
  if (columns.dy) {
    write_rows<true, C, T, O>(columns, begin, end, lines, static_cast<T*>(columns.out), work);
  } else {
    write_rows<false, C, T, O>(columns, begin, end, lines, static_cast<O*>(columns.out), work);
  }
}

INLINE bool lines_fit(const Lines& lines, int64_t width, bool backward) {
  for (int64_t c = 0; c < width; ++c) {
    if (!fits(lines.rstd[c])) return false;
    if (!backward && lines.gain[c] != 0 && !fits(__builtin_fabs(lines.gain[c]))) return false;
  }
  return true;
}

// Writes columns `begin` to `end`, in float32 where their lines fit.
template <class T, class O>
INLINE void write_fitting(const Columns& columns, int64_t begin, int64_t end, const Lines& lines,
                          double* work) {
  if constexpr (sizeof(T) < 8) {
    if (lines_fit(lines, end - begin, columns.dy)) {
      return write_in<float, T, O>(columns, begin, end, lines, work);
    }
  }
  write_in<double, T, O>(columns, begin, end, lines, work);
}

template <class T, class O>
void write_columns(const Columns& columns, const Lines& lines, int64_t width, double* work) {
  write_fitting<T, O>(columns, 0, width, lines, work);
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

// The sums of the groups' columns about the mean in `lines`, which they move, and the other lines;
// returns whether A was enough.
template <Sum kSum, class A, class T, class O>
INLINE bool measure_groups_in(const Groups& groups, int64_t begin, int64_t end, double* sums,
                              int64_t width, const Lines& lines) {
  constexpr bool backward = kSum == Sum::kBoth, in_units = sizeof(T) == 8;
  auto scales = static_cast<const Compute<T>*>(groups.scale);
  auto biases = static_cast<const Compute<T>*>(groups.bias);
  auto scale_of = [&](int64_t c) INLINE_LAMBDA { return scales ? double(scales[begin + c]) : 1; };
  for (int64_t i = 0; i < kSumLines * width; ++i) sums[i] = 0;
  sum_all<kSum, A, T, O>(groups.columns, begin, end, {lines.mean, lines.mean, lines.per_unit},
                         sums, width);
  const int64_t members = groups.members;
  const double n = double(groups.columns.rows) * double(members);
  bool enough = true;
  for (int64_t g = 0; g < end - begin; g += members) {
    Total<in_units> total[kSumLines];
    for (int64_t c = g; c < g + members; ++c) {
      const double scale = scale_of(c);
      total[0].add(sums[c]);
      total[1].add(sums[width + c]);
      total[2].add(scale * sums[2 * width + c]);
      total[3].add(scale * sums[3 * width + c]);
    }
    const Sums all{total[0].whole(), total[1].whole(), total[2].whole(), total[3].whole()};
    const double above = groups.centered ? all.d / n : 0;
    double var = all.squares / n - above * above;
    if constexpr (in_units) {
      enough = enough && are_in_range(all.squares, backward);
    } else {
      enough = enough && (backward ? are_enough_with(above, var, groups.epsilon, all.t,
                                                     all.products, n)
                                   : are_enough(above, var, groups.epsilon));
    }
    if (var < 0) var = 0;
    var += groups.epsilon * lines.per_unit[g] * lines.per_unit[g];
    const double rstd = var == 0 ? 0 : 1 / __builtin_sqrt(var);
    const double mean_t = groups.centered ? all.t / n : 0;
    const double along = (all.products - above * all.t) / n * rstd;
    for (int64_t c = g; c < g + members; ++c) {
      const double scale = scale_of(c);
      (in_units ? lines.rest : lines.mean)[c] += above;
      lines.rstd[c] = rstd;
      if (backward) {
        lines.gain[c] = scale;
        lines.shift[c] = mean_t;
        lines.along[c] = along;
        // What the gradients of scale and bias are.
        sums[c] = (sums[3 * width + c] - above * sums[2 * width + c]) * rstd;
      } else {
        lines.gain[c] = in_units ? scale : scale * rstd;
        lines.shift[c] = biases ? double(biases[begin + c]) : 0;
      }
    }
  }
  return enough;
}

// Of float64 entries all 16 digits are asked for: they are summed about their mean, which takes
// another read, and in units where those are needed.
template <Sum kSum>
INLINE void measure_doubles(const Groups& groups, int64_t begin, int64_t end, double* sums,
                            int64_t width, const Lines& lines) {
  auto x = static_cast<const double*>(groups.columns.x);
  const int64_t members = groups.members;
  auto measured = [&] {
    for (int64_t c = 0; c < end - begin; ++c) {
      const double first = x[begin + c / members * members];
      lines.mean[c] = groups.centered ? first * lines.per_unit[c] : 0;
      lines.rest[c] = 0;
    }
    if (groups.centered) {
      measure_groups_in<Sum::kMoments, double, double, double>(groups, begin, end, sums, width,
                                                               lines);
      for (int64_t c = 0; c < end - begin; ++c) {
        lines.mean[c] += lines.rest[c];
        lines.rest[c] = 0;
      }
    }
    return measure_groups_in<kSum, double, double, double>(groups, begin, end, sums, width, lines);
  };
  if (measured()) return;
  for (int64_t c = 0; c < end - begin; ++c) {
    lines.per_unit[c] =
        c % members ? lines.per_unit[c - 1]
                    : per_unit_of(x + begin + c, groups.columns.rows, groups.columns.stride,
                                  members, groups.centered, groups.epsilon);
  }
  measured();
}

template <Sum kSum, class T, class O>
INLINE Lines measure_groups(const Groups& groups, int64_t begin, int64_t end, double* sums,
                            int64_t width) {
  const Lines lines = lines_in(sums + kSumLines * width, width);
  for (int64_t i = 0; i < kLines * width; ++i) lines.mean[i] = 0;
  for (int64_t c = 0; c < width; ++c) lines.per_unit[c] = 1;
  if constexpr (sizeof(T) == 8) {
    measure_doubles<kSum>(groups, begin, end, sums, width, lines);
  } else {
    auto start = [&] {
      auto x = static_cast<const T*>(groups.columns.x);
      const int64_t members = groups.members;
      for (int64_t c = begin; c < end; ++c) {
        lines.mean[c - begin] =
            groups.centered ? about_the_middle(groups, x, c / members * members) : 0;
      }
    };
    start();
    if (!measure_groups_in<kSum, float, T, O>(groups, begin, end, sums, width, lines)) {
      start();
      measure_groups_in<kSum, double, T, O>(groups, begin, end, sums, width, lines);
    }
  }
  return lines;
}

template <class T, class O>
void groups_forward(const Groups& groups, int64_t begin, int64_t end, double* work) {
  const int64_t width = end - begin;
  const Lines lines = measure_groups<Sum::kMoments, T, O>(groups, begin, end, work, width);
  write_fitting<T, O>(groups.columns, begin, end, lines, work + kMeasureLines * width);
}

template <class T, class O>
void groups_backward(const Groups& groups, int64_t begin, int64_t end, double* work,
                     double* gradients, double* lost, int64_t apart) {
  const int64_t width = end - begin;
  const Lines lines = measure_groups<Sum::kBoth, T, O>(groups, begin, end, work, width);
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t at = i * apart + begin + c;
      if constexpr (sizeof(T) == 8) {
        add_exactly(gradients[at], lost[at], work[2 * i * width + c]);
      } else {
        gradients[at] += work[2 * i * width + c];
      }
    }
  }
  write_fitting<T, O>(groups.columns, begin, end, lines, work + kMeasureLines * width);
}
