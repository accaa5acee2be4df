"""Variables from PyTorch, Keras and Flax, and back: the same outputs, and the same training."""

import os

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import normax.linen
import normax.nnx
from normax import interop

os.environ.setdefault("KERAS_BACKEND", "jax")
KEY = jax.random.key(0)
PADDED = ((1, 1), (1, 1))
RESIDUAL = {
    "conv1": "conv1",
    "conv2": "conv2",
    "fc": "fc",
    "norm1": "bn1",
    "norm2": "bn2",
    "shortcut": "downsample.0",
    "norm3": "downsample.1",
}
BLOCK = {
    "attention": "self_attn",
    "dense1": "linear1",
    "dense2": "linear2",
    "norm1": "norm1",
    "norm2": "norm2",
}


@pytest.fixture
def torch():
    module = pytest.importorskip("torch")
    module.manual_seed(0)
    return module


@pytest.fixture
def keras():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        module = pytest.importorskip("keras")
        module.utils.set_random_seed(0)
        yield module


class Residual(nn.Module):
    """A residual block and a classifier."""

    options: dict

    @nn.compact
    def __call__(self, x, train):
        def norm(name):
            return normax.linen.BatchNorm(not train, **self.options, name=name)

        y = nn.Conv(8, (3, 3), 2, padding=PADDED, use_bias=False, name="conv1")(x)
        y = nn.relu(norm("norm1")(y))
        y = nn.Conv(8, (3, 3), padding=PADDED, feature_group_count=2, use_bias=False, name="conv2")(
            y
        )
        short = nn.Conv(8, (1, 1), 2, padding="VALID", use_bias=False, name="shortcut")(x)
        y = nn.relu(norm("norm2")(y) + norm("norm3")(short))
        return nn.Dense(5, name="fc")(y.mean((1, 2)))


class Block(nn.Module):
    """A transformer's block, normalized first."""

    options: dict

    @nn.compact
    def __call__(self, x, train):
        y = normax.linen.LayerNorm(**self.options, name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(y)
        y = normax.linen.LayerNorm(**self.options, name="norm2")(x)
        return x + nn.Dense(16, name="dense2")(nn.relu(nn.Dense(32, name="dense1")(y)))


def torch_residual(torch):
    """Returns the block in PyTorch, with statistics that are not those of the start."""
    conv, norm = torch.nn.Conv2d, torch.nn.BatchNorm2d

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = conv(3, 8, 3, 2, 1, bias=False), norm(8)
            self.conv2, self.bn2 = conv(8, 8, 3, 1, 1, groups=2, bias=False), norm(8)
            self.downsample = torch.nn.Sequential(conv(3, 8, 1, 2, bias=False), norm(8))
            self.fc = torch.nn.Linear(8, 5)

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            y = torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))
            return self.fc(y.mean((2, 3)))

    net = Net()
    for name, value in net.state_dict().items():
        if "running" in name or ".bn" in name:
            value.uniform_(0.5, 1.5)
    return net


def torch_block(torch):
    layer = torch.nn.TransformerEncoderLayer(
        16, 4, 32, dropout=0.0, batch_first=True, norm_first=True
    )
    for value in layer.state_dict().values():
        if value.ndim == 1:
            value.uniform_(0.5, 1.5)
    return layer


def train_torch(torch, net, x, target):
    """Takes ten steps of gradient descent."""
    net.train()
    tx = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(10):
        tx.zero_grad()
        ((net(x) - target) ** 2).mean().backward()
        tx.step()


def train_flax(model, variables, x, target):
    """Takes ten steps of gradient descent; returns the new variables."""
    tx = optax.sgd(0.1)

    def objective(params, rest):
        y, rest = model.apply({"params": params, **rest}, x, train=True, mutable=list(rest))
        return jnp.mean((y - target) ** 2), rest

    @jax.jit
    def step(params, rest):
        grads, rest = jax.grad(objective, has_aux=True)(params, rest)
        updates, _ = tx.update(grads, tx.init(params))
        return optax.apply_updates(params, updates), rest

    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    for _ in range(10):
        params, rest = step(params, rest)
    return {"params": params, **rest}


