// Lines of entries: a vector at a time, or what is left of one, and sums of them.

// Entries from and to the type to compute in.
template <class C>
struct Memory;
template <>
struct Memory<float> {
  template <class T>
  static INLINE V<float> load(const T* p) {
    return widened<kWidth<float>>(p);
  }
  static INLINE V<float> load(const double* p) {
    return joined(singles(read<V<double>>(p)), singles(read<V<double>>(p + kWidth<double>)));
  }
  template <class T>
  static INLINE auto narrow(const T* p, V<float> v) {
    return narrowed<kWidth<float>>(p, v);
  }
};
template <>
struct Memory<Few> {
  template <class T>
  static INLINE V<Few> load(const T* p) {
    return widened<kWidth<Few>>(p);
  }
};
template <>
struct Memory<double> {
  template <class T>
  static INLINE V<double> load(const T* p) {
    return doubles(widened<kWidth<Few>>(p));
  }
  static INLINE V<double> load(const double* p) { return read<V<double>>(p); }
  template <class T>
  static INLINE auto narrow(const T* p, V<double> v) {
    return narrowed<kWidth<Few>>(p, singles(v));
  }
  static INLINE V<double> narrow(const double*, V<double> v) { return v; }
};

// A place in a line: `count` entries from `at`, a vector or less.
struct Whole {
  static constexpr bool is_past = false;
  template <class C, class T>
  static INLINE V<C> load(const T* p, int) {
    return Memory<C>::load(p);
  }
  template <class C, class T>
  static INLINE void store(T* p, V<C> v, int) {
    write(p, Memory<C>::narrow(p, v));
  }
  template <class C>
  static INLINE V<C> present(V<C> v, int) {
    return v;
  }
};
struct WholePast : Whole {
  static constexpr bool is_past = true;
  template <class C, class T>
  static INLINE void store(T* p, V<C> v, int) {
    write_past(p, Memory<C>::narrow(p, v));
  }
};
template <class P>
struct InCache {
  typedef P Place;
};
template <>
struct InCache<WholePast> {
  typedef Whole Place;
};
struct Part {
  static constexpr bool is_past = false;
  template <class C, class T>
  static INLINE V<C> load(const T* p, int count) {
    T padded[kWidth<C>] = {};
    for (int i = 0; i < count; ++i) padded[i] = p[i];
    return Memory<C>::load(padded);
  }
  template <class C, class T>
  static INLINE void store(T* p, V<C> v, int count) {
    T padded[kWidth<C>];
    write(padded, Memory<C>::narrow(padded, v));
    for (int i = 0; i < count; ++i) p[i] = padded[i];
  }
  template <class C>
  static INLINE V<C> present(V<C> v, int count) {
    for (int i = count; i < kWidth<C>; ++i) v[i] = 0;
    return v;
  }
};

// Arrays that no cache holds are asked for so many bytes before they are computed with: processors
// look ahead only within a page.
constexpr int64_t kBytesAhead = 1 << 13;

// Of so many entries each, how many parts later that is.
template <class T>
INLINE int64_t parts_ahead(int64_t entries) {
  return (kBytesAhead / int64_t(sizeof(T)) + entries - 1) / entries;
}

// Asks for what lies `later` entries after a vector of each array, once for a line of cache; if
// that is none, for nothing. Of 16 bits the arithmetic takes longer than the memory.
template <class P, class T, class... More>
INLINE void ask(int64_t later, int64_t at, const T* x, const More*... more) {
  if constexpr (P::is_past && sizeof(T) > 2) {
    if (later && at * int64_t(sizeof(T)) % 64 == 0) {
      __builtin_prefetch(x + later + at);
      (__builtin_prefetch(more + later + at), ...);
    }
  }
}

// Calls body(W or Part, which of two, at, count) for each vector of entries begin to end.
template <class C, class W = Whole, class Body>
INLINE void each(int64_t begin, int64_t end, Body body) {
  constexpr int width = kWidth<C>;
  int64_t i = begin;
  for (; i + 2 * width <= end; i += 2 * width) {
    body(W(), 0, i, width);
    body(W(), 1, i + width, width);
  }
  if (i + width <= end) {
    body(W(), 0, i, width);
    i += width;
  }
  if (i < end) body(Part(), 1, i, int(end - i));
}

// sum + a b, rounded once where there is such an instruction.
INLINE V<double> plus_product(V<double> sum, V<double> a, V<double> b) { return sum + a * b; }
INLINE V<float> plus_product(V<float> sum, V<float> a, V<float> b) {
#ifdef __AVX512F__
  return _mm512_fmadd_ps(a, b, sum);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, sum);
#elif defined(__aarch64__)
  return vfmaq_f32(sum, a, b);
#else
  return sum + a * b;
#endif
}

// The halves of float32 in double precision.
INLINE V<double> first_half(V<float> v) { return doubles(first_of(v)); }
INLINE V<double> second_half(V<float> v) { return doubles(second_of(v)); }

// Adds to a line of sums in double precision.
template <class P>
INLINE void add_to(double* line, V<double> v, int count) {
  P::template store<double>(line, P::template load<double>(line, count) + v, count);
}
template <class P>
INLINE void add_to(double* line, V<float> v, int count) {
  constexpr int half = kWidth<double>;
  add_to<P>(line, first_half(v), count < half ? count : half);
  if (count > half) add_to<P>(line + half, second_half(v), count - half);
}

// The same, and adds what the sum loses to another. Sums of float64 are made so: what equal entries
// lose is all alike, and adds up.
template <class D>
INLINE void add_exactly(D& sum, D& lost, D v) {
  const D before = sum;
  sum = before + v;
  const D added = sum - before;
  lost += (before - (sum - added)) + (v - added);
}
template <class P>
INLINE void add_exactly(double* line, double* lost, V<double> v, int count) {
  V<double> sum = P::template load<double>(line, count);
  V<double> loss = P::template load<double>(lost, count);
  add_exactly(sum, loss, v);
  P::template store<double>(line, sum, count);
  P::template store<double>(lost, loss, count);
}

// What was lost is none where the sum is no number.
INLINE double whole_of(double sum, double lost) {
  return __builtin_isfinite(sum) ? sum + lost : sum;
}

// A sum of numbers one by one: if not exact, as it comes.
template <bool kExact>
struct Total {
  double sum = 0, lost = 0;
  INLINE void add(double v) {
    if constexpr (kExact) {
      add_exactly(sum, lost, v);
    } else {
      sum += v;
    }
  }
  INLINE double whole() const { return kExact ? whole_of(sum, lost) : sum; }
};

INLINE double total(V<double> a) {
  double part[2] = {a[0], a[1]};
  for (int i = 2; i < kWidth<double>; ++i) part[i % 2] += a[i];
  return part[0] + part[1];
}

template <class C>
INLINE V<C> filled(double value) {
  return V<C>{} + C(value);
}

// A number by itself: what is read as a vector just after it was written waits.
INLINE double number(const f16* p) {
#ifdef __F16C__
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(p->bits)));
#else
  return Part::load<double>(p, 1)[0];
#endif
}
INLINE double number(const bf16* p) { return bits_of<float>(uint32_t(p->bits) << 16); }
INLINE double number(const float* p) { return *p; }
INLINE double number(const double* p) { return *p; }
