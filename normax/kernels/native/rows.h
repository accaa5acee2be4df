// A row: its sums about its first entry, in one read; then, from cache, the outputs.
//
// Sums are in double precision: about an entry of the row the sum of squares is at most n times
// what it is about the mean, so that of 16 digits enough are left. Equal entries leave exact zeros.

template <class T>
struct Precision {
  typedef float C;
};
template <>
struct Precision<double> {
  typedef double C;
};
template <class T>
using Compute = typename Precision<T>::C;

// What is subtracted, in units: first the pivot, then what the mean is above it.
struct Center {
  double per_unit = 1;
  double pivot = 0;
  double above = 0;
};

struct Sums {
  double d = 0, squares = 0, t = 0, products = 0;
};

// What the outputs are made from; the mean is pivot + above.
struct Row {
  Center center;
  double rstd = 0;
  double mean_t = 0;
  double along = 0;  // the mean of t xhat
};

template <class C, class T, class Place>
INLINE V<C> entries_of(Place, const T* x, int count, V<C> per_unit) {
  V<C> v = Place::template load<C>(x, count);
  // Of the other dtypes squares are in the range of double precision.
  if constexpr (sizeof(T) == 8) v *= per_unit;
  return v;
}

// dy scale, rounded as it is where dx is written.
template <class Place, class O>
INLINE V<double> cotangent(Place, const O* dy, const float* scale, int count) {
  V<Few> t = Place::template load<Few>(dy, count);
  if (scale) t *= Place::template load<Few>(scale, count);
  return doubles(t);
}
template <class Place>
INLINE V<double> cotangent(Place, const double* dy, const double* scale, int count) {
  V<double> t = Place::template load<double>(dy, count);
  if (scale) t *= Place::template load<double>(scale, count);
  return t;
}

// Of entries of 16 bits a few at a time are added in float32, if `measure` finds that enough.
constexpr int kFew = 8;  // vectors

template <bool kBackward, class T, class O>
INLINE Sums rough_sums_of(const Rows& rows, const T* x, const O* dy, double pivot) {
  typedef V<float> F;
  auto scale = static_cast<const float*>(rows.scale);
  const F center = filled<float>(pivot);
  V<double> all[4] = {};
  constexpr int64_t kStep = kFew * kWidth<float>;
  for (int64_t begin = 0; begin < rows.length; begin += kStep) {
    const int64_t end = begin + kStep < rows.length ? begin + kStep : rows.length;
    F d_sum[2] = {}, squares[2] = {}, t_sum[2] = {}, products[2] = {};
    each<float>(begin, end, [&](auto place, int k, int64_t i, int count) INLINE_LAMBDA {
      typedef decltype(place) P;
      F d = P::template present<float>(P::template load<float>(x + i, count) - center, count);
      d_sum[k] += d;
      squares[k] = plus_product(squares[k], d, d);
      if constexpr (kBackward) {
        F t = P::template load<float>(dy + i, count);
        if (scale) t *= P::template load<float>(scale + i, count);
        t_sum[k] += t;
        products[k] = plus_product(products[k], d, t);
      }
    });
    const F found[4] = {d_sum[0] + d_sum[1], squares[0] + squares[1], t_sum[0] + t_sum[1],
                        products[0] + products[1]};
    for (int k = 0; k < (kBackward ? 4 : 2); ++k) {
      all[k] += first_half(found[k]) + second_half(found[k]);
    }
  }
  return {total(all[0]), total(all[1]), total(all[2]), total(all[3])};
}

template <bool kBackward, class T, class O>
INLINE Sums sums_of(const Rows& rows, const T* x, const O* dy, const Center& center) {
  typedef V<double> D;
  auto scale = static_cast<const Compute<T>*>(rows.scale);
  const D pivot = filled<double>(center.pivot), above = filled<double>(center.above);
  const D per_unit = filled<double>(center.per_unit);
  constexpr bool exactly = sizeof(T) == 8;
  D sums[4][2] = {}, lost[4][2] = {};
  auto add = [&](int i, int k, D v) INLINE_LAMBDA {
    if constexpr (exactly) {
      add_exactly(sums[i][k], lost[i][k], v);
    } else {
      sums[i][k] += v;
    }
  };
  each<double>(0, rows.length, [&](auto place, int k, int64_t i, int count) INLINE_LAMBDA {
    typedef decltype(place) P;
    D d = entries_of<double>(place, x + i, count, per_unit) - pivot;
    if constexpr (exactly) d -= above;
    d = P::template present<double>(d, count);
    add(0, k, d);
    add(1, k, d * d);
    if constexpr (kBackward) {
      D t = cotangent(place, dy + i, scale ? scale + i : scale, count);
      add(2, k, t);
      add(3, k, d * t);
    }
  });
  double found[4];
  for (int i = 0; i < 4; ++i) {
    found[i] = total(sums[i][0] + sums[i][1]);
    if constexpr (exactly) found[i] = whole_of(found[i], total(lost[i][0] + lost[i][1]));
  }
  return {found[0], found[1], found[2], found[3]};
}