def from_channels_first(x):
    return jnp.asarray(np.moveaxis(x.numpy(), 1, -1)) if x.ndim == 4 else jnp.asarray(x.numpy())


def like_torch(torch, net, layer, model, names, shape, target):
    """Holds outputs, ten training steps, and the way back."""
    x, target = torch.randn(shape), torch.randn(target)
    ours, aim = from_channels_first(x), from_channels_first(target)
    model = model(interop.options_of(layer))
    variables = model.init(KEY, ours, train=False)
    net.eval()
    variables, report = interop.from_torch(net.state_dict(), variables, names=names)
    assert not report.missing + report.unused + report.mismatched
    with torch.no_grad():
        expected = net(x).numpy()
    np.testing.assert_allclose(model.apply(variables, ours, train=False), expected, atol=1e-5)

    before = {key: value.clone().numpy() for key, value in net.state_dict().items()}
    back, _ = interop.to_torch(variables, net.state_dict(), names=names)
    for key, value in before.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)

    train_torch(torch, net, x, target)
    variables = train_flax(model, variables, ours, aim)
    trained, _ = interop.to_torch(variables, net.state_dict(), names=names)
    moved = 0
    for key, value in net.state_dict().items():
        if "num_batches" not in key:
            np.testing.assert_allclose(trained[key], value, rtol=1e-5, atol=1e-5, err_msg=key)
            moved += np.abs(value.numpy() - before[key]).max() > 1e-2
    assert moved > 5
    net.eval()
    with torch.no_grad():
        expected = net(x).numpy()
    np.testing.assert_allclose(model.apply(variables, ours, train=False), expected, atol=1e-5)


def test_a_residual_network_of_torch(torch):
    net = torch_residual(torch)
    like_torch(torch, net, net.bn1, Residual, RESIDUAL, (4, 3, 8, 8), (4, 5))


def test_a_transformer_block_of_torch(torch):
    net = torch_block(torch)
    like_torch(torch, net, net.norm1, Block, BLOCK, (2, 6, 16), (2, 6, 16))


def test_a_safetensors_file(torch, tmp_path):
    from safetensors.numpy import save_file

    net = torch_residual(torch).eval()
    path = tmp_path / "net.safetensors"
    save_file({key: value.numpy() for key, value in net.state_dict().items()}, path)
    model = Residual(interop.options_of(net.bn1))
    like = model.init(KEY, jnp.ones((1, 8, 8, 3)), train=False)
    ours, _ = interop.from_torch(path, like, names=RESIDUAL)
    direct, _ = interop.from_torch(net.state_dict(), like, names=RESIDUAL)
    chex.assert_trees_all_equal(ours, direct)
    back, _ = interop.to_torch(ours, str(path), names=RESIDUAL)
    np.testing.assert_array_equal(back["conv1.weight"], net.conv1.weight.detach().numpy())


def test_a_transposed_convolution_by_its_definition():
    # PyTorch's: each entry of the input adds the window of its channel to the output.
    kernel = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)  # in, out, window
    x = np.random.default_rng(1).normal(size=(1, 5, 2)).astype(np.float32)
    expected = np.zeros((1, 8, 3))
    for place in range(5):
        expected[:, place : place + 4] += np.einsum("bi,iow->bwo", x[:, place], kernel)
    model = nn.ConvTranspose(3, (4,), padding="VALID", use_bias=False)
    like = model.init(KEY, x)
    variables, _ = interop.from_torch({"weight": kernel}, like, transposed=iter([""]))
    np.testing.assert_allclose(model.apply(variables, x), expected, rtol=1e-5, atol=1e-5)
    back, _ = interop.to_torch(variables, {"weight": kernel}, transposed=[""])
    np.testing.assert_array_equal(back["weight"], kernel)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_transposed_convolutions_of_torch(torch, rank):
    layer = getattr(torch.nn, f"ConvTranspose{rank}d")(3, 4, 3, stride=2)
    x = torch.randn((2, 3, *range(4, 4 + rank)))
    model = nn.ConvTranspose(4, (3,) * rank, (2,) * rank, padding="VALID")
    ours = jnp.asarray(np.moveaxis(x.numpy(), 1, -1))
    variables, _ = interop.from_torch(layer.state_dict(), model.init(KEY, ours), transposed=[""])
    with torch.no_grad():
        expected = np.moveaxis(layer(x).numpy(), 1, -1)
    np.testing.assert_allclose(model.apply(variables, ours), expected, atol=1e-5)
    back, _ = interop.to_torch(variables, layer.state_dict(), transposed=[""])
    np.testing.assert_array_equal(back["weight"], layer.weight.detach().numpy())


