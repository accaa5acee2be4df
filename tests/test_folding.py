"""Batch norms folded into the layers beside them: the same outputs, and nothing left of the norm."""

import functools
import pickle

import chex
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normax
import normax.linen
import normax.nnx
from normax import interop

KEY = jax.random.key(0)
IMAGE = jax.random.normal(KEY, (2, 9, 9, 4))


def randomized(tree, seed=1):
    """Returns a tree of numbers between 0.5 and 1.5, in place of a start of zeros and ones."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    new = [
        jax.random.uniform(key, leaf.shape, leaf.dtype, 0.5, 1.5) if leaf.ndim == 1 else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, new)


def text(function, *args):
    """Returns the compiled program."""
    return jax.jit(function).lower(*args).compile().as_text()


def numbers(seed, *shape):
    return np.asarray(jax.random.uniform(jax.random.key(seed), shape, minval=0.5, maxval=1.5))


@pytest.mark.parametrize("epsilon_on", ["variance", "deviation"])
def test_the_affine_map_is_the_formula(epsilon_on):
    mean, var, scale, bias = (numbers(i, 3) for i in range(4))
    stats = normax.RunningStats.create(3)._replace(mean=mean, var=var)
    a, c = interop.affine_of(stats, scale, bias, epsilon=0.1, epsilon_on=epsilon_on)
    deviation = np.sqrt(var + 0.1) if epsilon_on == "variance" else np.sqrt(var) + 0.1
    np.testing.assert_allclose(a, scale / deviation, rtol=1e-6)
    np.testing.assert_allclose(c, bias - mean * scale / deviation, rtol=1e-5)


SPECS = [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("CHWN", "IHWO", "CHWN")]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec[1])
def test_kernels_of_any_layout_and_groups(spec, groups):
    sizes = {"N": 2, "C": 4, "H": 6, "W": 5, "I": 4 // groups, "O": 6}
    kernel_sizes = {**sizes, "H": 3, "W": 2}
    x = numbers(0, *(sizes[letter] for letter in spec[0]))
    kernel = numbers(1, *(kernel_sizes[letter] for letter in spec[1])) - 1

    def along(row, layout, letter):
        return np.expand_dims(row, [i for i, other in enumerate(layout) if other != letter])

    def convolve(x, kernel, bias, padding):
        y = jax.lax.conv_general_dilated(
            x, kernel, (2, 1), padding, dimension_numbers=spec, feature_group_count=groups
        )
        return y + along(bias, spec[2], "C")

    bias, output, offset = numbers(2, 6), spec[1].index("O"), numbers(4, 6)
    factor = numbers(3, 6)
    expected = convolve(x, kernel, bias, "SAME")
    expected = expected * along(factor, spec[2], "C") + along(offset, spec[2], "C")
    new = interop.fold_into_previous(kernel, bias, factor, offset, feature_axis=output)
    np.testing.assert_allclose(convolve(x, *new, "SAME"), expected, rtol=1e-5, atol=1e-5)

    factor, offset = numbers(5, 4), numbers(6, 4)
    scaled = x * along(factor, spec[0], "C") + along(offset, spec[0], "C")
    new = interop.fold_into_next(
        *(kernel, bias, factor, offset),
        input_axis=spec[1].index("I"),
        feature_axis=output,
        feature_group_count=groups,
    )
    expected = convolve(scaled, kernel, bias, "VALID")
    np.testing.assert_allclose(convolve(x, *new, "VALID"), expected, rtol=1e-5, atol=1e-5)


class Net(nn.Module):
    """Every layer that takes a norm, before or behind, and two that must not."""

    norm: type = normax.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        def norm(name, **options):
            return self.norm(not train, name=name, **options)

        x = nn.relu(norm("a")(nn.Conv(6, (3, 3), use_bias=False, name="conv")(x)))
        x = nn.Conv(6, (3, 3), 2, feature_group_count=3, name="grouped")(x)
        x = nn.relu(norm("b", use_scale=False)(x))
        x = norm("c", use_bias=False)(nn.ConvTranspose(4, (3, 3), (2, 2), name="up")(x))
        x = nn.relu(norm("d")(nn.ConvTranspose(4, (3, 3), transpose_kernel=True, name="up2")(x)))
        x = nn.Conv(5, (3, 3), padding="VALID", use_bias=False, name="valid")(norm("e")(x))
        x = nn.relu(x)
        x = nn.Conv(5, (3, 3), name="padded")(norm("padding")(x))
        twice = nn.Dense(5, name="twice")(x)
        x = nn.relu(norm("used")(twice) + twice).mean((1, 2))
        return nn.Dense(3, name="head")(norm("f")(x))


FOLDS = {"a": "conv", "b": "grouped", "c": "up", "d": "up2", "e": "valid", "f": "head"}


@pytest.mark.parametrize("norm", [normax.linen.BatchNorm, nn.BatchNorm])
def test_a_model_of_linen(norm):
    model = Net(norm)
    variables = randomized(model.init(KEY, IMAGE))
    before = jax.tree.map(np.array, variables)
    apply, new, folded, left = interop.fold_linen(model, variables, IMAGE, train=False)
    assert dict(folded) == FOLDS
    assert {path for path, _ in left} == {"padding", "used"}
    assert set(new["batch_stats"]) == {"padding", "used"}
    assert not set(FOLDS) & set(new["params"])
    np.testing.assert_allclose(
        apply(new, IMAGE), model.apply(variables, IMAGE), rtol=1e-5, atol=1e-5
    )
    chex.assert_trees_all_equal(variables, before)


@pytest.mark.parametrize("activation", [jax.nn.silu, functools.partial(jnp.clip, max=0.1)])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("fits", [True, False])
def test_an_activation_stays_where_the_norm_was(fits, activation, dtype):
    norm = {"use_running_average": True, "activation": activation, "dtype": dtype}
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype is None else {"rtol": 0.02, "atol": 0.02}
    x = jax.random.normal(KEY, (6, 4))
    first = nn.Dense(4) if fits else nn.relu
    norms = [normax.linen.BatchNorm(**norm) for _ in range(2)]
    model = nn.Sequential([first, norms[0], nn.Dense(4, dtype=dtype), norms[1]])
    variables = randomized(model.init(KEY, x))
    apply, new, folded, left = interop.fold_linen(model, variables, x)
    assert folded == ((("layers_1", "layers_0"),) if fits else ()) + (("layers_3", "layers_2"),)
    assert fits or "behind an activation" in dict(left)["layers_1"]
    y, expected = apply(new, x), model.apply(variables, x)
    assert y.dtype == expected.dtype
    np.testing.assert_allclose(*(v.astype(jnp.float32) for v in (y, expected)), **close)

    rngs = nnx.Rngs(0)
    first = nnx.Linear(4, 4, rngs=rngs) if fits else nn.relu
    norms = [normax.nnx.BatchNorm(4, **norm, rngs=rngs) for _ in range(2)]
    for each in norms:
        each.mean[...], each.scale[...] = jnp.full(4, 0.5), jnp.full(4, 2.0)
    model = nnx.Sequential(first, norms[0], nnx.Linear(4, 4, dtype=dtype, rngs=rngs), norms[1])
    new, _, folded, _ = interop.fold_nnx(model, x)
    assert len(folded) == 1 + fits
    np.testing.assert_allclose(*(v.astype(jnp.float32) for v in (new(x), model(x))), **close)
    again, _, folded, _ = interop.fold_nnx(new, x)
    assert folded == ()
    np.testing.assert_array_equal(again(x), new(x))


def test_nothing_of_the_norm_is_left_in_the_program():
    model = nn.Sequential([nn.Conv(4, (3, 3)), normax.linen.BatchNorm(True), nn.relu])
    variables = randomized(model.init(KEY, IMAGE))
    apply, new, *_ = interop.fold_linen(model, variables, IMAGE)
    plain = nn.Sequential([nn.Conv(4, (3, 3)), lambda x: x, nn.relu])
    assert "rsqrt" in text(model.apply, variables, IMAGE)
    program = text(apply, new, IMAGE)
    assert "rsqrt" not in program
    assert "divide" not in program
    assert program.count(" = ") == text(plain.apply, new, IMAGE).count(" = ")


def test_stacked_and_shared_layers_are_left():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(normax.linen.BatchNorm(True)(nn.Dense(4)(x))), None

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                Block, {"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3
            )
            x, _ = scan(name="scan")(x, None)
            dense, norm = nn.Dense(4, name="dense"), normax.linen.BatchNorm(True, name="norm")
            x = nn.relu(norm(dense(x)))
            x = nn.relu(norm(dense(x)))
            x = nn.remat(nn.Dense)(4, name="remat")(x)
            return normax.linen.BatchNorm(True, name="last")(x)

    x = jax.random.normal(KEY, (5, 4))
    variables = randomized(Deep().init(KEY, x))
    apply, new, folded, left = interop.fold_linen(Deep(), variables, x)
    assert {path for path, _ in left} >= {"scan/BatchNorm_0", "norm"}
    np.testing.assert_allclose(apply(new, x), Deep().apply(variables, x), rtol=1e-5, atol=1e-5)
    assert len(folded) + len(left) == 3


class Model(nnx.Module):
    def __init__(self, norm, rngs):
        self.conv = nnx.Conv(4, 6, (3, 3), use_bias=False, rngs=rngs)
        self.grouped = nnx.Conv(6, 6, (3, 3), 2, feature_group_count=3, rngs=rngs)
        self.up = nnx.ConvTranspose(6, 4, (3, 3), (2, 2), transpose_kernel=True, rngs=rngs)
        self.valid = nnx.Conv(4, 5, (3, 3), padding="VALID", use_bias=False, rngs=rngs)
        self.padded = nnx.Conv(5, 5, (3, 3), rngs=rngs)
        self.heads = nnx.List([nnx.Linear(5, 3, use_bias=False, rngs=rngs)])
        sizes = {"a": 6, "b": 6, "c": 4, "d": 4, "padding": 5, "e": 5}
        for name, size in sizes.items():
            setattr(self, name, norm(size, rngs=rngs))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.a(self.conv(x)))
        x = nnx.relu(self.b(self.grouped(x)))
        x = nnx.relu(self.c(self.up(x)))
        x = nnx.relu(self.valid(self.d(x)))
        x = nnx.relu(self.padded(self.padding(x)))
        return self.heads[0](self.e(self.dropout(x).mean((1, 2))))


@pytest.mark.parametrize("norm", [normax.nnx.BatchNorm, nnx.BatchNorm])
def test_a_model_of_nnx(norm):
    model = Model(norm, nnx.Rngs(0))
    params, stats, rest = nnx.split_state(nnx.state(model), nnx.Param, nnx.BatchStat, ...)
    nnx.update(model, nnx.merge_state(randomized(params), randomized(stats, 2), rest))
    new, _, folded, left = interop.fold_nnx(model, IMAGE)
    assert dict(folded) == {"a": "conv", "b": "grouped", "c": "up", "d": "valid", "e": "heads/0"}
    assert [path for path, _ in left] == ["padding"]
    model.eval()
    np.testing.assert_allclose(new(IMAGE), model(IMAGE), rtol=1e-5, atol=1e-5)
    graph, state = nnx.split(new)
    names = {path[0] for path, _ in nnx.to_flat_state(nnx.state(new, nnx.BatchStat))}
    assert names == {"padding"}
    program = text(lambda state, x: nnx.merge(graph, state)(x), state, IMAGE)
    assert program.count("rsqrt(") == 1
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(new))(IMAGE), new(IMAGE))
    assert type(model.a) is norm
    assert type(model.conv) is nnx.Conv


class OwnBatchNorm(normax.linen.BatchNorm):
    @nn.compact
    def __call__(self, x):
        return nn.relu(super().__call__(x))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4, name="dense")
        y = nn.relu(normax.linen.BatchNorm(True, name="norm")(dense(x)))
        return y @ dense.variables["params"]["kernel"].T


def small(layer, **options):
    """Returns a model that calls a batch norm in a way of its own after, or before, a layer."""

    class Small(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layer(x, normax.linen.BatchNorm(name="norm", **options))

    return Small()


ODD = {
    "mask": small(
        lambda x, norm: norm(nn.Dense(5)(x), mask=x[:, :1] > 0), use_running_average=True
    ),
    "training": small(lambda x, norm: norm(nn.Dense(5)(x), False)),
    "axis": small(lambda x, norm: norm(nn.Dense(5)(x)), use_running_average=True, axis=0),
    "masked kernel": small(
        lambda x, norm: nn.Conv(
            5, (2,), padding="VALID", mask=jnp.eye(2)[:, :, None] * jnp.ones((2, 2, 5))
        )(norm(x[:, :2])[None]),
        use_running_average=True,
    ),
    "own class": nn.Sequential([nn.Dense(4), OwnBatchNorm(True)]),
    "tied": Tied(),
    "product": nn.Sequential(
        [
            nn.Dense(
                4, dot_general=lambda *args, **kwargs: jnp.abs(jax.lax.dot_general(*args, **kwargs))
            ),
            normax.linen.BatchNorm(True),
        ]
    ),
    "vmap": nn.Sequential(
        [
            nn.vmap(nn.Dense, {"params": 0}, {"params": True}, axis_size=2, in_axes=None)(4),
            nn.vmap(
                normax.linen.BatchNorm,
                {"params": 0, "batch_stats": None},
                {"params": True},
                axis_size=2,
            )(True),
        ]
    ),
}


@pytest.mark.parametrize("model", ODD.values(), ids=ODD)
def test_what_is_not_one_affine_map_of_one_layer_is_left(model):
    x = jax.random.normal(KEY, (6, 3))
    variables = randomized(model.init(KEY, x))
    call = {"mutable": ["batch_stats"]} if model is ODD["training"] else {}
    expected = model.apply(variables, x, **call)
    apply, new, folded, left = interop.fold_linen(model, variables, x, **call)
    assert folded == ()
    assert len(left) == 1
    chex.assert_trees_all_equal(apply(new, x, **call), expected)


@pytest.mark.parametrize("first", ["model", "fold"])
def test_what_nn_jit_has_traced_is_neither_used_nor_left_behind(first):
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return normax.linen.BatchNorm(True, name="norm")(nn.Dense(4, name="dense")(x))

    model, x = nn.jit(Inner)(), jax.random.normal(KEY, (6, 3))
    variables = randomized(Inner().init(KEY, x))
    expected = Inner().apply(variables, x)
    if first == "model":
        model.apply(variables, x)
    for _ in range(2):
        apply, new, folded, _ = interop.fold_linen(model, variables, x)
        assert len(folded) == 1
        np.testing.assert_allclose(apply(new, x), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(jax.jit(apply)(new, x), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(model.apply(variables, x), expected, rtol=1e-6)


def test_options_by_position_frozen_variables_and_the_dtype_of_the_output():
    model = Net()
    variables = flax.core.freeze(randomized(model.init(KEY, IMAGE)))
    apply, new, folded, _ = interop.fold_linen(model, variables, IMAGE, False)
    assert dict(folded) == FOLDS
    np.testing.assert_allclose(apply(new, IMAGE, False), model.apply(variables, IMAGE), atol=1e-4)

    halves = nn.Dense(4, dtype=jnp.bfloat16)
    model = nn.Sequential([halves, normax.linen.BatchNorm(True, dtype=jnp.float32)])
    x = jax.random.normal(KEY, (6, 3))
    variables = model.init(KEY, x)
    apply, new, *_ = interop.fold_linen(model, variables, x)
    assert apply(new, x).dtype == model.apply(variables, x).dtype == jnp.float32


def test_partitioned_variables_are_unboxed():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = nn.Sequential([nn.Dense(4, kernel_init=init), normax.linen.BatchNorm(True)])
    x = jax.random.normal(KEY, (6, 3))
    variables = model.init(KEY, x)
    apply, new, folded, _ = interop.fold_linen(model, variables, x)
    assert len(folded) == 1
    np.testing.assert_allclose(apply(new, x), model.apply(variables, x), atol=1e-5)


class Odd(nnx.Module):
    def __init__(self, way, rngs):
        self.way = way
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.norm = normax.nnx.BatchNorm(4, rngs=rngs)
        self.second = nnx.Linear(4, 4, rngs=rngs)
        if way == "shared":
            self.second.kernel = self.first.kernel

    def __call__(self, x):
        options = {
            "mask": {"mask": x[:, :1] > 0},
            "training": {"use_running_average": False},
        }.get(self.way, {})
        y = self.norm(self.first(x), **options)
        y = y + self.first(x) if self.way == "twice" else y
        if self.way == "tied":
            y = jnp.tanh(y) @ self.first.kernel[...].T
        return y + self.second(x) if self.way == "shared" else y


@pytest.mark.parametrize("way", ["mask", "training", "twice", "tied", "shared"])
def test_what_is_not_one_affine_map_of_one_layer_of_nnx_is_left(way):
    model, x = Odd(way, nnx.Rngs(0)), jax.random.normal(KEY, (6, 4))
    model.norm.mean[...] += 2
    new, _, folded, left = interop.fold_nnx(model, x)
    model.eval()
    assert folded == ()
    assert [path for path, _ in left] == ["norm"]
    np.testing.assert_allclose(new(x), model(x), rtol=1e-6)


@pytest.mark.parametrize("transformation", [nnx.remat, nnx.jit])
def test_a_model_of_nnx_with_a_transformation_inside(transformation):
    class Inside(Odd):
        @transformation
        def inner(self, x):
            return self.norm(self.first(x))

        def __call__(self, x):
            return self.inner(x) + (self.norm.mean[...].sum() if self.way == "read" else 0.0)

    for way, expected in (("plain", (("norm", "first"),)), ("read", ())):
        model, x = Inside(way, nnx.Rngs(0)), jax.random.normal(KEY, (6, 4))
        model.norm.mean[...] += 2
        new, _, folded, left = interop.fold_nnx(model, x)
        model.eval()
        np.testing.assert_allclose(new(x), model(x), rtol=1e-5, atol=1e-5)
        assert folded == expected
        assert len(folded) + len(left) == 1


def test_folding_twice_finds_nothing():
    model, x = Odd("plain", nnx.Rngs(0)), jax.random.normal(KEY, (6, 4))
    once, _, folded, _ = interop.fold_nnx(model, x)
    twice, _, again, left = interop.fold_nnx(once, x)
    assert (len(folded), again, left) == (1, (), ())
    np.testing.assert_array_equal(twice(x), once(x))


def test_the_gain_of_a_layer_norm_goes_into_the_next_layer():
    x, scale, bias = jax.random.normal(KEY, (5, 4)), numbers(1, 4), numbers(2, 4)
    kernel, b = numbers(3, 4, 3), numbers(4, 3)
    kernel_2, b_2 = interop.fold_into_next(kernel, b, scale, bias)
    expected = np.asarray(normax.layer_norm(x, scale, bias)) @ kernel + b
    ours = np.asarray(normax.layer_norm(x)) @ np.asarray(kernel_2) + np.asarray(b_2)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_halves_stay_halves():
    kernel = numbers(0, 3, 4).astype(jnp.bfloat16)
    new, bias = interop.fold_into_previous(kernel, None, numbers(1, 4), numbers(2, 4))
    assert new.dtype == bias.dtype == jnp.bfloat16
    exact = (kernel.astype(np.float64) * numbers(1, 4)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(new, exact)


STATS = normax.RunningStats.create(3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: interop.affine_of(STATS, jnp.ones(4)), ValueError, r"affine_of: expected scale.shape == \(3,\), got \(4,\)"),
        (lambda: interop.affine_of((1, 2)), TypeError, "affine_of: expected stats to be"),
        (lambda: interop.affine_of(STATS, epsilon_on="both"), ValueError, "expected epsilon_on to be one of"),
        (lambda: interop.affine_of(STATS, epsilon=-1.0), ValueError, "affine_of: expected epsilon in"),
        (lambda: interop.fold_into_previous(jnp.ones((3, 4)), None, jnp.ones(3), jnp.ones(4)), ValueError, r"fold_into_previous: expected factor.shape == \(4,\), got \(3,\)"),
        (lambda: interop.fold_into_previous(jnp.ones((3, 4)), None, jnp.ones(4), jnp.ones(4), feature_axis=2), ValueError, "feature_axis within"),
        (lambda: interop.fold_into_previous(jnp.ones((3, 4), int), None, jnp.ones(4), jnp.ones(4)), TypeError, "expected kernel of a fl"),
        (lambda: interop.fold_into_next(jnp.ones((3, 4)), jnp.ones(3), jnp.ones(3), jnp.ones(3)), ValueError, r"fold_into_next: expected bias.shape == \(4,\), got \(3,\)"),
        (lambda: interop.fold_into_next(jnp.ones((3, 4)), None, jnp.ones(9), jnp.ones(9), feature_group_count=3), ValueError, "fold_into_next: expected num_groups to divide"),
        (lambda: interop.fold_into_next(jnp.ones((3, 4)), None, jnp.ones(3), jnp.ones(3), input_axis=1), ValueError, "fold_into_next: expected .* twice|repeat|distinct|once"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("layer", "norm_first", "folds"),
    [
        ({"dtype": jnp.bfloat16}, True, False),  # what comes to it would be rounded
        ({"param_dtype": jnp.bfloat16, "dtype": jnp.float32}, True, False),  # or its weights
        ({"param_dtype": jnp.bfloat16, "dtype": jnp.float32}, False, False),
        ({"dtype": jnp.bfloat16}, False, True),
        ({}, True, True),
    ],
)
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_a_norm_stays_where_digits_would_be_lost(library, layer, norm_first, folds):
    rounds = layer.get("dtype") is jnp.bfloat16
    # A layer that rounds what it gives loses as many digits without.
    x = (0 if rounds and not norm_first else 1000) + jax.random.normal(KEY, (64, 8))
    rngs = nnx.Rngs(0)
    dense = nnx.Linear(8, 8, rngs=rngs, **layer)
    given = x if norm_first else dense(x).astype(jnp.float32)
    if library == "linen":
        parts = [normax.linen.BatchNorm(True), nn.Dense(8, **layer)]
        model = nn.Sequential(parts if norm_first else parts[::-1])
        variables = model.init(KEY, x)
        names = [f"layers_{i}" for i in (range(2) if norm_first else (1, 0))]
        params = {"kernel": dense.kernel[...], "bias": dense.bias[...]}
        variables["params"][names[1]] = params
        variables["batch_stats"][names[0]] = {"mean": given.mean(0), "var": given.var(0)}
        apply, new, folded, left = interop.fold_linen(model, variables, x)
        y, expected = apply(new, x), model.apply(variables, x)
    else:
        norm = normax.nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        norm.mean[...], norm.var[...] = given.mean(0), given.var(0)
        model = nnx.Sequential(*((norm, dense) if norm_first else (dense, norm)))
        new, _, folded, left = interop.fold_nnx(model, x)
        y, expected = new(x), model(x)
    assert (len(folded), len(left)) == ((1, 0) if folds else (0, 1))
    y, expected = (np.asarray(v, np.float32) for v in (y, expected))
    np.testing.assert_allclose(y, expected, atol=0.05 if rounds else 2e-3)


def test_a_layer_may_have_what_is_no_float():
    class Keyed(nnx.Linear):
        def __init__(self, *sizes, rngs):
            super().__init__(*sizes, rngs=rngs)
            self.keys = rngs.fork()

    rngs = nnx.Rngs(0)
    norm = normax.nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), norm, Keyed(4, 4, rngs=rngs))
    x = jax.random.normal(KEY, (6, 3))
    new, _, folded, left = interop.fold_nnx(model, x)
    assert (len(folded), len(left)) == (1, 0)
    np.testing.assert_allclose(new(x), model(x), atol=1e-5)