// Whether squares of float64 entries, added up, are those of numbers in range, and so are products
// of such and a gradient.
INLINE bool are_in_range(double squares, bool backward) {
  return backward ? squares > 1e-40 && squares < 1e40 : squares > 1e-200 && squares < 1e200;
}

// A power of two near the range of entries, or near the largest of them, to divide by: of some
// parts, each of as many entries one after the other.
INLINE double per_unit_of(const double* x, int64_t parts, int64_t apart, int64_t entries,
                          bool centered, double epsilon) {
  double pivot = centered ? x[0] * 0.25 : 0, largest = 0;
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t i = 0; i < entries; ++i) {
      double size = __builtin_fabs(x[part * apart + i] * 0.25 - pivot);
      if (size > largest) largest = size;
    }
  }
  if (!(largest > 0 && largest < __builtin_inf())) return 1;
  int up = -__builtin_ilogb(largest) - 2, most = 1000;
  // Epsilon in that unit has to stay in range; what is small next to it need not.
  if (epsilon > 0) most = 300 - __builtin_ilogb(epsilon) / 2;
  if (most > 1000) most = 1000;
  return __builtin_ldexp(1.0, up < -1000 ? -1000 : up > most ? most : up);
}

template <bool kBackward, class T, class O>
INLINE Row measure(const Rows& rows, const T* x, const O* dy) {
  const double n = double(rows.length), part = 1 / n;
  // Short rows would wait for divisions; of float64 the last digit is asked for.
  auto mean_of = [&](double sum) INLINE_LAMBDA { return sizeof(T) == 8 ? sum / n : sum * part; };
  Row row;
  Sums sums;
  auto about = [&](double per_unit) INLINE_LAMBDA {
    row.center = {per_unit, rows.centered ? number(x) * per_unit : 0, 0};
    sums = sums_of<kBackward>(rows, x, dy, row.center);
    if (sizeof(T) == 8 && rows.centered) {
      // Of 16 digits all are asked for, so that squares are summed about the mean.
      row.center.above = mean_of(sums.d);
      sums = sums_of<kBackward>(rows, x, dy, row.center);
    }
  };
  bool enough = false;
  if constexpr (sizeof(T) == 2 && sizeof(O) == 2) {
    row.center.pivot = rows.centered ? number(x) : 0;
    sums = rough_sums_of<kBackward>(rows, x, dy, row.center.pivot);
    const double above = rows.centered ? mean_of(sums.d) : 0;
    const double var = mean_of(sums.squares) - above * above;
    enough = kBackward ? are_enough_with(above, var, rows.epsilon, sums.t, sums.products, n)
                       : are_enough(above, var, rows.epsilon);
  }
  if (!enough) about(1);
  if constexpr (sizeof(T) == 8) {
    if (!are_in_range(sums.squares, kBackward)) {
      about(per_unit_of(x, 1, 0, rows.length, rows.centered, rows.epsilon));
    }
  }
  const double mean = rows.centered ? mean_of(sums.d) : 0;
  double var = mean_of(sums.squares) - mean * mean;
  if (var < 0) var = 0;
  var += rows.epsilon * row.center.per_unit * row.center.per_unit;
  row.rstd = var == 0 ? 0 : 1 / __builtin_sqrt(var);
  row.mean_t = rows.centered ? mean_of(sums.t) : 0;
  row.along = mean_of(sums.products - mean * sums.t) * row.rstd;
  row.center.above += mean;
  return row;
}

// Entries less the mean. In float32 the mean is two numbers, and what is left has one rounding.
template <class C>
struct Deviation {
  V<C> per_unit, high, low;
  explicit Deviation(const Center& center) {
    double first = center.pivot, second = center.above;
    if (sizeof(C) == 4) {
      double mean = first + second;
      first = float(mean);
      second = mean - first;
    }
    per_unit = filled<C>(center.per_unit);
    high = filled<C>(first);
    low = filled<C>(second);
  }
  template <class T, class Place>
  INLINE V<C> of(Place place, const T* x, int count) const {
    return (entries_of<C>(place, x, count, per_unit) - high) - low;
  }
};

// Bytes of a row that is asked for while another is written: of short ones a processor sees the
// next by itself; and those of one of all arrays, for a near cache has to hold both.
constexpr int64_t kLeastAsked = 1 << 10, kMostAsked = 5 << 12;

// How many entries after those of a row lie those to ask for, of so many arrays; or none.
template <class T>
INLINE int64_t later_than(int64_t length, int64_t arrays) {
  const int64_t bytes = length * int64_t(sizeof(T));
  const bool asks = bytes >= kLeastAsked && arrays * bytes <= kMostAsked;
  return asks ? parts_ahead<T>(length) * length : 0;
}

template <class C, class W, class T, class O>
INLINE void write_forward(const Rows& rows, const Row& row, const T* x, const T* given,
                          const T* added, O* y) {
  auto scale = static_cast<const Compute<T>*>(rows.scale);
  auto bias = static_cast<const Compute<T>*>(rows.bias);
  const Deviation<C> deviation(row.center);
  const V<C> rstd = filled<C>(row.rstd);
  const int64_t later = later_than<T>(rows.length, added ? 2 : 1);
  each<C, W>(0, rows.length, [&](auto place, int, int64_t i, int count) INLINE_LAMBDA {
    typedef decltype(place) P;
    ask<P>(later, i, given, added ? added : given);
    V<C> v = deviation.of(place, x + i, count) * rstd;
    if (scale) v *= P::template load<C>(scale + i, count);
    if (bias) v += P::template load<C>(bias + i, count);
    P::template store<C>(y + i, v, count);
  });
}

