"""Weights that are normalized at each call, made plain for inference: the same outputs, no norm."""

import flax.linen
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_folding import KEY, randomized, text

import normax.linen
import normax.nnx
from normax import interop

X = jax.random.normal(KEY, (5, 3))
IMAGE = jax.random.normal(KEY, (2, 6, 6, 3))
WRAPPERS = [
    (normax.linen.WeightNorm, {}),
    (normax.linen.CenteredWeightNorm, {}),
    (normax.linen.WeightStandardization, {}),
    (normax.linen.ScaledWeightStandardization, {}),
    (normax.linen.SpectralNorm, {"update_stats": False}),
    (nn.SpectralNorm, {"update_stats": False}),
]
NNX_WRAPPERS = [getattr(normax.nnx, w.__name__) for w, _ in WRAPPERS[:5]]


class Net(nn.Module):
    wrapper: type
    options: dict
    convolution: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.Conv(4, (3, 3)) if self.convolution else nn.Dense(4)
        x = self.wrapper(layer, name="wrapper")(x, **self.options)
        return nn.tanh(normax.linen.BatchNorm(True, name="norm")(x))


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize(("wrapper", "options"), WRAPPERS)
def test_wrapped_layers_of_linen_become_plain_and_take_the_norm(wrapper, options, convolution):
    model, x = Net(wrapper, options, convolution), IMAGE if convolution else X
    variables = randomized(model.init(KEY, x))
    apply, new, folded, left = interop.fold_linen(model, variables, x)
    layer = "Conv_0" if convolution else "Dense_0"
    assert folded == (("wrapper", layer), ("norm", layer))
    assert left == ()
    assert jax.tree.map(jnp.shape, new) == {
        "params": {layer: {"kernel": (3, 3, 3, 4) if convolution else (3, 4), "bias": (4,)}}
    }
    np.testing.assert_allclose(apply(new, x), model.apply(variables, x), rtol=1e-5, atol=1e-6)
    program = text(apply, new, x)
    assert "sqrt" in text(model.apply, variables, x)
    assert "sqrt" not in program
    assert "divide" not in program


