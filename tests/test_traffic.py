"""What compiled programs move: read from texts with known answers, and held where compilers are."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import traffic
import traffic_hlo
import traffic_programs as programs
from traffic_hlo import Program, Traffic

# Two kernels: x (64 KiB) and s (512 bytes) make y and 128 float32; these and y make y again.
TWO_KERNELS = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[2]{0})->f32[2]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[256,128], q: f32[128]) -> (bf16[256,128], f32[128]) {
  %p = bf16[256,128]{1,0} parameter(0)
  %wide = f32[256,128]{1,0} convert(%p)
  %q = f32[128]{0} parameter(1)
  %made = f32[128]{0} reduce(%wide, %q), dimensions={0}, to_apply=%add
  ROOT %both = (bf16[256,128]{1,0}, f32[128]{0}) tuple(%p, %made)
}

ENTRY %main (x: bf16[256,128], s: f32[128]) -> bf16[256,128] {
  %x = bf16[256,128]{1,0} parameter(0), metadata={op_name="x"}
  %s = f32[128]{0} parameter(1)
  %one = (bf16[256,128]{1,0}, f32[128]{0}) fusion(%x, %s), kind=kInput, calls=%fused
  %y = bf16[256,128]{1,0} get-tuple-element(%one), index=0
  %sums = f32[128]{0} get-tuple-element(%one), index=1
  %flat = bf16[32768]{0} bitcast(%y)
  ROOT %two = bf16[256,128]{1,0} custom-call(%y, %sums, /*index=2*/%y), backend_config={"a": "("}
}
"""
X, S = 256 * 128 * 2, 128 * 4

# Once a loop whose body is one kernel, and a branch of which each side is one.
CONTROL = """\
HloModule jit_g

body {
  b = (s32[], f32[1024]{0}) parameter(0)
  i = s32[] get-tuple-element(b), index=0
  v = f32[1024]{0} get-tuple-element(b), index=1
  w = f32[1024]{0} negate(v)
  ROOT t = (s32[], f32[1024]{0}) tuple(i, w)
}

condition {
  c = (s32[], f32[1024]{0}) parameter(0)
  j = s32[] get-tuple-element(c), index=0
  limit = s32[] constant(3)
  ROOT less = pred[] compare(j, limit), direction=LT
}

yes {
  ROOT m = f32[1024]{0} parameter(0)
}

no {
  n = f32[1024]{0} parameter(0)
  ROOT o = f32[1024]{0} copy(n)
}

inline {
  k = f32[1024]{0} parameter(0)
  ROOT l = f32[1024]{0} sqrt(k)
}

ENTRY main {
  p = pred[] parameter(0)
  x = f32[1024]{0} parameter(1)
  z = s32[] constant(0)
  start = (s32[], f32[1024]{0}) tuple(z, x)
  loop = (s32[], f32[1024]{0}) while(start), condition=condition, body=body
  y = f32[1024]{0} get-tuple-element(loop), index=1
  r = f32[1024]{0} call(y), to_apply=inline
  ROOT end = f32[1024]{0} conditional(p, r, r), branch_computations={yes, no}
}
"""

# On TPU S(1) is the chip's own memory; x is brought there, sliced there, and a kernel reads it.
ON_CHIP = """\
HloModule jit_h

ENTRY %main (x: f32[64,128]) -> f32[32,128] {
  %x = f32[64,128]{1,0:T(8,128)} parameter(0)
  %go = (f32[64,128]{1,0:T(8,128)S(1)}, f32[64,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %here = f32[64,128]{1,0:T(8,128)S(1)} copy-done(%go)
  %cut = ((f32[64,128]{1,0:T(8,128)}), f32[32,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%x)
  %half = f32[32,128]{1,0:T(8,128)S(1)} slice-done(%cut)
  %joined = f32[32,128]{1,0:T(8,128)S(1)} custom-call(%half), custom_call_target="ConcatBitcast"
  ROOT %y = f32[32,128]{1,0:T(8,128)} dynamic-slice(%here, %joined), dynamic_slice_sizes={32,128}
}
"""

