"""The shells: Flax's signatures and variable trees, and the functions' results bit for bit."""

import inspect

import chex
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normax
import normax.linen
import normax.nnx

NAMES = (
    "BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "WeightNorm", "SpectralNorm",
)  # fmt: skip
KEY = jax.random.key(0)
UNIFORM = jax.nn.initializers.uniform(1.0)

# name, arguments of both shells, the function of (x, scale, bias)
NORMALIZERS = [
    ("LayerNorm", {}, normax.layer_norm),
    ("RMSNorm", {}, lambda x, scale, bias, **kw: normax.rms_norm(x, scale, **kw)),
    ("GroupNorm", {"num_groups": 2}, lambda *a, **kw: normax.group_norm(*a, num_groups=2, **kw)),
    ("InstanceNorm", {}, normax.instance_norm),
    (
        "LayerNorm",
        {"reduction_axes": (1, 2), "epsilon": 1e-3},
        lambda *a, **kw: normax.layer_norm(*a, reduction_axes=(1, 2), epsilon=1e-3, **kw),
    ),
]


def signature(module):
    """Returns the parameters of a constructor; nnx hides them at the class."""
    parameters = dict(inspect.signature(module.__init__).parameters)
    return {k: p for k, p in parameters.items() if k not in ("self", "parent", "name")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("ours", "theirs"), [(normax.linen, flax.linen), (normax.nnx, nnx)], ids=["linen", "nnx"]
)
def test_takes_every_argument_of_flax(ours, theirs, name):
    there = signature(getattr(theirs, name))
    here = signature(getattr(ours, name))
    for argument, parameter in there.items():
        assert argument in here
        assert here[argument].default == parameter.default, argument
        assert here[argument].kind == parameter.kind, argument
    ordered = [k for k, p in there.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert list(here)[: len(ordered)] == ordered


@pytest.mark.parametrize("name", NAMES)
def test_linen_and_nnx_take_the_same_options(name):
    linen = set(signature(getattr(normax.linen, name)))
    nnx_only = {"num_features", "rngs", "promote_dtype", "bias_metadata", "scale_metadata"}
    both = set(signature(getattr(normax.nnx, name))) - nnx_only
    assert linen == both - {"update_stats"}, linen ^ both


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shells", [normax.linen, normax.nnx], ids=["linen", "nnx"])
def test_documents_every_option(shells, name):
    module = getattr(shells, name)
    for argument in signature(module):
        assert f"{argument}:" in module.__doc__, argument


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("row", NORMALIZERS, ids=lambda row: row[0])
def test_shells_are_the_function_bit_for_bit(row, x_dtype, dtype, param_dtype):
    name, options, function = row
    options = {**options, "dtype": dtype, "param_dtype": param_dtype, "scale_init": UNIFORM}
    x = (3 * jax.random.normal(KEY, (2, 5, 4)) + 1).astype(x_dtype)
    mask = jax.random.bernoulli(KEY, 0.8, (2, 5, 1))
    linen = getattr(normax.linen, name)(**options)
    params = linen.init(jax.random.key(1), x)["params"]
    module = getattr(normax.nnx, name)(4, **options, rngs=nnx.Rngs(0))
    module.scale[...] = params["scale"]
    with jax.numpy_dtype_promotion("standard"):  # which Flax needs
        theirs = getattr(flax.linen, name)(**options).init(jax.random.key(1), x)["params"]
    chex.assert_trees_all_equal(params, theirs)
    with jax.numpy_dtype_promotion("standard"):
        expected_dtype = dtype or jnp.result_type(x_dtype, param_dtype)
    for kwargs in ({}, {"mask": mask}):
        y = linen.apply({"params": params}, x, **kwargs)
        assert y.dtype == expected_dtype
        np.testing.assert_array_equal(y, module(x, **kwargs))
        pure = function(x, params["scale"], params.get("bias"), dtype=expected_dtype, **kwargs)
        np.testing.assert_array_equal(y, pure)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("momentum", [0.9, None])
def test_batch_norm_shells_are_the_function_bit_for_bit(momentum, x_dtype, dtype):
    linen = normax.linen.BatchNorm(momentum=momentum, dtype=dtype)
    module = normax.nnx.BatchNorm(3, momentum=momentum, dtype=dtype, rngs=nnx.Rngs(0))
    xs = (3 * jax.random.normal(KEY, (4, 8, 3)) + 100).astype(x_dtype)
    variables = linen.init(KEY, xs[0], use_running_average=False)
    params, stats = variables["params"], normax.RunningStats.create(3)
    assert ("count" in variables["batch_stats"]) == (momentum is None)
    pure_dtype = dtype or jnp.float32
    for x in xs:
        y, new = linen.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        variables = {**variables, **new}
        z, stats = normax.batch_norm(
            x, stats, **params, use_running_average=False, momentum=momentum, dtype=pure_dtype
        )
        assert y.dtype == pure_dtype
        np.testing.assert_array_equal(y, z)
        np.testing.assert_array_equal(y, module(x))
        for name, leaf in new["batch_stats"].items():
            np.testing.assert_array_equal(leaf, getattr(stats, name))
            np.testing.assert_array_equal(leaf, getattr(module, name)[...])
    module.eval()
    y = linen.apply(variables, xs[0], use_running_average=True)
    z, _ = normax.batch_norm(xs[0], stats, **params, use_running_average=True, dtype=pure_dtype)
    np.testing.assert_array_equal(y, z)
    np.testing.assert_array_equal(y, module(xs[0]))


FUNCTIONS = {name: function for name, options, function in NORMALIZERS if len(options) < 2}


MODES = [("BatchNorm", True), ("BatchNorm", False), *((name, True) for name in FUNCTIONS)]


@pytest.mark.parametrize(("name", "train"), MODES)
def test_an_activation_is_that_of_the_function_and_the_same_as_one_behind(name, train):
    x = 3 * jax.random.normal(KEY, (6, 5, 4)) + 1
    options = {"num_groups": 2} if name == "GroupNorm" else {}
    mode = {"use_running_average": not train} if name == "BatchNorm" else {}

    def function(params, activation):
        scale, bias, stats = params["scale"], params.get("bias"), normax.RunningStats.create(4)
        if name == "BatchNorm":
            return normax.batch_norm(x, stats, scale, bias, **mode, activation=activation)[0]
        return FUNCTIONS[name](x, scale, bias, activation=activation)

    linen = getattr(normax.linen, name)(**options, activation=jax.nn.silu)
    variables = linen.init(KEY, x, **mode)
    start = getattr(normax.linen, name)(**options).init_with_output(KEY, x, **mode)[0]
    ours = linen.init_with_output(KEY, x, **mode)[0]
    np.testing.assert_allclose(ours, jax.nn.silu(start), rtol=1e-6, atol=1e-6)
    module = getattr(normax.nnx, name)(4, **options, activation=jax.nn.silu, rngs=nnx.Rngs(0))
    params = jax.tree.map(lambda leaf: leaf + jnp.linspace(-1, 1, 4), variables["params"])
    graph, _, rest = nnx.split(module, nnx.Param, ...)
    runs = [
        lambda p: linen.apply({**variables, "params": p}, x, **mode, mutable=["batch_stats"])[0],
        lambda p: nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, p)), rest, copy=True)(
            x, **mode
        ),
        lambda p: function(p, jax.nn.silu),
        lambda p: jax.nn.silu(function(p, None)),
    ]
    y, *others, behind = (run(params) for run in runs)
    for other in others:
        np.testing.assert_array_equal(y, other)
    np.testing.assert_allclose(y, behind, rtol=1e-6, atol=1e-6)
    slope, *others = (jax.grad(lambda p, run=run: jnp.sum(run(p) ** 2))(params) for run in runs)
    for other in others:
        chex.assert_trees_all_close(slope, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"])
def test_flax_checkpoints_load_and_agree(name):
    options = {"num_groups": 2} if name == "GroupNorm" else {}
    options |= {"use_running_average": True} if name == "BatchNorm" else {}
    x = jax.random.normal(KEY, (4, 6, 4))
    theirs = getattr(flax.linen, name)(**options, use_fast_variance=False)
    ours = getattr(normax.linen, name)(**options)
    variables = theirs.init(KEY, x)
    assert jax.tree.structure(variables) == jax.tree.structure(ours.init(KEY, x))
    y = ours.apply(variables, x)
    np.testing.assert_allclose(y, theirs.apply(variables, x), atol=2e-6)


def test_n_training_steps_give_deviation_one_at_inference():
    linen = normax.linen.BatchNorm(momentum=0.9)
    module = normax.nnx.BatchNorm(2, momentum=0.9, rngs=nnx.Rngs(0))
    stats = normax.RunningStats.create(2)
    xs = 7 + 3 * jax.random.normal(KEY, (200, 256, 2))
    variables = linen.init(KEY, xs[0], use_running_average=False)
    for x in xs:
        _, new = linen.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        variables = {**variables, **new}
        module(x)
        _, stats = normax.batch_norm(x, stats, use_running_average=False, momentum=0.9)
    module.eval()
    everything = xs.reshape(-1, 2)
    for y in (
        linen.apply(variables, everything, use_running_average=True),
        module(everything),
        normax.batch_norm(everything, stats, use_running_average=True)[0],
    ):
        np.testing.assert_allclose(y.std(0), 1, atol=0.03)
        np.testing.assert_allclose(y.mean(0), 0, atol=0.03)


@pytest.mark.parametrize("shells", [normax.linen, normax.nnx], ids=["linen", "nnx"])
def test_running_statistics_have_initializers(shells):
    options = {
        "mean_init": jax.nn.initializers.constant(2.0),
        "var_init": jax.nn.initializers.constant(4.0),
        "use_running_average": True,
        "epsilon": 0.0,
    }
    x = jnp.array([[2.0], [4.0]])
    if shells is normax.linen:
        y, _ = shells.BatchNorm(**options).init_with_output(KEY, x)
    else:
        y = shells.BatchNorm(1, **options, rngs=nnx.Rngs(0))(x)
    np.testing.assert_allclose(y, [[0.0], [1.0]])


def test_random_initializers_of_statistics_draw_from_their_own_keys():
    norm = normax.linen.BatchNorm(use_running_average=True, mean_init=UNIFORM, var_init=UNIFORM)
    stats = norm.init(KEY, jnp.ones((2, 5)))["batch_stats"]
    assert len(np.unique(np.concatenate([stats["mean"], stats["var"]]))) == 10
    module = normax.nnx.BatchNorm(5, mean_init=UNIFORM, var_init=UNIFORM, rngs=nnx.Rngs(0))
    assert len(np.unique(np.concatenate([module.mean[...], module.var[...]]))) == 10


def test_initialization_takes_one_value_and_no_axis():
    norm = normax.linen.BatchNorm(use_running_average=False, axis_name="batch")
    variables = norm.init(KEY, jnp.ones((1, 3)))
    np.testing.assert_array_equal(variables["batch_stats"]["var"], jnp.ones(3))
    with pytest.raises(ValueError, match="more than one value per feature"):
        normax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))(jnp.ones((1, 3)))