def test_two_collections_with_a_variable_at_one_path():
    one = {"params": {"a": {"mean": np.zeros(3)}}, "batch_stats": {"a": {"mean": np.ones(3)}}}
    with pytest.raises(ValueError, match=r"from_flax: expected variables of one name each.*a/mean"):
        interop.from_flax(one, one)


def test_what_is_flattened_and_embedded(torch):
    fc = torch.nn.Linear(2 * 3 * 4, 5)
    image = torch.randn(7, 2, 3, 4)
    ours = jnp.asarray(np.moveaxis(image.numpy(), 1, -1)).reshape(7, -1)
    like = {"params": {"fc": nn.Dense(5).init(KEY, ours)["params"]}}
    state_dict = {f"fc.{key}": value for key, value in fc.state_dict().items()}
    variables, _ = interop.from_torch(state_dict, like, flattened={"fc": (2, 3, 4)})
    with torch.no_grad():
        expected = fc(image.flatten(1)).numpy()
    y = nn.Dense(5).apply({"params": variables["params"]["fc"]}, ours)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    back, _ = interop.to_torch(variables, state_dict, flattened={"fc": (2, 3, 4)})
    np.testing.assert_array_equal(back["fc.weight"], fc.weight.detach().numpy())

    table = torch.nn.Embedding(6, 3).to(torch.bfloat16)
    like = nn.Embed(6, 3, param_dtype=jnp.bfloat16).init(KEY, jnp.arange(2))
    variables, _ = interop.from_torch(table.state_dict(), like)
    assert variables["params"]["embedding"].dtype == jnp.bfloat16
    expected = table.weight.detach().float().numpy()
    np.testing.assert_array_equal(variables["params"]["embedding"].astype(np.float32), expected)


def test_a_module_of_nnx_takes_what_linen_takes(torch):
    class Net(nnx.Module):
        def __init__(self, options, rngs):
            self.conv1 = nnx.Conv(3, 8, (3, 3), 2, padding=PADDED, use_bias=False, rngs=rngs)
            self.bn1 = normax.nnx.BatchNorm(8, **options, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.bn1(self.conv1(x)))

    net = torch_residual(torch).eval()
    x = torch.randn(4, 3, 8, 8)
    ours = Net(interop.options_of(net.bn1), nnx.Rngs(0))
    state, report = interop.from_torch(net.state_dict(), nnx.state(ours), strict=False)
    assert {key for _, key in report.matched} == {
        *("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var")
    }
    assert not report.missing
    assert "fc.weight" in report.unused
    nnx.update(ours, state)
    ours.eval()
    with torch.no_grad():
        expected = np.moveaxis(net.bn1(net.conv1(x)).numpy(), 1, -1)
    np.testing.assert_allclose(ours(from_channels_first(x)), expected, atol=1e-5)


LAYERS = [
    ("BatchNorm2d(3, eps=1e-3, momentum=0.3)", "BatchNorm"),
    ("BatchNorm1d(3, momentum=1.0, affine=False)", "BatchNorm"),
    ("InstanceNorm2d(3, affine=True)", "InstanceNorm"),
    ("GroupNorm(3, 6, eps=1e-3)", "GroupNorm"),
    ("LayerNorm((4, 5), bias=False)", "LayerNorm"),
    ("LayerNorm(5, elementwise_affine=False)", "LayerNorm"),
    ("RMSNorm(5)", "RMSNorm"),
]