# A library's product, and one that reads a and b, adds them, and also writes what it added.
PRODUCTS = """\
HloModule jit_k

%fused (a: bf16[64,32], b: bf16[64,32], w: bf16[32,16]) -> (bf16[64,16], bf16[64,32]) {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[64,32]{1,0} parameter(1)
  %w = bf16[32,16]{1,0} parameter(2)
  %ab = f32[64,32]{1,0} add(%a, %b)
  %o = f32[64,16]{1,0} dot(%ab, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %narrow = bf16[64,16]{1,0} convert(%o)
  %kept = bf16[64,32]{1,0} convert(%ab)
  ROOT %both = (bf16[64,16]{1,0}, bf16[64,32]{1,0}) tuple(%narrow, %kept)
}

ENTRY %main (x: bf16[64,8], v: bf16[8,32], w: bf16[32,16]) -> (bf16[64,16], bf16[64,32]) {
  %x = bf16[64,8]{1,0} parameter(0)
  %v = bf16[8,32]{1,0} parameter(1)
  %w = bf16[32,16]{1,0} parameter(2)
  %h = (bf16[64,32]{1,0}, s8[4096]{0}) custom-call(%x, %v), custom_call_target="__cublas$gemm"
  %a = bf16[64,32]{1,0} get-tuple-element(%h), index=0
  %b = bf16[64,32]{1,0} negate(%a)
  ROOT %y = (bf16[64,16]{1,0}, bf16[64,32]{1,0}) fusion(%a, %b, %w), kind=kOutput, calls=%fused
}
"""
A, O, W = 64 * 32 * 2, 64 * 16 * 2, 32 * 16 * 2

# Two kernels that run beside others: one in a computation of its own, one where it stands.
ASYNCHRONOUS = """\
HloModule jit_l

%beside (a: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0} parameter(0)
  ROOT %b = f32[1024]{0} negate(%a)
}

%fused (c: f32[1024]) -> f32[1024] {
  %c = f32[1024]{0} parameter(0)
  ROOT %d = f32[1024]{0} sqrt(%c)
}

ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0} parameter(0)
  %s = ((f32[1024]{0}), f32[1024]{0}, u32[]) async-start(%x), calls=%beside
  %u = ((f32[1024]{0}), f32[1024]{0}, u32[]) async-update(%s)
  %y = f32[1024]{0} async-done(%u)
  %t = ((f32[1024]{0}), f32[1024]{0}, u32[]) fusion-start(%y), kind=kLoop, calls=%fused
  ROOT %z = f32[1024]{0} fusion-done(%t)
}
"""

COUNTS = {"kernels": 1, "bytes": 200, "maybe_kernels": 0, "maybe_bytes": 0, "temp_bytes": 0}
ROW = traffic.Row(
    "h200", "layer_norm", "forward", "bfloat16", "10 x 5", 100, 2, COUNTS, {**COUNTS, "bytes": 300}
)


def test_operands_count_once_and_outputs_once():
    assert Program(TWO_KERNELS).traffic() == Traffic(2, (X + S + X + S) + (X + S + X), 0, 0)


def test_what_may_run_counts_apart():
    entry = 2 * 4096
    assert Program(CONTROL).traffic() == Traffic(1, entry, 3, 8192 + (1 + 4 + 4) + 8192)


def test_memory_on_the_chip_counts_nothing_and_what_brings_it_there_once():
    x = 64 * 128 * 4
    assert Program(ON_CHIP, "S(1)").traffic() == Traffic(1, x + x // 2 + x // 2, 0, 0)


def test_all_memory_counts_where_none_is_on_the_chip():
    x = 64 * 128 * 4
    assert Program(ON_CHIP).traffic().bytes == 2 * x + 2 * (x // 2) + (x + x // 2 + x // 2)


def test_what_runs_asynchronously_counts_once():
    assert Program(ASYNCHRONOUS).traffic() == Traffic(2, 2 * 8192, 0, 0)


def test_products_are_left_out_but_not_what_is_fused_into_them():
    assert Program(PRODUCTS).traffic(2) == Traffic(1, 2 * A + A + A, 0, 0)


def test_products_are_counted_by_number():
    assert [kernel.products for kernel, _ in Program(PRODUCTS).kernels()] == [1, 0, 1]


def test_products_count_where_they_are_what_is_asked():
    library = 64 * 8 * 2 + 8 * 32 * 2 + A + 4096
    fused = A + A + W + O + A
    assert Program(PRODUCTS).traffic() == Traffic(3, library + 2 * A + fused, 0, 0)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[]", 4),
        ("pred[3]{0}", 3),
        ("s4[8,2]{1,0:T(8,128)E(4)}", 8),
        ("f8e4m3b11fnuz[7]{0}", 7),
        ("c128[2]{0}", 32),
        ("bf16[<=8,4]{1,0}", 64),
        ("f32[0,4]{1,0}", 0),
        ("token[]", 0),
        ("((f64[2]{0}), u16[3]{0})", 22),
    ],
)
def test_bytes_of_a_type(text, size):
    assert sum(array.bytes for array in traffic_hlo.arrays(text)) == size


def test_a_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        Program("HloModule nothing\n")


