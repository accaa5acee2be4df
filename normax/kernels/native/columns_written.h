// Columns written, by what was measured of each.

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