@pytest.mark.parametrize(("layer", "name"), LAYERS)
def test_options_of_layers_of_torch(torch, layer, name):
    theirs = eval(f"torch.nn.{layer}", {"torch": torch})
    shape = {"LayerNorm": (2, 4, 5), "RMSNorm": (2, 4, 5), "GroupNorm": (2, 6, 4, 4)}
    shape = shape.get(name, (2, 3, 4, 4) if "2d" in layer else (2, 3, 4))
    x = torch.randn(shape) * 2 + 1
    features_last = name not in ("LayerNorm", "RMSNorm")
    move = (lambda a: np.moveaxis(a, 1, -1)) if features_last else (lambda a: a)
    ours = jnp.asarray(move(x.numpy()))
    options = interop.options_of(theirs)
    model = getattr(normax.linen, name)(**options)
    mode = {"use_running_average": False} if name == "BatchNorm" else {}
    variables = model.init(KEY, ours, **mode)
    y, new = model.apply(variables, ours, **mode, mutable=["batch_stats"])
    with torch.no_grad():
        expected = move(theirs.train()(x).numpy())
    np.testing.assert_allclose(y, expected, atol=1e-5)
    if mode:
        np.testing.assert_allclose(new["batch_stats"]["mean"], theirs.running_mean, atol=1e-5)
        np.testing.assert_allclose(new["batch_stats"]["var"], theirs.running_var, rtol=1e-5)


def test_options_that_normax_has_not_are_refused(torch, keras):
    with pytest.raises(ValueError, match="expected a BatchNorm with a momentum, got None"):
        interop.options_of(torch.nn.BatchNorm1d(3, momentum=None))
    with pytest.warns(UserWarning, match="deprecated"):
        scaled = keras.layers.LayerNormalization(rms_scaling=True)
    with pytest.raises(ValueError, match="LayerNormalization without rms_scaling, got one with"):
        interop.options_of(scaled)
    frozen = keras.layers.BatchNormalization(trainable=False)
    assert interop.options_of(frozen)["freeze_stats"]
    assert "freeze_stats" not in interop.options_of(keras.layers.BatchNormalization())


def keras_residual(keras):
    layers = keras.layers
    image = keras.Input((8, 8, 3))

    def norm(x, name):
        start = keras.initializers.RandomUniform(0.5, 1.5)
        return layers.BatchNormalization(
            moving_mean_initializer=start, moving_variance_initializer=start, name=name
        )(x)

    y = layers.ZeroPadding2D(1)(image)
    y = norm(layers.Conv2D(8, 3, 2, use_bias=False, name="conv1")(y), "norm1")
    y = layers.Conv2D(8, 3, padding="same", groups=2, use_bias=False, name="conv2")(
        layers.ReLU()(y)
    )
    short = layers.Conv2D(8, 1, 2, use_bias=False, name="shortcut")(image)
    y = layers.ReLU()(norm(y, "norm2") + norm(short, "norm3"))
    y = layers.GlobalAveragePooling2D()(y)
    return keras.Model(image, layers.Dense(5, name="fc")(y))


def keras_block(keras):
    layers = keras.layers
    x = keras.Input((6, 16))
    y = layers.LayerNormalization(name="norm1")(x)
    z = x + layers.MultiHeadAttention(4, 4, name="attention")(y, y)
    y = layers.LayerNormalization(name="norm2")(z)
    y = layers.Dense(16, name="dense2")(layers.Dense(32, "relu", name="dense1")(y))
    return keras.Model(x, z + y)


