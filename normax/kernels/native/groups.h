// Groups of columns: measured by the sums of their columns, and written.

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
