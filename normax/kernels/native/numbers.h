// Vectors of a few entries: loads that widen, stores that round.
//
// Included within the namespace of a set of instructions, and with no inline function of the
// standard library: the linker keeps one copy of those, and it could be one of newer instructions.

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <int N>
struct Lanes {
  typedef float F __attribute__((vector_size(4 * N)));
  typedef int32_t I __attribute__((vector_size(4 * N)));
  typedef uint32_t U __attribute__((vector_size(4 * N)));
  typedef uint16_t H __attribute__((vector_size(2 * N)));
};

// The vector to compute in: as long as a register, for GCC keeps longer ones in memory; or of
// float32 as many entries as of float64.
#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
struct Few {};
template <class C>
struct Vector;
template <>
struct Vector<float> {
  static constexpr int kWidth = kBytes / 4;
  typedef Lanes<kWidth>::F V;
};
template <>
struct Vector<double> {
  static constexpr int kWidth = kBytes / 8;
  typedef double V __attribute__((vector_size(kBytes)));
};
template <>
struct Vector<Few> {
  static constexpr int kWidth = kBytes / 8;
  typedef Lanes<kWidth>::F V;
};
template <class C>
using V = typename Vector<C>::V;
template <class C>
constexpr int kWidth = Vector<C>::kWidth;

#define INLINE inline __attribute__((always_inline))

template <class To, class From>
INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class To>
INLINE To read(const void* from) {
  To to;
  __builtin_memcpy(&to, from, sizeof(to));
  return to;
}

template <int N>
INLINE typename Lanes<N>::F widened(const float* p) {
  return read<typename Lanes<N>::F>(p);
}

#ifdef __aarch64__
// GCC 12 converts what is shorter than a register entry by entry.
INLINE uint16x4_t two_of(const void* p) {
  return vreinterpret_u16_u32(vdup_n_u32(read<uint32_t>(p)));
}
INLINE Lanes<2>::H first_two(uint16x4_t v) {
  return bits_of<Lanes<2>::H>(vget_lane_u32(vreinterpret_u32_u16(v), 0));
}
#endif

template <int N>
INLINE typename Lanes<N>::F widened(const bf16* p) {
  typedef Lanes<N> L;
#ifdef __aarch64__
  if constexpr (N == 4) {
    return bits_of<typename L::F>(vshll_n_u16(read<uint16x4_t>(p), 16));
  }
  if constexpr (N == 2) {
    return bits_of<typename L::F>(vget_low_u32(vshll_n_u16(two_of(p), 16)));
  }
#endif
#ifdef __AVX2__
  // GCC 12 takes 8 bytes of integers apart one by one.
  if constexpr (N == 8) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return bits_of<typename L::F>(_mm256_slli_epi32(wide, 16));
  }
  if constexpr (N == 4) {
    __m128i wide = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)p));
    return bits_of<typename L::F>(_mm_slli_epi32(wide, 16));
  }
#endif
  auto bits = __builtin_convertvector(read<typename L::H>(p), typename L::U) << 16;
  return bits_of<typename L::F>(bits);
}

template <int N>
INLINE typename Lanes<N>::F widened(const f16* p) {
#ifdef __AVX512F__
  if constexpr (N == 16) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#endif
#ifdef __aarch64__
  if constexpr (N == 4) return vcvt_f32_f16(read<float16x4_t>(p));
  if constexpr (N == 2) return vget_low_f32(vcvt_f32_f16(vreinterpret_f16_u16(two_of(p))));
#endif
#ifdef __F16C__
  if constexpr (N == 8) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  if constexpr (N == 4) return _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p));
#endif
  typedef Lanes<N> L;
  typedef typename L::F F;
  auto h = __builtin_convertvector(read<typename L::H>(p), typename L::U);
  auto size = h & 0x7fff;
  // Subnormal float32 may read as zero here, so that subnormal float16 are made of integers.
  F small = __builtin_convertvector(bits_of<typename L::I>(size), F) * 0x1p-24f;
  auto exponent = size >= 0x7c00 ? (size << 13) + (224u << 23) : (size << 13) + (112u << 23);
  auto bits = size < 0x400 ? bits_of<typename L::U>(small) : exponent;
  return bits_of<F>(bits | (h & 0x8000) << 16);
}

// Entries of a dtype, rounded to even: of float32 as they are.
template <int N>
INLINE typename Lanes<N>::F narrowed(const float*, typename Lanes<N>::F v) {
  return v;
}