template <class T>
INLINE void add(int64_t length, const T* x, const T* residual, T* sum) {
  typedef Compute<T> C;
  each<C>(0, length, [&](auto place, int, int64_t i, int count) INLINE_LAMBDA {
    typedef decltype(place) P;
    V<C> a = P::template load<C>(x + i, count), b = P::template load<C>(residual + i, count);
    P::template store<C>(sum + i, a + b, count);
  });
}

template <class T, class O>
void forward(const Rows& rows, int64_t begin, int64_t end) {
  const int64_t n = rows.length;
  for (int64_t r = begin; r < end; ++r) {
    auto given = static_cast<const T*>(rows.x) + r * n, x = given;
    auto added = rows.added ? static_cast<const T*>(rows.added) + r * n : nullptr;
    auto y = static_cast<O*>(rows.out) + r * n;
    if (added) {
      auto sum = static_cast<T*>(rows.sum) + r * n;
      add(n, x, added, sum);
      x = sum;  // rounded: what is normalized is what the backward pass will read
    }
    const Row row = measure<false>(rows, x, y);
    if (!fits(row.rstd)) {
      write_forward<double, Whole>(rows, row, x, given, added, y);
    } else if (rows.past) {
      write_forward<Compute<T>, WholePast>(rows, row, x, given, added, y);
    } else {
      write_forward<Compute<T>, Whole>(rows, row, x, given, added, y);
    }
  }
  settle();
}

template <class C, class W, class T, class O>
INLINE void write_backward(const Rows& rows, const Row& row, const T* x, const O* dy,
                           const T* added, T* dx, Compute<T>* dscale, Compute<T>* dbias) {
  auto scale = static_cast<const Compute<T>*>(rows.scale);
  const Deviation<C> deviation(row.center);
  const V<C> rstd = filled<C>(row.rstd), mean_t = filled<C>(row.mean_t);
  const V<C> along = filled<C>(row.along), length = filled<C>(row.rstd * row.center.per_unit);
  const int64_t later = later_than<T>(rows.length, added ? 3 : 2);
  each<C, W>(0, rows.length, [&](auto place, int, int64_t i, int count) INLINE_LAMBDA {
    typedef decltype(place) P;
    typedef typename InCache<P>::Place Near;
    ask<P>(later, i, x, dy);
    V<C> xhat = deviation.of(place, x + i, count) * rstd;
    V<C> ct = P::template load<C>(dy + i, count), t = ct;
    if (scale) t *= P::template load<C>(scale + i, count);
    V<C> v = ((t - mean_t) - xhat * along) * length;
    if (added) v += P::template load<C>(added + i, count);
    P::template store<C>(dx + i, v, count);
    V<C> share = P::template load<C>(dscale + i, count) + ct * xhat;
    Near::template store<C>(dscale + i, share, count);
    Near::template store<C>(dbias + i, P::template load<C>(dbias + i, count) + ct, count);
  });
}

// Rows whose gradients are added up as they come, in the type to compute in.
template <class T>
constexpr int64_t kRowsTogether = sizeof(T) == 8 ? 4 : 32;

template <class T, class O>
void backward(const Rows& rows, int64_t begin, int64_t end, double* sums, double* lost,
              void* work) {
  typedef Compute<T> C;
  const int64_t n = rows.length;
  auto dscale = static_cast<C*>(work), dbias = dscale + n;
  for (int64_t start = begin; start < end; start += kRowsTogether<T>) {
    for (int64_t i = 0; i < 2 * n; ++i) dscale[i] = 0;
    int64_t stop = start + kRowsTogether<T> < end ? start + kRowsTogether<T> : end;
    for (int64_t r = start; r < stop; ++r) {
      auto x = static_cast<const T*>(rows.x) + r * n;
      auto dy = static_cast<const O*>(rows.dy) + r * n;
      auto dx = static_cast<T*>(rows.out) + r * n;
      auto added = rows.added ? static_cast<const T*>(rows.added) + r * n : nullptr;
      const Row row = measure<true>(rows, x, dy);
      if (!fits(row.rstd)) {
        write_backward<double, Whole>(rows, row, x, dy, added, dx, dscale, dbias);
      } else if (rows.past) {
        write_backward<C, WholePast>(rows, row, x, dy, added, dx, dscale, dbias);
      } else {
        write_backward<C, Whole>(rows, row, x, dy, added, dx, dscale, dbias);
      }
    }
    for (int64_t i = 0; i < 2 * n; ++i) {
      if constexpr (sizeof(T) == 8) {
        add_exactly(sums[i], lost[i], dscale[i]);
      } else {
        sums[i] += dscale[i];
      }
    }
  }
  settle();
}
