// Columns: sums down them, rows being read as they lie, a few in float32 and all in double
// precision.

// Rows whose sums are kept in float32: so few that, of equal entries, roundings that are all alike
// stay near one unit in the last place.
template <class T>
constexpr int64_t kFewRows = sizeof(T) == 2 ? 8 : 4;
// Columns of them at a time; and bytes of the rows that are summed a few columns after the other,
// while the next rows are asked for: a near cache holds both. Where a few rows are more than that,
// what is asked for is so many columns ahead.
constexpr int64_t kSlice = 1024, kBlock = 1 << 16, kAhead = 256;

enum class Sum { kMoments, kGradients, kBoth };
template <Sum kSum>
constexpr int kSums = kSum == Sum::kBoth ? 4 : 2;

// Vectors of columns whose sums are kept in registers, as far as there are any.
template <Sum kSum, class A>
constexpr int vectors_of =
    kSum == Sum::kBoth ? 1 : kSum == Sum::kMoments ? (sizeof(A) == 4 ? 2 : 4) : kBytes < 64 ? 2 : 4;

// The next rows, in the order in which they are asked for.
struct Next {
  int64_t from, step;
};

// The sums of some vectors of columns: d and d^2, or dy and dy d, or all four. With A float those
// of a few rows are in that, and what they add up to is in double precision.
template <Sum kSum, class A, int kVectors, class P, class T, class O>
INLINE void sum_block(const T* x, const O* dy, int64_t first, int64_t rows, int64_t stride,
                      Next next, const About& about, double* sums, int64_t width, double* lost,
                      int count) {
  constexpr bool moments = kSum != Sum::kGradients, gradients = kSum != Sum::kMoments;
  constexpr bool in_units = sizeof(T) == 8, rough = sizeof(A) == 4;
  constexpr int kLanes = kWidth<A>, kHalves = rough ? 2 : 1, kOfDy = moments ? 2 : 0;
  V<A> center[kVectors], factor[kVectors], per_unit[kVectors];
  V<double> whole[kSums<kSum>][kVectors][kHalves] = {};
  for (int k = 0; k < kVectors; ++k) {
    center[k] = P::template load<A>(about.pivot + k * kLanes, count);
    if constexpr (!moments) factor[k] = P::template load<A>(about.rstd + k * kLanes, count);
    if constexpr (in_units) per_unit[k] = P::template load<A>(about.per_unit + k * kLanes, count);
  }
  for (int64_t r = 0; r < rows;) {
    V<A> few[kSums<kSum>][kVectors] = {};
    for (const int64_t end = r + kFewRows<T> < rows ? r + kFewRows<T> : rows; r < end; ++r) {
      const int64_t at = first + r * stride, asked = next.from + r * next.step;
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) {
        if (k * kLanes * sizeof(T) % 64 == 0) __builtin_prefetch(x + asked + k * kLanes);
        V<A> d = P::template load<A>(x + at + k * kLanes, count);
        if constexpr (in_units) d *= per_unit[k];
        d -= center[k];
        if constexpr (moments) {
          few[0][k] += d;
          few[1][k] = plus_product(few[1][k], d, d);
        } else {
          d *= factor[k];
        }
        if constexpr (gradients) {
          if (k * kLanes * sizeof(O) % 64 == 0) __builtin_prefetch(dy + asked + k * kLanes);
          V<A> t = P::template load<A>(dy + at + k * kLanes, count);
          few[kOfDy][k] += t;
          few[kOfDy + 1][k] = plus_product(few[kOfDy + 1][k], d, t);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kSums<kSum>; ++i) {
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) {
        if constexpr (rough) {
          whole[i][k][0] += first_half(few[i][k]);
          whole[i][k][1] += second_half(few[i][k]);
        } else {
          whole[i][k][0] += few[i][k];
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kSums<kSum>; ++i) {
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      double* line = sums + i * width + k * kLanes;
      if constexpr (in_units) {
        add_exactly<P>(line, lost + i * kSlice + k * kLanes, whole[i][k][0], count);
      } else {
        constexpr int half = kWidth<double>;
        add_to<P>(line, whole[i][k][0], count < half ? count : half);
        if constexpr (rough) {
          if (count > half) add_to<P>(line + half, whole[i][k][1], count - half);
        }
      }
    }
  }
}

// Rows of a block: of float64, whose sums keep what they lose, those whose sum is not kept exactly.
template <class T>
INLINE int64_t rows_of_block(int64_t width) {
  constexpr int64_t few = kFewRows<T>;
  if (sizeof(T) == 8) return few;
  const int64_t rows = kBlock / int64_t(sizeof(T)) / width / few * few;
  return rows < 2 * few ? 2 * few : rows > 16 * few ? 16 * few : rows;
}

// Adds up columns: with A float, a few rows in that. Of float64 entries what sums lose goes to
// lines of kSlice.
template <Sum kSum, class A, class T, class O>
INLINE void sum_down(const Columns& columns, int64_t begin, int64_t end, const About& about,
                     double* sums, int64_t width, double* lost = nullptr) {
  constexpr int kLanes = kWidth<A>;
  constexpr int kVectors = vectors_of<kSum, A>;
  auto x = static_cast<const T*>(columns.x);
  auto dy = static_cast<const O*>(columns.dy);
  auto from = [&](int64_t c) INLINE_LAMBDA { return lost ? lost + c : nullptr; };
  const int64_t stride = columns.stride, block = rows_of_block<T>(end - begin);
  const bool contiguous = end - begin == stride;
  const bool long_rows = block * (end - begin) * int64_t(sizeof(T)) > 2 * kBlock;
  for (int64_t start = 0; start < columns.rows; start += block) {
    const int64_t left = columns.rows - start, rows = left < block ? left : block;
    const int64_t first = start * stride, after = first + rows * stride;
    auto next = [&](int64_t c, int64_t lanes) INLINE_LAMBDA {
      if (long_rows) return Next{first + c + kAhead, stride};
      return contiguous ? Next{after + c * rows, lanes} : Next{after + c, stride};
    };
    int64_t c = begin;
    for (; c + kVectors * kLanes <= end; c += kVectors * kLanes) {
      sum_block<kSum, A, kVectors, Whole>(x, dy, first + c, rows, stride,
                                          next(c, kVectors * kLanes), about.from(c - begin),
                                          sums + c - begin, width, from(c - begin), kLanes);
    }
    for (; c + kLanes <= end; c += kLanes) {
      sum_block<kSum, A, 1, Whole>(x, dy, first + c, rows, stride, next(c, kLanes),
                                   about.from(c - begin), sums + c - begin, width,
                                   from(c - begin), kLanes);
    }
    if (c < end) {
      sum_block<kSum, A, 1, Part>(x, dy, first + c, rows, stride, next(c, kLanes),
                                  about.from(c - begin), sums + c - begin, width,
                                  from(c - begin), int(end - c));
    }
  }
}

template <Sum kSum, class A, class T, class O>
__attribute__((noinline)) void sum_part(const Columns& columns, int64_t begin, int64_t end,
                                        const About& about, double* sums, int64_t width) {
  if constexpr (sizeof(T) == 8) {
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
