// The kernels, for the set of instructions that this file is compiled for under the name of LEVEL.

#include "kernels.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef __aarch64__
#include <arm_neon.h>
#endif

#define INLINE_LAMBDA __attribute__((always_inline))

namespace normax {
namespace LEVEL {
namespace {

// In this order.
#include "numbers.h"
#include "lanes.h"
#include "rows.h"
#include "columns.h"
#include "columns_written.h"
#include "groups.h"

}  // namespace

#define EACH_PAIR(f)                                                        \
  {                                                                         \
    f<float, float>, f<bf16, bf16>, f<f16, f16>, f<double, double>,         \
        f<bf16, float>, f<f16, float>                                       \
  }

const Kernels kernels = {
    EACH_PAIR(forward),      EACH_PAIR(backward),      EACH_PAIR(sum_columns),
    EACH_PAIR(make_factors), EACH_PAIR(write_columns), EACH_PAIR(groups_forward),
    EACH_PAIR(groups_backward),
};

}  // namespace LEVEL
}  // namespace normax