@pytest.mark.parametrize(
    ("build", "layer", "model", "shape", "target"),
    [
        (keras_residual, "norm1", Residual, (4, 8, 8, 3), (4, 5)),
        (keras_block, "norm1", Block, (2, 6, 16), (2, 6, 16)),
    ],
    ids=["residual", "transformer"],
)
def test_models_of_keras(keras, build, layer, model, shape, target):
    net = build(keras)
    options = {**interop.options_of(net.get_layer(layer))}
    model = model({key: options[key] for key in options if "axes" not in key and key != "axis"})
    x, aim = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate((shape, target)))
    variables = model.init(KEY, x, train=False)
    variables, report = interop.from_keras(net, variables)
    assert len(report.matched) == len(net.weights)
    expected = np.asarray(net(x, training=False))
    np.testing.assert_allclose(model.apply(variables, x, train=False), expected, atol=1e-5)

    back, _ = interop.to_keras(variables, net)
    for weight in net.weights:
        np.testing.assert_array_equal(back[weight.path], weight.value, err_msg=weight.path)

    net.compile(keras.optimizers.SGD(0.1), "mse")
    for _ in range(10):
        net.train_on_batch(np.asarray(x), np.asarray(aim))
    trained, _ = interop.to_keras(train_flax(model, variables, x, aim), net)
    moved = 0
    for weight in net.weights:
        value = np.asarray(weight.value)
        np.testing.assert_allclose(
            trained[weight.path], value, rtol=1e-5, atol=1e-5, err_msg=weight.path
        )
        moved += np.abs(value - back[weight.path]).max() > 1e-2
    assert moved > 5


@pytest.mark.parametrize(
    ("layer", "model", "transposed"),
    [
        ("Conv2DTranspose(4, 3, 2, use_bias=False)", nn.ConvTranspose(4, (3, 3), (2, 2), "VALID", use_bias=False), True),
        ("Conv2DTranspose(4, 3, 2, use_bias=False)", nn.ConvTranspose(4, (3, 3), (2, 2), "VALID", use_bias=False, transpose_kernel=True), False),
        ("DepthwiseConv2D(3, depth_multiplier=2)", nn.Conv(6, (3, 3), padding="VALID", feature_group_count=3), False),
        ("BatchNormalization(center=False)", normax.linen.BatchNorm(True, epsilon=1e-3, use_bias=False), False),
        ("GroupNormalization(3)", normax.linen.GroupNorm(3, epsilon=1e-3), False),
        ("GroupNormalization(-1, scale=False)", normax.linen.GroupNorm(None, 1, epsilon=1e-3, use_scale=False), False),
        ("RMSNormalization()", normax.linen.RMSNorm(), False),
    ],
)  # fmt: skip
def test_layers_of_keras(keras, layer, model, transposed):
    theirs = eval(f"layers.{layer}", {"layers": keras.layers})
    x = jax.random.normal(KEY, (2, 6, 7, 3))
    theirs(x)
    weights = {w.path.split("/")[-1]: w.value * 2 + 1 for w in theirs.weights}
    for weight in theirs.weights:
        weight.assign(weights[weight.path.split("/")[-1]])
    expected = np.asarray(theirs(x))
    known = type(theirs).__name__.endswith("Normalization")
    options = interop.options_of(theirs) if known else {}
    if known:  # the options alone make it what Keras's is
        mode = [True] if isinstance(model, normax.linen.BatchNorm) else []
        model = type(model)(*mode, **options)
    variables = model.init(KEY, x)
    ways = {"transposed": [""] if transposed else []}
    variables, _ = interop.from_keras(weights, variables, **ways)
    np.testing.assert_allclose(model.apply(variables, x), expected, atol=2e-5, rtol=1e-5)
    back, _ = interop.to_keras(variables, weights, **ways)
    chex.assert_trees_all_equal(back, dict(weights))


def test_linen_and_nnx(keras):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return normax.linen.BatchNorm(True)(nn.Dense(4, name="first")(x))

    x = jax.random.normal(KEY, (5, 3))
    linen = Net().init(jax.random.key(1), x)
    linen = jax.tree.map(lambda a: a + jnp.linspace(0.1, 0.2, a.size).reshape(a.shape), linen)
    other = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
        normax.nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0)),
    )
    names = {"layers/0": "first", "layers/1": "BatchNorm_0"}
    state, report = interop.from_flax(linen, nnx.state(other), names=names)
    assert len(report.matched) == 6
    nnx.update(other, state)
    np.testing.assert_allclose(other(x), Net().apply(linen, x), rtol=1e-6)

    back, _ = interop.from_flax(
        nnx.state(other), linen, names={there: here for here, there in names.items()}
    )
    chex.assert_trees_all_equal(back, linen)


