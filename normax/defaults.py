"""What `implementation=None` takes: a kernel where it was timed and beat XLA's form, else that."""

import jax

# By kind of device, with the versions of JAX that it was tested with.
TESTED = (0, 11) <= jax.__version_info__ < (0, 13)
KERNELS = {"hopper": "mosaic_gpu"} if TESTED else {}
# The rows that it was timed for: dtypes, a divisor of their length, and the longest.
DTYPES, MULTIPLE, LONGEST = ("float32", "bfloat16"), 8, 32768
FASTER_FROM = 256  # entries of a row: shorter ones XLA brings forward faster


def are_timed(plan, x):
    """Returns whether the rows of `x`, whole on a device, are of those that were timed."""
    if not all(isinstance(size, int) for size in x.shape) or not x.size:
        return False
    # Rows that are spread over devices would be gathered.
    whole = not any(tuple(jax.typeof(x).sharding.spec)[x.ndim - 1 :])
    same = x.dtype.name in DTYPES and plan.dtype == x.dtype
    return whole and same and x.shape[-1] % MULTIPLE == 0 and x.shape[-1] <= LONGEST


def beat_xla_forward(plan, x, differentiated):
    """Returns whether rows that were timed are brought forward faster, too."""
    # One sum of a row XLA makes one kernel of with what follows, if no backward pass does.
    one_sum = not plan.reduction.centered and not differentiated
    return x.shape[-1] >= FASTER_FROM and not one_sum


def kernel_or_form(why_not, kernel, form, *operands, **told):
    """Returns what a kernel makes, if it can be had: it is looked for where it is lowered alone.

    What is `told` of the devices is for the form: a kernel has its own way with them.
    """
    try:
        reason = why_not()
    except ImportError as error:
        reason = str(error)
    return kernel(*operands) if reason is None else form(*operands, **told)
