// Columns: sums down them in double precision, rows being read as they lie; and groups of columns.

constexpr int64_t kBlock = 32;  // rows whose sums stay in registers

template <bool kBackward, class T, class O>
INLINE void sum_columns(const Columns& columns, int64_t begin, int64_t end, const double* pivot,
                        double* sums, int64_t width) {
  typedef V<double> D;
  auto x = static_cast<const T*>(columns.x);
  auto dy = static_cast<const O*>(columns.dy);
  for (int64_t start = 0; start < columns.rows; start += kBlock) {
    int64_t stop = start + kBlock < columns.rows ? start + kBlock : columns.rows;
    each<double>(begin, end, [&](auto place, int, int64_t c, int count) INLINE_LAMBDA {
      typedef decltype(place) P;
      const D center = P::template load<double>(pivot + c - begin, count);
      D d_sum[2] = {}, squares[2] = {}, t_sum[2] = {}, products[2] = {};
      auto add_row = [&](int k, int64_t r) INLINE_LAMBDA {
        int64_t at = r * columns.stride + c;
        D d = P::template load<double>(x + at, count) - center;
        d_sum[k] += d;
        squares[k] += d * d;
        if constexpr (kBackward) {
          D t = P::template load<double>(dy + at, count);
          t_sum[k] += t;
          products[k] += d * t;
        }
      };
      int64_t r = start;
      for (; r + 2 <= stop; r += 2) {
        add_row(0, r);
        add_row(1, r + 1);
      }
      if (r < stop) add_row(0, r);
      const D found[4] = {d_sum[0] + d_sum[1], squares[0] + squares[1], t_sum[0] + t_sum[1],
                          products[0] + products[1]};
      for (int k = 0; k < (kBackward ? 4 : 2); ++k) {
        double* line = sums + k * width + c - begin;
        P::template store<double>(line, P::template load<double>(line, count) + found[k], count);
      }
    });
  }
}

template <class T, class O>
void add_columns(const Columns& columns, int64_t begin, int64_t end, const double* pivot,
                 double* sums, int64_t width) {
  if (columns.dy) {
    sum_columns<true, T, O>(columns, begin, end, pivot, sums, width);
  } else {
    sum_columns<false, T, O>(columns, begin, end, pivot, sums, width);
  }
}

// Lines, of one number for each column: what makes outputs of entries.
struct Lines {
  double *high, *low, *gain, *shift, *rstd, *along;
};

// What is left of the mean in float32.
INLINE void split_mean(const Lines& lines, int64_t width) {
  for (int64_t c = 0; c < width; ++c) {
    double mean = lines.high[c];
    lines.high[c] = float(mean);
    lines.low[c] = mean - lines.high[c];
  }
}

template <class C>
INLINE V<C> line_of(const double* line, int64_t c) {
  V<C> v;
  for (int i = 0; i < kWidth<C>; ++i) v[i] = C(line[c + i]);
  return v;
}

// y = (x - mean) gain + shift, or dx = ((dy gain - shift) - (x - mean) rstd along) rstd.
template <class C, bool kBackward, class T, class O, class R>
INLINE void write_columns(const Columns& columns, int64_t begin, int64_t end, const Lines& lines,
                          R* out) {
  auto x = static_cast<const T*>(columns.x);
  auto dy = static_cast<const O*>(columns.dy);
  for (int64_t start = 0; start < columns.rows; start += kBlock) {
    int64_t stop = start + kBlock < columns.rows ? start + kBlock : columns.rows;
    each<C>(begin, end, [&](auto place, int, int64_t c, int count) INLINE_LAMBDA {
      typedef decltype(place) P;
      const int64_t at = c - begin;
      const V<C> high = line_of<C>(lines.high, at), low = line_of<C>(lines.low, at);
      const V<C> gain = line_of<C>(lines.gain, at);
      const V<C> shift = line_of<C>(lines.shift, at);
      const V<C> rstd = kBackward ? line_of<C>(lines.rstd, at) : V<C>{};
      const V<C> along = kBackward ? line_of<C>(lines.along, at) : V<C>{};
      for (int64_t r = start; r < stop; ++r) {
        const int64_t i = r * columns.stride + c;
        V<C> v = (P::template load<C>(x + i, count) - high) - low;
        if constexpr (kBackward) {
          v = ((P::template load<C>(dy + i, count) * gain - shift) - v * rstd * along) * rstd;
        } else {
          v = v * gain + shift;
        }
        P::template store<C>(out + i, v, count);
      }
    });
  }
}