def test_several_feature_axes():
    x = jax.random.normal(KEY, (6, 3, 2))
    module = normax.nnx.BatchNorm((3, 2), axis=(1, 2), rngs=nnx.Rngs(0))
    linen = normax.linen.BatchNorm(axis=(-1, 1), use_running_average=False)
    variables = linen.init(KEY, x)
    assert variables["params"]["scale"].shape == (3, 2)
    y, _ = linen.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, module(x))


def test_the_mode_of_nnx_comes_from_the_call_the_constructor_or_a_view():
    module = normax.nnx.BatchNorm(2, use_running_average=None, rngs=nnx.Rngs(0))
    x = jnp.arange(8.0).reshape(4, 2)
    with pytest.raises(ValueError, match="use_running_average"):
        module(x)
    np.testing.assert_allclose(nnx.view(module, use_running_average=True)(x), x, rtol=1e-5)
    module.train()
    assert float(jnp.abs(module(x, use_running_average=True) - x).max()) < 1e-4
    assert float(jnp.abs(module(x).mean())) < 1e-6


def test_shells_work_in_jit_grad_and_scan_over_layers():
    class Stack(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            def layer(module, x, _):
                return normax.linen.BatchNorm(use_running_average=False)(x), None

            scan = flax.linen.scan(
                layer,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=3,
            )
            return scan(self, x, None)[0]

    x = jax.random.normal(KEY, (8, 2))
    variables = Stack().init(KEY, x)

    @jax.jit
    def loss(params):
        y, new = Stack().apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(y**3), new

    grads, new = jax.grad(loss, has_aux=True)(variables["params"])
    assert jax.tree.leaves(new)[0].shape == (3, 2)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_remat_moves_the_state_once():
    class Block(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            return normax.linen.BatchNorm(use_running_average=False, momentum=0.5)(x)

    x = jax.random.normal(KEY, (8, 2)) + 4
    variables = flax.linen.remat(Block)().init(KEY, x)

    def loss(params, model):
        y, new = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(y**3), new

    grads, new = jax.grad(loss, has_aux=True)(variables["params"], flax.linen.remat(Block)())
    plain, once = jax.grad(loss, has_aux=True)(variables["params"], Block())
    chex.assert_trees_all_equal(new, once)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, plain)


@pytest.mark.parametrize("wrap", [normax.nnx.WeightNorm, normax.nnx.SpectralNorm])
def test_a_wrapped_layer_is_read_only_at_inference(wrap):
    layer = wrap(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    layer.eval()
    x = jax.random.normal(KEY, (4, 3))
    kernel, expected = np.asarray(layer.layer_instance.kernel[...]), layer(x)
    close = lambda y: np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    close(jax.jit(lambda x: layer(x))(x))
    close(jax.vmap(lambda x: layer(x))(x))
    close(jax.checkpoint(lambda x: layer(x))(x))
    close(jax.lax.scan(lambda carry, x: (carry, layer(x)), None, x)[1])
    jax.grad(lambda x: layer(x).sum())(x)
    np.testing.assert_array_equal(layer.layer_instance.kernel[...], kernel)


def test_other_state_of_a_wrapped_layer_moves():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 2, rngs=rngs)
            self.norm = normax.nnx.BatchNorm(2, momentum=0.5, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.linear(x))

    inner = Layer(nnx.Rngs(0))
    layer = normax.nnx.WeightNorm(inner, rngs=nnx.Rngs(1))
    layer(jax.random.normal(KEY, (4, 3)) + 5)
    assert np.asarray(inner.norm.mean[...]).any()


def test_inference_needs_no_count():
    stats = {"mean": jnp.full(2, 7.0), "var": jnp.full(2, 9.0)}
    norm = normax.linen.BatchNorm(
        use_running_average=True, momentum=None, use_scale=False, use_bias=False
    )
    y = norm.apply({"batch_stats": stats}, jnp.ones((4, 2)))
    np.testing.assert_allclose(y, jnp.full((4, 2), -2.0), rtol=1e-5)


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm", "RMSNorm", "InstanceNorm", "EvoNormB0"])
def test_nnx_tabulates(name):
    module = getattr(normax.nnx, name)(3, rngs=nnx.Rngs(0))
    table = nnx.tabulate(module, jnp.ones((2, 4, 3)))
    assert name in table


def test_modules_made_alike_are_traced_once():
    traced = []

    @nnx.jit
    def run(module, x):
        traced.append(None)
        return module(x)

    for seed in range(3):
        init = nnx.initializers.constant(2.0)
        run(normax.nnx.LayerNorm(3, scale_init=init, rngs=nnx.Rngs(seed)), jnp.ones((2, 3)))
    assert len(traced) == 1


def test_a_wrapper_writes_nothing_where_no_state_moves():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 2, rngs=rngs)
            self.norm = normax.nnx.BatchNorm(2, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.linear(x))

    layer = normax.nnx.WeightNorm(Layer(nnx.Rngs(0)), rngs=nnx.Rngs(1))
    layer.eval()
    x = jax.random.normal(KEY, (4, 3))
    np.testing.assert_allclose(jax.jit(lambda x: layer(x))(x), layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_a_layer_can_freeze_its_statistics_and_its_parameters(library):
    x = 5 + jax.random.normal(KEY, (8, 3))
    frozen = {"freeze_stats": True, "freeze_affine": True}
    if library == "linen":
        norm = normax.linen.BatchNorm(use_running_average=False, **frozen)
        variables = norm.init(KEY, x)

        def run(params):
            return norm.apply({**variables, "params": params}, x, mutable=["batch_stats"])

        y, new = run(variables["params"])
        chex.assert_trees_all_equal(new["batch_stats"], variables["batch_stats"])
        grads = jax.grad(lambda params: run(params)[0].sum())(variables["params"])
    else:
        norm = normax.nnx.BatchNorm(3, **frozen, rngs=nnx.Rngs(0))
        norm.train()
        y = norm(x)
        np.testing.assert_array_equal(norm.mean[...], jnp.zeros(3))
        grads = nnx.grad(lambda norm: norm(x).sum())(norm)
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "InstanceNorm"])
def test_several_feature_axes_may_be_one_number_as_in_flax(name):
    x = jax.random.normal(KEY, (2, 3, 4) if name != "InstanceNorm" else (2, 5, 3, 4))
    axes = {"feature_axes": (-2, -1)} | (
        {} if name == "InstanceNorm" else {"reduction_axes": (1, 2)}
    )
    ours = getattr(normax.nnx, name)(12, **axes, rngs=nnx.Rngs(0))
    theirs = getattr(nnx, name)(12, **axes, rngs=nnx.Rngs(0))
    ours.scale[...] = theirs.scale[...] = jnp.arange(12.0)
    with jax.numpy_rank_promotion("allow"):
        np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"])