class Deep(nn.Module):
    """A wrapper of a wrapper, one around a network, one that is called twice."""

    @nn.compact
    def __call__(self, x):
        inner = normax.linen.WeightStandardization(nn.Dense(3, name="dense"), name="inner")
        x = nn.tanh(normax.linen.WeightNorm(inner, name="outer")(x))
        x = normax.linen.WeightNorm(Block(), name="around")(x, scale=2.0)
        twice = normax.linen.WeightNorm(nn.Dense(3, name="again"), name="twice")
        return twice(nn.tanh(twice(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, scale=1.0):
        return scale * nn.Dense(3)(x)


@pytest.mark.parametrize("transformation", [lambda kind: kind, nn.remat, nn.jit])
def test_wrappers_within_wrappers_and_transformations(transformation):
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return transformation(Deep)(name="deep")(x)

    model = Outer()
    variables = randomized(model.init(KEY, X))
    apply, new, folded, left = interop.fold_linen(model, variables, X)
    assert {wrapper.removeprefix("deep/") for wrapper, _ in folded} == {"outer", "inner", "twice"}
    assert [path for path, _ in left] == ["deep/around"]
    np.testing.assert_allclose(apply(new, X), model.apply(variables, X), rtol=1e-5, atol=1e-6)


class OwnWeightNorm(normax.linen.WeightNorm):
    @nn.compact
    def __call__(self, x):
        return nn.relu(super().__call__(x))


class Odd(nn.Module):
    way: str

    @nn.compact
    def __call__(self, x):
        if self.way == "own":
            return OwnWeightNorm(nn.Dense(3), name="wrapper")(x)
        if self.way in ("scanned", "broadcast"):
            where = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            if self.way == "broadcast":
                where = {"variable_broadcast": "params", "split_rngs": {"params": False}}
            return nn.scan(Step, **where, length=2)(name="steps")(x, None)[0]
        dense = nn.Dense(3, name="dense")
        wrapped = normax.linen.WeightNorm(dense, name="wrapper")(x)
        if self.way == "two":
            return wrapped + normax.linen.WeightStandardization(dense, name="other")(x)
        return wrapped + dense(x)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return normax.linen.WeightNorm(nn.Dense(3), name="wrapper")(x), None


def test_flax_s_weight_norm_takes_no_weights_out():
    model = Net(nn.WeightNorm, {})
    variables = randomized(model.init(KEY, X))
    apply, new, folded, left = interop.fold_linen(model, variables, X)
    assert (folded, [path for path, _ in left]) == ((), ["wrapper", "norm"])
    np.testing.assert_array_equal(apply(new, X), model.apply(variables, X))


def doubled(params):
    return jax.tree.map(lambda value: 2 * jnp.tanh(value), params)


class Hard(nn.Module):
    """What reads or changes the weights behind a layer's back, or can only be traced in pieces."""

    way: str

    @nn.compact
    def __call__(self, x):
        norm = normax.linen.BatchNorm(True, name="norm")
        layer = nn.Dense(3, name="dense")
        wrapped = normax.linen.WeightNorm(layer, name="wrapper")
        if self.way == "outside":
            mapped = nn.map_variables(
                lambda module, x: module(x), "params", doubled, init=self.is_initializing()
            )
            return norm(mapped(wrapped, x))
        if self.way == "layer":
            mapped = nn.map_variables(nn.Dense, "params", doubled, init=self.is_initializing())
            return norm(mapped(3, name="mapped")(x))
        if self.way == "tied":
            return norm(wrapped(x)) @ layer.variables["params"]["kernel"].T
        if self.way == "promoted":
            return norm(nn.Dense(3, promote_dtype=rounded)(x))
        if self.way == "cond" and not self.is_initializing():
            return nn.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: -m(x), wrapped, x)
        if self.way == "reads" and not self.is_initializing():
            wrapped(x)
            scale = self.variables["params"]["wrapper"]["dense/kernel/scale"]
            return norm(wrapped(x)) * scale.sum()
        if self.way == "dilated":
            return norm(nn.Conv(3, (3,), input_dilation=2, padding=[(1, 1)])(x[None]))
        if self.way == "given":
            return norm(layer(x), scale=x[0], bias=x[1])
        if self.way == "keyword":
            norm = normax.linen.BatchNorm(name="other")
            return norm(use_running_average=True, x=layer(inputs=x))
        return norm(wrapped(x))


def rounded(*args, dtype=None, **options):
    first, *others = flax.linen.dtypes.promote_dtype(*args, dtype=dtype, **options)
    return [first, *(None if other is None else jnp.tanh(other) for other in others)]


HARD = ["outside", "layer", "tied", "promoted", "cond", "reads", "given", "dilated", "keyword"]


@pytest.mark.parametrize("way", HARD)
def test_outputs_are_equal_whatever_is_folded(way):
    model = Hard(way)
    variables = randomized(model.init(KEY, X))
    apply, new, folded, left = interop.fold_linen(model, variables, X)
    np.testing.assert_allclose(apply(new, X), model.apply(variables, X), rtol=1e-5, atol=1e-5)
    assert bool(folded) == (way in ("dilated", "keyword")), left


@pytest.mark.parametrize(
    ("way", "left"),
    [
        ("own", {"wrapper": "it is of a class of its own, or around more than a layer"}),
        ("scanned", {"steps/wrapper": "its variables are stacked"}),
        ("broadcast", {"steps/wrapper": "its weights are out of reach"}),
        ("shared", {"wrapper": "its layer is used without it too"}),
        ("two", dict.fromkeys(("wrapper", "other"), "its layer is used without it too")),
    ],
)
def test_what_is_not_one_weight_of_one_layer_is_left(way, left):
    model = Odd(way)
    variables = randomized(model.init(KEY, X))
    apply, new, folded, found = interop.fold_linen(model, variables, X)
    assert folded == ()
    assert dict(found) == left
    np.testing.assert_array_equal(apply(new, X), model.apply(variables, X))


def test_shapes_are_enough_to_fold():
    model = Net(normax.linen.WeightNorm, {})
    variables = randomized(model.init(KEY, X))
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    apply, new, folded, _ = interop.fold_linen(model, variables, shape)
    assert len(folded) == 2
    np.testing.assert_allclose(apply(new, X), model.apply(variables, X), rtol=1e-5, atol=1e-6)


def network(wrapper, layer, rngs):
    model = nnx.Sequential(wrapper(layer, rngs=rngs), normax.nnx.BatchNorm(4, rngs=rngs), nnx.tanh)
    params, rest = nnx.split_state(nnx.state(model), nnx.Param, ...)
    nnx.update(model, nnx.merge_state(randomized(params), rest))
    model.layers[1].mean[...] += 2
    return model


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("wrapper", NNX_WRAPPERS)
def test_wrapped_layers_of_nnx_become_plain_and_take_the_norm(wrapper, convolution):
    rngs = nnx.Rngs(0)
    layer = nnx.Conv(3, 4, (3, 3), rngs=rngs) if convolution else nnx.Linear(3, 4, rngs=rngs)
    model, x = network(wrapper, layer, rngs), IMAGE if convolution else X
    new, _, folded, left = interop.fold_nnx(model, x)
    path = "layers/0/layer_instance"
    assert folded == (("layers/0", path), ("layers/1", path))
    assert left == ()
    model.eval()
    np.testing.assert_allclose(new(x), model(x), rtol=1e-5, atol=1e-6)
    state = nnx.to_flat_state(nnx.state(new))
    assert {path[-1] for path, _ in state} == {"kernel", "bias"}
    graph, state = nnx.split(new)
    program = text(lambda state, x: nnx.merge(graph, state)(x), state, x)
    assert "sqrt" not in program
    assert "divide" not in program
    again, _, folded, left = interop.fold_nnx(new, x)
    assert (folded, left) == ((), ())
    np.testing.assert_array_equal(again(x), new(x))


class OddModel(nnx.Module):
    def __init__(self, way, rngs):
        self.way = way
        layer = nnx.Linear(3, 3, rngs=rngs)
        kind = nnx.WeightNorm if way == "Flax's" else normax.nnx.WeightNorm
        self.wrapper = kind(layer, use_scale=True, rngs=rngs)
        if way == "shared":
            self.other = layer
        if way == "wrapped":
            self.other = normax.nnx.WeightStandardization(self.wrapper, rngs=rngs)

    def __call__(self, x):
        if self.way == "idle":
            return x
        if self.way == "wrapped":
            return self.other(x)
        return self.wrapper(x) + (self.other(x) if self.way == "shared" else 0)


@pytest.mark.parametrize(
    ("way", "left"),
    [
        ("Flax's", {"wrapper": "it is of a class of its own, or around more than a layer"}),
        ("shared", {"wrapper": "its layer is used without it too"}),
        ("idle", {"wrapper": "it is not called"}),
    ],
)
def test_what_is_not_one_weight_of_one_layer_of_nnx_is_left(way, left):
    model = OddModel(way, nnx.Rngs(0))
    new, _, folded, found = interop.fold_nnx(model, X)
    assert folded == ()
    assert dict(found) == left
    model.eval()
    np.testing.assert_allclose(new(X), model(X), rtol=1e-6)


class HardModel(nnx.Module):
    def __init__(self, way, rngs):
        self.way = way
        options = {"promote_dtype": rounded_nnx} if way == "promoted" else {}
        self.layer = nnx.Linear(3, 3, **options, rngs=rngs)
        self.wrapper = normax.nnx.WeightNorm(nnx.Linear(3, 3, rngs=rngs), rngs=rngs)
        self.norm = normax.nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        if self.way == "changed":
            layer = nnx.clone(self.layer)
            layer.kernel[...] = jnp.tanh(layer.kernel[...])
            return self.norm(layer(x))
        if self.way == "tied":
            return self.norm(self.wrapper(x)) @ self.wrapper.layer_instance.kernel[...].T
        if self.way == "reads":
            return self.norm(self.wrapper(x)) * self.wrapper.scales["kernel",][...].sum()
        if self.way == "given":
            return self.norm(self.layer(x), scale=x[0])
        if self.way == "number":
            return self.norm(self.layer(x)) * self.norm.momentum
        return self.norm(self.layer(x))


def rounded_nnx(args, dtype=None, **options):
    return rounded(*args, dtype=dtype, **options)


@pytest.mark.parametrize("way", ["changed", "tied", "reads", "given", "number", "promoted"])
def test_outputs_are_equal_whatever_is_folded_of_nnx(way):
    model = HardModel(way, nnx.Rngs(0))
    model.norm.mean[...] += 2
    new, _, folded, _ = interop.fold_nnx(model, X)
    model.eval()
    np.testing.assert_allclose(new(X), model(X), rtol=1e-5, atol=1e-5)
    assert bool(folded) == (way == "number")


class Root(normax.nnx.WeightNorm):
    def __call__(self, x):
        return nnx.relu(super().__call__(x))


@pytest.mark.parametrize("kind", [Root, normax.nnx.WeightNorm])
def test_a_wrapper_that_is_the_model(kind):
    rngs = nnx.Rngs(0)
    inside = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), normax.nnx.BatchNorm(3, rngs=rngs))
    model = kind(inside, rngs=rngs)
    inside.layers[1].mean[...] += 2
    new, _, folded, left = interop.fold_nnx(model, X)
    model.eval()
    assert folded == ()
    assert [path for path, _ in left] == [""]
    np.testing.assert_allclose(new(X), model(X), rtol=1e-6)
    plain = normax.nnx.WeightNorm(nnx.Linear(3, 3, rngs=rngs), rngs=rngs)
    new, _, folded, left = interop.fold_nnx(plain, X)
    assert (folded, left) == ((("", "layer_instance"),), ())
    np.testing.assert_allclose(new(X), plain(X), rtol=1e-6)