// The sums of the groups' columns, and the lines that are the same forward and backward. Lines are
// a vector wider than the columns, for a vector is read of them at their end.
template <bool kBackward, class T, class O>
INLINE bool measure_groups(const Groups& groups, int64_t begin, int64_t end, double* work,
                           Lines& lines, double*& sums, int64_t& width) {
  width = end - begin + kWidth<float>;
  for (int64_t i = 0; i < 12 * width; ++i) work[i] = 0;
  lines = {work,             work + width,     work + 2 * width,
           work + 3 * width, work + 4 * width, work + 5 * width};
  sums = work + 6 * width;
  double* pivot = lines.high;
  auto x = static_cast<const T*>(groups.columns.x);
  const int64_t members = groups.members;
  for (int64_t c = begin; c < end && groups.centered; ++c) {
    pivot[c - begin] = number(x + c / members * members);
  }
  sum_columns<kBackward, T, O>(groups.columns, begin, end, pivot, sums, width);
  const double n = double(groups.columns.rows) * double(members);
  bool in_range = true;
  for (int64_t g = 0; g < end - begin; g += members) {
    Sums all;
    for (int64_t c = g; c < g + members; ++c) {
      double scale = groups.scale ? groups.scale[begin + c] : 1;
      all.d += sums[c];
      all.squares += sums[width + c];
      all.t += scale * sums[2 * width + c];
      all.products += scale * sums[3 * width + c];
    }
    const double mean = groups.centered ? all.d / n : 0;
    double var = all.squares / n - mean * mean;
    if (var < 0) var = 0;
    var += groups.epsilon;
    const double rstd = var == 0 ? 0 : 1 / __builtin_sqrt(var);
    const double mean_t = groups.centered ? all.t / n : 0;
    const double along = (all.products - mean * all.t) / n * rstd;
    in_range = in_range && fits(rstd);
    for (int64_t c = g; c < g + members; ++c) {
      double scale = groups.scale ? groups.scale[begin + c] : 1;
      lines.high[c] += mean;
      lines.rstd[c] = rstd;
      if (kBackward) {
        lines.gain[c] = scale;
        lines.shift[c] = mean_t;
        lines.along[c] = along;
        // What the gradients of scale and bias are.
        sums[c] = (sums[3 * width + c] - mean * sums[2 * width + c]) * rstd;
      } else {
        lines.gain[c] = scale * rstd;
        in_range = in_range && (scale == 0 || fits(__builtin_fabs(lines.gain[c])));
        lines.shift[c] = groups.bias ? groups.bias[begin + c] : 0;
      }
    }
  }
  return in_range;
}

template <class T, class O>
void groups_forward(const Groups& groups, int64_t begin, int64_t end, double* work) {
  Lines lines;
  double* sums;
  int64_t width;
  auto y = static_cast<O*>(groups.out);
  if (measure_groups<false, T, O>(groups, begin, end, work, lines, sums, width)) {
    split_mean(lines, width);
    write_columns<float, false, T, O>(groups.columns, begin, end, lines, y);
  } else {
    write_columns<double, false, T, O>(groups.columns, begin, end, lines, y);
  }
}

template <class T, class O>
void groups_backward(const Groups& groups, int64_t begin, int64_t end, double* work,
                     double* gradients, int64_t apart) {
  Lines lines;
  double* sums;
  int64_t width;
  auto dx = static_cast<T*>(groups.out);
  bool in_range = measure_groups<true, T, O>(groups, begin, end, work, lines, sums, width);
  for (int64_t c = 0; c < end - begin; ++c) {
    gradients[begin + c] += sums[c];
    gradients[apart + begin + c] += sums[2 * width + c];
  }
  if (in_range) {
    split_mean(lines, width);
    write_columns<float, true, T, O>(groups.columns, begin, end, lines, dx);
  } else {
    write_columns<double, true, T, O>(groups.columns, begin, end, lines, dx);
  }
}
