// Columns: sums down them, rows being read as they lie, a few in float32 and all in double
// precision; and groups of columns.

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

// Lines in the type to compute in: the mean is two numbers, and what is left has one rounding.
template <class C>
struct Factors {
  C *high, *low, *gain, *shift, *rstd, *along, *per_unit, *size;

  // Those that are in memory for kFactorLines lines of a width.
  Factors(double* memory, int64_t width) {
    C* work = static_cast<C*>(static_cast<void*>(memory));
    C** lines[kFactorLines] = {&high, &low, &gain, &shift, &rstd, &along, &per_unit, &size};
    for (int64_t i = 0; i < kFactorLines; ++i) *lines[i] = work + i * width;
  }

  // Makes them, `many` times one after the other, for as many rows.
  void fill(const Lines& lines, int64_t width, int64_t many) const {
    for (int64_t i = 0; i < width; ++i) {
      high[i] = C(lines.mean[i]);
      low[i] = C((lines.mean[i] - high[i]) + lines.rest[i]);
      gain[i] = C(lines.gain[i]);
      shift[i] = C(lines.shift[i]);
      rstd[i] = C(lines.rstd[i]);
      along[i] = C(lines.along[i]);
      if constexpr (sizeof(C) == 8) {
        per_unit[i] = lines.per_unit[i];
        size[i] = lines.rstd[i] * lines.per_unit[i];
      }
    }
    C* const all[] = {high, low, gain, shift, rstd, along, per_unit, size};
    for (int k = 0; k < (sizeof(C) == 8 ? 8 : 6); ++k) {
      for (int64_t i = width; i < many * width; ++i) all[k][i] = all[k][i - width];
    }
  }
};

// Some rows at a time, so that factors are read once for all of them.
template <bool kBackward, int kRows, class W, class C, class T, class O, class R>
INLINE void write_rows_of(const Factors<C>& f, int64_t width, int64_t stride, const T* x,
                          const O* dy, R* out) {
  constexpr bool in_units = sizeof(T) == 8;
  // Rows that are longer are asked for as they lie.
  const bool is_long = kRows * width * int64_t(sizeof(T)) > 2 * kBytesAhead;
  const int64_t later =
      is_long ? parts_ahead<T>(kRows) : parts_ahead<T>(kRows * width) * kRows * stride;
  each<C, W>(0, width, [&](auto place, int, int64_t c, int count) INLINE_LAMBDA {
    typedef decltype(place) P;
    auto of = [&](const auto* line) INLINE_LAMBDA { return P::template load<C>(line + c, count); };
    const V<C> high = of(f.high), low = of(f.low), gain = of(f.gain), shift = of(f.shift);
    V<C> rstd{}, along{};
    if constexpr (kBackward || in_units) rstd = of(f.rstd);
    if constexpr (kBackward) along = of(f.along);
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) {
      const int64_t row = k * stride;
      if constexpr (kBackward) {
        ask<P>(later, c, x + row, dy + row);
      } else {
        ask<P>(later, c, x + row);
      }
      V<C> v = of(x + row);
      if constexpr (in_units) v *= of(f.per_unit);
      v = (v - high) - low;
      if constexpr (kBackward) {
        v = (of(dy + row) * gain - shift) - v * rstd * along;
        v *= in_units ? of(f.size) : rstd;
      } else {
        if constexpr (in_units) v *= rstd;
        v = v * gain + shift;
      }
      P::template store<C>(out + row + c, v, count);
    }
  });
}