def test_stacked_norms_of_nnx_are_left():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            def block(rngs):
                norm = normax.nnx.BatchNorm(3, rngs=rngs)
                return nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), norm)

            self.blocks = nnx.vmap(block)(rngs.split(2))

        def __call__(self, x):
            return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.blocks
            )

    model = Stack(nnx.Rngs(0))
    new, _, folded, left = interop.fold_nnx(model, X)
    assert (folded, [why for _, why in left]) == ((), ["its variables are stacked"])
    model.eval()
    np.testing.assert_allclose(new(X), model(X), rtol=1e-6)


def test_stacked_wrappers_of_nnx_are_left():
    class Deep(nnx.Module):
        def __init__(self, rngs):
            def block(rngs):
                layer = nnx.Linear(3, 3, rngs=rngs)
                return normax.nnx.WeightStandardization(layer, rngs=rngs)

            self.blocks = nnx.vmap(block)(rngs.split(2))

        def __call__(self, x):
            return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.blocks
            )

    model = Deep(nnx.Rngs(0))
    new, _, folded, left = interop.fold_nnx(model, X)
    assert folded == ()
    assert dict(left) == {"blocks": "its variables are stacked"}
    np.testing.assert_allclose(new(X), model(X), rtol=1e-6)


def test_baked_by_itself():
    layer = normax.nnx.WeightNorm(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    before = layer(X)
    assert not layer.is_plain
    layer.bake()
    assert layer.is_plain
    lengths = np.linalg.norm(np.asarray(layer.layer_instance.kernel[...], np.float64), axis=0)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)
    np.testing.assert_allclose(layer(X), before, rtol=1e-6)