def test_what_is_as_it_was_passes(capsys):
    committed = traffic.Numbers({"jax": "1"}, [ROW])
    assert traffic.check([ROW], committed, {"jax": "1"}) == 0
    assert "1 programs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"kernels": 2}, "kernels, committed"),
        ({"maybe_kernels": 1}, "maybe_kernels, committed"),
        ({"bytes": 204.5}, "bytes/T, committed"),
        ({"bytes": 204.5}, "bytes over floor"),
        ({"bytes": 307}, "bytes/T, Flax's"),
        ({"maybe_bytes": 1}, "maybe_bytes/T, committed"),
    ],
)
def test_what_is_worse_fails(change, what, capsys):
    row = ROW._replace(normax={**COUNTS, **change})
    committed = traffic.Numbers({"jax": "1"}, [ROW])
    assert traffic.check([row], committed, {"jax": "1"}) == 1
    assert f"| {what}" in capsys.readouterr().out


def test_a_program_that_is_not_committed_fails():
    other = ROW._replace(dtype="float32")
    assert traffic.check([other], traffic.Numbers({"jax": "1"}, [ROW]), {"jax": "1"}) == 1


def test_another_jax_holds_to_limits_alone(capsys):
    row = ROW._replace(normax={**COUNTS, "kernels": 9})
    committed = traffic.Numbers({"jax": "1"}, [ROW])
    assert traffic.check([row], committed, {"jax": "2"}) == 0
    assert "of jax 1, not 2" in capsys.readouterr().out
    assert traffic.check([row._replace(x_bytes=90)], committed, {"jax": "2"}) == 1


def test_rows_are_replaced_in_order_and_those_of_another_jax_go():
    second = ROW._replace(dtype="float32")
    new = ROW._replace(floor=3)
    order = [ROW.key, second.key]
    old = traffic.Numbers({"jax": "1"}, [second, ROW, ROW._replace(norm="gone")])
    assert traffic.merged(old, [new], {"jax": "1"}, order).rows == [new, second]
    assert traffic.merged(old, [new], {"jax": "2"}, order).rows == [new]


def test_the_page_is_made_of_the_numbers():
    numbers = traffic.read()
    assert numbers.rows
    assert traffic.page(numbers) == traffic.TABLE.read_text()


def filled(shapes):
    """Returns normal numbers of the shapes, the same for the same paths."""

    def fill(path, leaf):
        seed = sum(jax.tree_util.keystr(path).encode())
        return jax.random.normal(jax.random.key(seed), leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def outputs(given):
    """Returns y and what follows the new statistics, the gradients."""
    return given[0], given[2:]


@pytest.mark.parametrize("context", programs.CONTEXTS)
@pytest.mark.parametrize("norm", programs.NORMS)
def test_both_libraries_give_the_same_dtypes(norm, context):
    case = programs.Case(norm, context, "bfloat16", programs.NORMS[norm].shapes[0])
    made = []
    for library in programs.LIBRARIES:
        shapes = programs.arguments(case, library, programs.Target(None))
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            made.append(outputs(jax.eval_shape(programs.program(case, library), *shapes)))
    assert made[0][0].dtype == jnp.bfloat16
    assert jax.tree.map(str, made[0]) == jax.tree.map(str, made[1])


# A kernel runs on its own platform alone.
ANYWHERE = [norm for norm, about in programs.NORMS.items() if " by " not in norm]
COMPUTED = [(norm, context, True) for norm in ANYWHERE for context in programs.CONTEXTS]
COMPUTED += [("batch_norm + add + relu", programs.BETWEEN, False)]


@pytest.mark.parametrize(("norm", "context", "windows"), COMPUTED)
def test_both_libraries_compute_the_same(norm, context, windows):
    image = len(programs.NORMS[norm].shapes[0]) == 4
    case = programs.Case(norm, context, "float32", (2, 4, 4, 64) if image else (16, 32))
    results = []
    for library in programs.LIBRARIES:
        shapes = programs.arguments(case, library, programs.Target(None, windows=windows))
        given, dy = filled(shapes[0]), filled(shapes[2])
        stats = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes[1])
        # Flax's own code promotes.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            y, stats, *grads = programs.program(case, library)(given, stats, dy)
        if norm.startswith("batch_norm"):
            kept = stats["batch_stats"] if library == "flax" else stats._asdict()
            grads += [kept["mean"], kept["var"]]
        results.append((y, grads))
    mine, flax = map(jax.tree.leaves, results)
    assert len(mine) == len(flax) >= 1 + 3 * (context != "forward")
    for ours, theirs in zip(mine, flax, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())


@pytest.mark.skipif(
    any(map(traffic.missing, traffic.TARGETS)), reason="needs XLA's compilers for GPU and TPU"
)
def test_programs_move_no_more_than_they_may():
    ran = subprocess.run(
        [sys.executable, traffic.__file__, "--check"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