def test_nnx_modules_have_flax_s_variables(name):
    make = lambda library: getattr(library, name)(32, rngs=nnx.Rngs(0))
    ours, theirs = (nnx.state(make(library)) for library in (normax.nnx, nnx))
    variables = lambda state: {
        path: (type(variable), variable.shape, variable.dtype)
        for path, variable in nnx.to_flat_state(state)
    }
    assert variables(ours) == variables(theirs)
    model = make(normax.nnx)
    nnx.update(model, theirs)
    chex.assert_trees_all_equal(nnx.state(model), theirs)


def test_statistics_carry_sharding_metadata_like_parameters():
    spec = jax.sharding.PartitionSpec("features")
    zeros, ones = flax.linen.initializers.zeros, flax.linen.initializers.ones
    starts = {"scale_init": ones, "bias_init": zeros, "mean_init": zeros, "var_init": ones}

    def annotated(room):
        return {name: room.with_partitioning(f, ("features",)) for name, f in starts.items()}

    x = jax.random.normal(KEY, (4, 16))
    layer = normax.linen.BatchNorm(False, **annotated(flax.linen))
    variables = layer.init(KEY, x)
    _, updates = layer.apply(variables, x, mutable=["batch_stats"])
    specs = flax.linen.get_partition_spec({**variables, **updates})
    assert jax.tree.leaves(specs) == [spec] * 4
    mesh = jax.make_mesh((8,), ("features",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        norm = normax.nnx.BatchNorm(16, **annotated(nnx), rngs=nnx.Rngs(0))
        norm(x, use_running_average=False)
    for variable in (norm.mean, norm.var, norm.scale, norm.bias):
        assert variable[...].sharding.spec == spec
        assert variable.get_metadata("out_sharding") == ("features",)


SCALED = ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "FilterResponseNorm"]


@pytest.mark.parametrize("name", ["BatchNorm", "BatchRenorm", *SCALED])
def test_a_call_may_bring_its_own_scale_and_bias(name):
    x = jax.random.normal(KEY, (4, 5, 32))
    given = {"scale": jnp.arange(32.0), "bias": jnp.arange(32.0)[::-1]}
    if name == "RMSNorm":
        given.pop("bias")
    mode = {"use_running_average": False} if name.startswith("Batch") else {}
    layer = getattr(normax.linen, name)(**mode)
    variables = layer.init(KEY, x)
    held = {**variables, "params": {**variables["params"], **given}}
    apply = lambda variables, **given: layer.apply(variables, x, mutable=["batch_stats"], **given)[
        0
    ]
    expected = apply(held)
    np.testing.assert_array_equal(apply(variables, **given), expected)
    assert np.abs(apply(variables, scale=None) - expected).max() > 1
    created = layer.init(KEY, x, **given)
    assert not set(created.get("params", {})) & set(given)
    norm = getattr(normax.nnx, name)(32, rngs=nnx.Rngs(0))
    mode = {"use_running_average": False} if name.startswith("Batch") else {}
    np.testing.assert_array_equal(norm(x, **mode, **given), expected)
    bare = getattr(normax.nnx, name)(32, use_scale=False, rngs=nnx.Rngs(0))
    with_scale = bare(x, **mode, scale=given["scale"])
    np.testing.assert_array_equal(with_scale, apply(variables, scale=given["scale"]))
    slope = jax.grad(lambda scale: apply(variables, **{**given, "scale": scale}).sum())(
        given["scale"]
    )
    assert jnp.isfinite(slope).all()
    assert jnp.abs(slope).max() > 0