def test_variables_of_flax_load_in_its_own_words():
    """A checkpoint of Flax's BatchNorm is one of ours."""
    x = jax.random.normal(KEY, (5, 3))
    theirs = nn.BatchNorm(True).init(KEY, x)
    ours, _ = interop.from_flax(theirs, normax.linen.BatchNorm(True).init(KEY, x))
    np.testing.assert_allclose(
        normax.linen.BatchNorm(True).apply(ours, x), nn.BatchNorm(True).apply(theirs, x), rtol=1e-6
    )


LIKE = {"params": {"fc": {"kernel": jnp.ones((3, 2)), "bias": jnp.full(2, 7.0)}}}


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ({"fc.weight": np.ones((2, 3))}, "missing: fc/bias"),
        ({"fc.weight": np.ones((2, 3)), "fc.bias": np.ones(2), "x.y": np.ones(1)}, "unused: x.y"),
        ({"fc.weight": np.ones((3, 2)), "fc.bias": np.ones(2)}, r"mismatched: fc/kernel of \(3, 2\), fc.weight of \(3, 2\)"),
        ({"fc.weight": np.ones((2, 3, 1)), "fc.bias": np.ones(2)}, r"mismatched: fc/kernel of .* \(2, 3, 1\)"),
        ({"fc.weight": np.ones((2, 3)), "fc.bias": np.ones(())}, r"mismatched: fc/bias of \(2,\), fc.bias of \(\)"),
    ],
)  # fmt: skip
def test_what_does_not_match_is_reported(entries, line):
    with pytest.raises(ValueError, match=rf"from_torch: expected every entry .*\n(.*\n)*{line}"):
        interop.from_torch(entries, LIKE)
    new, report = interop.from_torch(entries, LIKE, strict=False)
    assert line.split(":")[0] in str(report)
    if "missing" in line:
        np.testing.assert_array_equal(new["params"]["fc"]["bias"], 7)
        np.testing.assert_array_equal(new["params"]["fc"]["kernel"], 1)


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ({"fc.weight": np.ones((2, 3))}, "unused: fc/bias"),
        ({"fc.weight": np.ones((2, 3)), "fc.bias": np.ones(2), "x": np.ones(1)}, "missing: x"),
        ({"fc.weight": np.ones((3, 2)), "fc.bias": np.ones(2)}, r"mismatched: fc.weight of \(3, 2\)"),
    ],
)  # fmt: skip
def test_what_does_not_match_on_the_way_out_is_reported(entries, line):
    with pytest.raises(ValueError, match=rf"to_torch: expected every entry .*\n(.*\n)*{line}"):
        interop.to_torch(LIKE, entries)


def test_two_weights_of_one_path_are_refused(keras):
    class Layer(keras.layers.Layer):
        def build(self, shape):
            self.a = self.add_weight((1,), name="scale")
            self.b = self.add_weight((1,), name="scale")

    layer = Layer()
    layer.build((1,))
    with pytest.raises(ValueError, match="from_keras: expected each weight to have a path of its"):
        interop.from_keras(layer, LIKE)


def test_layers_that_have_no_options_are_refused(torch):
    with pytest.raises(TypeError, match=r"options_of: expected layer .* got Linear"):
        interop.options_of(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="use_running_average=False"):
        interop.options_of(torch.nn.BatchNorm1d(1, track_running_stats=False))
    with pytest.raises(ValueError, match="InstanceNorm without track_running_stats"):
        interop.options_of(torch.nn.InstanceNorm1d(1, track_running_stats=True))