template <int N>
INLINE typename Lanes<N>::H narrowed(const bf16*, typename Lanes<N>::F v) {
  typedef Lanes<N> L;
  auto bits = bits_of<typename L::U>(v);
  auto even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  auto nan = (bits >> 16) | 0x40;
  typename L::U rounded = (bits & 0x7fffffff) > 0x7f800000 ? nan : even;
#ifdef __AVX2__
  if constexpr (N == 8) {
    auto packed = _mm256_packus_epi32(bits_of<__m256i>(rounded), _mm256_setzero_si256());
    auto joined = _mm256_permute4x64_epi64(packed, 0x08);
    return bits_of<typename L::H>(_mm256_castsi256_si128(joined));
  }
#endif
#ifdef __aarch64__
  if constexpr (N == 2) {
    auto pair = bits_of<uint32x2_t>(rounded);
    return first_two(vmovn_u32(vcombine_u32(pair, pair)));
  }
#endif
  return __builtin_convertvector(rounded, typename L::H);
}

template <int N>
INLINE typename Lanes<N>::H narrowed(const f16*, typename Lanes<N>::F v) {
  typedef Lanes<N> L;
#ifdef __AVX512F__
  if constexpr (N == 16) return bits_of<typename L::H>(_mm512_cvtps_ph(v, 0));
#endif
#ifdef __aarch64__
  if constexpr (N == 4) return bits_of<typename L::H>(vcvt_f16_f32(v));
  if constexpr (N == 2) {
    return first_two(vreinterpret_u16_f16(vcvt_f16_f32(vcombine_f32(v, v))));
  }
#endif
#ifdef __F16C__
  if constexpr (N == 8) return bits_of<typename L::H>(_mm256_cvtps_ph(v, 0));
  if constexpr (N == 4) {
    __m128i packed = _mm_cvtps_ph(v, 0);
    return read<typename L::H>(&packed);
  }
#endif
  typedef typename L::U U;
  auto bits = bits_of<U>(v);
  auto size = bits & 0x7fffffff;
  auto normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  // Adding a half leaves of a small number what float16 can hold, rounded, in the last bits.
  auto small = bits_of<U>(bits_of<typename L::F>(size) + 0.5f) - (126u << 23);
  U infinite = size - size + 0x7c00;
  U most = size < (113u << 23) ? small : (size >= 0x477ff000 ? infinite : normal);
  U most_or_nan = size > 0x7f800000 ? infinite | 0x200 | ((size >> 13) & 0x3ff) : most;
  return __builtin_convertvector(most_or_nan | (bits >> 16 & 0x8000), typename L::H);
}

template <class T, class Bits>
INLINE void write(T* p, Bits bits) {
  __builtin_memcpy(p, &bits, sizeof(bits));
}

// Past the caches, to an aligned address. What is larger than they are would be read from memory
// before it is written there.
template <class T, class Bits>
INLINE void write_past(T* p, Bits bits) {
#ifdef __AVX512F__
  if constexpr (sizeof(bits) == 64) return _mm512_stream_si512((__m512i*)p, bits_of<__m512i>(bits));
#endif
#ifdef __AVX2__
  if constexpr (sizeof(bits) == 32) {
    return _mm256_stream_si256((__m256i*)p, bits_of<__m256i>(bits));
  } else if constexpr (sizeof(bits) == 16) {
    return _mm_stream_si128((__m128i*)p, bits_of<__m128i>(bits));
  }
#endif
  write(p, bits);
}

// Other threads may read what was written past the caches.
INLINE void settle() {
#ifdef __AVX2__
  _mm_sfence();
#endif
}

INLINE Lanes<4>::F joined(Lanes<2>::F a, Lanes<2>::F b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3);
}
INLINE Lanes<8>::F joined(Lanes<4>::F a, Lanes<4>::F b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
}
INLINE Lanes<16>::F joined(Lanes<8>::F a, Lanes<8>::F b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
INLINE Lanes<2>::F first_of(Lanes<4>::F v) { return __builtin_shufflevector(v, v, 0, 1); }
INLINE Lanes<2>::F second_of(Lanes<4>::F v) { return __builtin_shufflevector(v, v, 2, 3); }
INLINE Lanes<4>::F first_of(Lanes<8>::F v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3); }
INLINE Lanes<4>::F second_of(Lanes<8>::F v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7); }
INLINE Lanes<8>::F first_of(Lanes<16>::F v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
}
INLINE Lanes<8>::F second_of(Lanes<16>::F v) {
  return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}

INLINE V<double> doubles(V<Few> v) {
#ifdef __aarch64__
  return vcvt_f64_f32(v);
#else
  return __builtin_convertvector(v, V<double>);
#endif
}
INLINE V<Few> singles(V<double> v) {
#ifdef __aarch64__
  return vcvt_f32_f64(v);
#else
  return __builtin_convertvector(v, V<Few>);
#endif
}