template <bool kBackward, class C, class T, class O, class R>
__attribute__((noinline)) void write_rows(const Columns& columns, int64_t begin, int64_t width,
                                          int64_t many, double* work, R* out) {
  // Several rows in turn, if a vector is a line of cache: parts of lines are slow to write past it.
  constexpr int kRows = kBytes < 64 ? 1 : 4;
  const bool several = kBackward || many * width >= 128;  // entries
  const Factors<C> factors(work, many * width);
  auto x = static_cast<const T*>(columns.x) + begin;
  auto dy = [&](int64_t at) INLINE_LAMBDA {
    return kBackward ? static_cast<const O*>(columns.dy) + begin + at : nullptr;
  };
  out += begin;
  auto write_some = [&](auto place, int64_t r, int64_t joined) INLINE_LAMBDA {
    typedef decltype(place) W;
    const int64_t at = r * columns.stride, wide = joined * columns.stride;
    if (several && r + kRows * joined <= columns.rows) {
      write_rows_of<kBackward, kRows, W>(factors, joined * width, wide, x + at, dy(at), out + at);
      return r + kRows * joined;
    }
    write_rows_of<kBackward, 1, W>(factors, joined * width, wide, x + at, dy(at), out + at);
    return r + joined;
  };
  for (int64_t r = 0; r < columns.rows;) {
    const int64_t joined = r + many <= columns.rows ? many : 1;
    r = columns.past ? write_some(WholePast(), r, joined) : write_some(Whole(), r, joined);
  }
  settle();
}

template <class C, class T, class O>
INLINE void write_in(const Columns& columns, int64_t begin, int64_t width, int64_t many,
                     double* work) {
  if (columns.dy) {
    write_rows<true, C, T, O>(columns, begin, width, many, work, static_cast<T*>(columns.out));
  } else {
    write_rows<false, C, T, O>(columns, begin, width, many, work, static_cast<O*>(columns.out));
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
bool make_factors(const Lines& lines, int64_t width, int64_t many, bool backward, double* work) {
  if constexpr (sizeof(T) < 8) {
    if (lines_fit(lines, width, backward)) {
      Factors<float>(work, many * width).fill(lines, width, many);
      return true;
    }
  }
  Factors<double>(work, many * width).fill(lines, width, many);
  return false;
}

template <class T, class O>
INLINE void write_made(const Columns& columns, int64_t begin, int64_t width, int64_t many,
                       bool rough, double* work) {
  if constexpr (sizeof(T) < 8) {
    if (rough) return write_in<float, T, O>(columns, begin, width, many, work);
  }
  write_in<double, T, O>(columns, begin, width, many, work);
}

template <class T, class O>
void write_columns(const Columns& columns, int64_t many, bool rough, double* work) {
  write_made<T, O>(columns, 0, columns.stride, many, rough, work);
}

// Writes columns `begin` to `end`, in float32 where their lines fit.
template <class T, class O>
INLINE void write_fitting(const Columns& columns, int64_t begin, int64_t end, const Lines& lines,
                          double* work) {
  const int64_t width = end - begin, many = rows_as_one(columns, width);
  double room[kFactorLines * kSlice];
  double* memory = many == 1 ? work : room;
  const bool rough = make_factors<T, O>(lines, width, many, columns.dy, memory);
  write_made<T, O>(columns, begin, width, many, rough, memory);
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
        // What the gradients of scale and bias are; an infinite sum stays what it is.
        const double share = above * sums[2 * width + c];
        sums[c] = (sums[3 * width + c] - (__builtin_isfinite(share) ? share : 0)) * rstd;
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
    auto x = static_cast<const T*>(groups.columns.x);
    const int64_t members = groups.members;
    auto middle = [&](int64_t c) INLINE_LAMBDA {
      return groups.centered ? about_the_middle(groups, x, (begin + c) / members * members) : 0;
    };
    for (int64_t c = 0; c < width; ++c) lines.mean[c] = middle(c);
    if (!measure_groups_in<kSum, float, T, O>(groups, begin, end, sums, width, lines)) {
      // About the mean, as far as it was found: of an infinite dy the sign of d is asked for.
      for (int64_t c = 0; c < width; ++c) {
        if (!__builtin_isfinite(lines.mean[c])) lines.mean[c] = middle(c);
      }
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
      const int64_t at = i * apart + c;
      if constexpr (sizeof(T) == 8) {
        add_exactly(gradients[at], lost[at], work[2 * i * width + c]);
      } else {
        gradients[at] += work[2 * i * width + c];
      }
    }
  }
  write_fitting<T, O>(groups.columns, begin, end, lines, work + kMeasureLines * width);
}