def test_what_is_no_state_dict_or_variables_says_so(torch):
    layer = torch.nn.Linear(3, 2)
    with pytest.raises(
        TypeError, match=r"from_torch: expected a state dict .* got Linear; a module"
    ):
        interop.from_torch(layer, LIKE)
    with pytest.raises(
        TypeError, match=r"the variables of a model, got the Linear itself; they are"
    ):
        interop.from_torch(layer.state_dict(), nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(
        TypeError, match=r"the variables of a model, got the Dense itself; they are"
    ):
        interop.from_torch(layer.state_dict(), nn.Dense(2))


def test_paths_that_are_none_are_refused():
    entries = {"fc.weight": np.ones((2, 3)), "fc.bias": np.ones(2)}
    unknown = {"transposed": "fc"}, {"transposed": ["up"]}, {"transposed": 3}
    for options in (*unknown, {"flattened": {"f": (1, 1, 3)}}):
        with pytest.raises(ValueError, match=r"from_torch: expected .* paths of modules, .*'fc'"):
            interop.from_torch(entries, LIKE, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flattened": ["fc"]}, r"expected flattened to be a dict of shapes, got \['fc'\]"),
        ({"flattened": {"fc": 3}}, r"expected flattened\['fc'\] to be several ints, got 3"),
        ({"flattened": {"fc": ("3",)}}, r"expected flattened\['fc'\] to be an int, got '3'"),
        ({"names": {"fc": 3}}, r"expected names to be a dict of strings, a function or None, got"),
        ({"names": "fc"}, r"expected names to be a dict of strings, a function or None, got 'fc'"),
    ],
)
def test_what_says_nothing_of_a_model_is_refused(options, words):
    entries = {"fc.weight": np.ones((2, 3)), "fc.bias": np.ones(2)}
    with pytest.raises(TypeError, match=f"from_torch: {words}"):
        interop.from_torch(entries, LIKE, **options)
    if "names" in options:
        with pytest.raises(TypeError, match=f"from_keras: {words}"):
            interop.from_keras({}, LIKE, **options)
        with pytest.raises(TypeError, match=f"from_flax: {words}"):
            interop.from_flax(LIKE, LIKE, **options)


def test_what_is_no_file_and_no_model_of_the_other_library_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"no safetensors")
    with pytest.raises(
        ValueError, match=r"from_torch: .* safetensors file, .*model.pt.*torch.load"
    ):
        interop.from_torch(path, LIKE)
    with pytest.raises(
        TypeError, match=r"from_keras: expected a Keras model, .* got 'model.keras'"
    ):
        interop.from_keras("model.keras", LIKE)


def test_two_variables_of_one_entry_must_be_one():
    same = {"params": {"a": {"bias": jnp.ones(2)}, "b": {"bias": jnp.ones(2)}}}
    other = {"params": {"a": {"bias": jnp.ones(2)}, "b": {"bias": jnp.zeros(2)}}}
    names, like = {"a": "fc", "b": "fc"}, {"fc.bias": np.zeros(2)}
    back, _ = interop.to_torch(same, like, names=names)
    np.testing.assert_array_equal(back["fc.bias"], 1)
    with pytest.raises(ValueError, match=r"mismatched: fc.bias of \(2,\), b/bias of \(2,\)"):
        interop.to_torch(other, like, names=names)


def test_complex_entries_are_not_made_real():
    entries = {"fc.weight": np.ones((2, 3), complex), "fc.bias": np.ones(2)}
    with pytest.raises(ValueError, match="mismatched: fc/kernel"):
        interop.from_torch(entries, LIKE)


def test_axes_of_keras_are_those_of_the_module(keras):
    theirs = keras.layers.GroupNormalization(2, axis=1)
    x = jax.random.normal(KEY, (2, 4, 5))
    expected = np.asarray(theirs(x))
    model = normax.linen.GroupNorm(**interop.options_of(theirs))
    variables, _ = interop.from_keras(
        {w.path.split("/")[-1]: w for w in theirs.weights}, model.init(KEY, x)
    )
    np.testing.assert_allclose(model.apply(variables, x), expected, atol=1e-5)


def test_dtypes_of_a_file(torch, tmp_path):
    from safetensors.torch import save_file

    tensors = {"fc.weight": torch.ones(2, 3, dtype=torch.float64)}
    save_file(
        {**tensors, "fc.bias": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "a.safetensors"
    )
    back, _ = interop.to_torch(LIKE, tmp_path / "a.safetensors")
    assert {key: value.dtype for key, value in back.items()} == {
        "fc.weight": np.float64,
        "fc.bias": np.float32,
    }
    assert torch.tensor(back["fc.bias"]).tolist() == [7, 7]
