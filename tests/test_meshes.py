"""Training on meshes: the same as on one device, and nothing of x's size is moved."""

import functools
import math
import re

import family
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_sync import BIAS, CT, MASKS, RAGGED, SCALE, N, X, agree, norm, whole

import normax.linen
from normax import forms, measure, parts, train

TYPES = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)


def collectives(text):
    """Returns how often each is in a compiled program."""
    names = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    found = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in names}
    return {name: number for name, number in found.items() if number}


@MASKS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pmap(mask):
    def one(x, mask, ct):
        y, vjp, stats = jax.vjp(
            lambda x, s, b: norm(x, s, b, mask, axis_name="device"), x, SCALE, BIAS, has_aux=True
        )
        dx, dscale, dbias = vjp(ct)
        return y, stats, dx, *jax.lax.psum((dscale, dbias), "device")

    mapped = jax.pmap(one, "device", devices=jax.devices()[:N])
    y, stats, dx, *rest = mapped(X, None if mask is None else jnp.asarray(mask), CT)
    first = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf[0]), tree)
    agree((np.asarray(y), first(stats), np.asarray(dx), *first(rest)), whole(X, CT, mask))


@TYPES
@MASKS
@pytest.mark.parametrize("mean", [100, 1e4])
def test_a_step_under_plain_jit_has_two_all_reduces(axis_type, mask, mean):
    """One forward, at any mean, masked or not, and one backward; others are for lost units."""
    mesh = jax.make_mesh((N,), ("data",), (axis_type,), devices=jax.devices()[:N])
    flat = None if mask is None else jnp.broadcast_to(RAGGED, X.shape).reshape(-1, 5)
    x = X - 100 + mean

    @jax.jit
    def f(x, ct, mask, scale, bias):
        y, vjp, stats = jax.vjp(lambda *a: norm(*a, mask), x, scale, bias, has_aux=True)
        return y, stats, *vjp(ct)

    put = lambda value, *axes: jax.device_put(value, NamedSharding(mesh, P(*axes)))
    args = put(x.reshape(-1, 5), "data"), put(CT.reshape(-1, 5), "data")
    args += None if flat is None else put(flat, "data"), put(SCALE), put(BIAS)
    compiled = f.lower(*args).compile()
    text = compiled.as_text()
    assert collectives(text[text.index("\nENTRY ") :]) == {"all-reduce": 2}
    assert set(collectives(text)) == {"all-reduce"}
    y, stats, dx, *rest = jax.tree.map(np.asarray, compiled(*args))
    agree((y.reshape(X.shape), stats, dx.reshape(X.shape), *rest), whole(x, CT, mask))
    entries = np.asarray(x, np.longdouble).reshape(-1, 5)
    valid = np.ones(len(entries), bool) if mask is None else np.asarray(flat)[:, 0]
    np.testing.assert_allclose(stats.var, (1 + entries[valid].var(0)) / 2, rtol=2e-6)


@TYPES
@pytest.mark.parametrize("valid", [None, "mask", "weights", "large"])
@pytest.mark.parametrize("over", ["model", None])
def test_weights_and_features_over_a_second_axis_add_none(axis_type, valid, over):
    """No device asks another what unit its weights, or its features, need."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), (axis_type,) * 2)
    x, ct = (jax.random.normal(jax.random.key(i), (32, 6)) for i in range(2))
    x = 1e4 + x * 2.0 ** jnp.arange(6.0)[None]
    if valid is not None:
        number = jnp.arange(32.0)[:, None]
        # To 2e-28; or what adds up to infinity.
        weights = {"weights": jnp.exp2(-3 * number), "large": 2e37 + number * 1e35}
        valid = number % 5 < 3 if valid == "mask" else weights[valid]
    scale, bias = jnp.linspace(0.5, 2, 6), jnp.linspace(-1, 1, 6)
    features = scale, bias, normax.RunningStats.create(6)

    @jax.jit
    def step(x, ct, valid, scale, bias, stats):
        of = functools.partial(normax.batch_norm, use_running_average=False, mask=valid)
        y, vjp, stats = jax.vjp(lambda x, *a: of(x, stats, *a), x, scale, bias, has_aux=True)
        return y, stats, *vjp(ct)

    put = lambda value, *axes: jax.device_put(value, NamedSharding(mesh, P(*axes)))
    given = put(x, "data", over), put(ct, "data", over)
    given += valid if valid is None else put(valid, "data"), *put(features, over)
    compiled = step.lower(*given).compile()
    assert collectives(compiled.as_text()) == {"all-reduce": 2}
    agree(jax.tree.map(np.asarray, compiled(*given)), step(x, ct, valid, *features))


@TYPES
@pytest.mark.parametrize("kind", ["layer", "rms", "group"])
def test_devices_with_groups_of_their_own_agree_on_nothing(axis_type, kind):
    """All that is sent is the gradient of a scale, here one from outside of the mesh."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), (axis_type,) * 2)
    x, ct = (jax.random.normal(jax.random.key(i), (16, 8, 64)) for i in range(2))
    norm = {
        "layer": normax.layer_norm,
        "rms": normax.rms_norm,
        "group": functools.partial(normax.group_norm, num_groups=4),
    }[kind]

    @jax.jit
    def step(x, ct, scale):
        y, vjp = jax.vjp(norm, x, scale)
        return y, *vjp(ct)

    spec = P("data", None, "model" if kind == "group" else None)
    given = *(jax.device_put(v, NamedSharding(mesh, spec)) for v in (x, ct)), jnp.linspace(1, 2, 64)
    compiled = step.lower(*given).compile()
    assert collectives(compiled.as_text()) == {"all-reduce": 1}
    agree(jax.tree.map(np.asarray, compiled(*given)), step(x, ct, given[-1]))


@pytest.mark.parametrize("explicit", ["data", "model"])
@pytest.mark.parametrize("spec", [P("data"), P("data", "model"), P(("data", "model"))], ids=str)
@MASKS
def test_of_a_mesh_one_axis_may_be_explicit(explicit, spec, mask):
    """What the other deals out no type says."""
    if spec == P(("data", "model")) and explicit == "model":
        spec = P(("model", "data"))  # JAX lays out anew what an automatic axis is the first of
    types = [AxisType.Explicit if name == explicit else AxisType.Auto for name in ("data", "model")]
    mesh = jax.make_mesh((4, 2), ("data", "model"), tuple(types))
    x, ct = (1e4 * (1 - i) + jax.random.normal(jax.random.key(i), (512, 6)) for i in range(2))
    valid = None if mask is None else jnp.arange(512)[:, None] % 5 < 3
    stats = normax.RunningStats.create(6)

    @jax.jit
    def step(x, ct, valid):
        of = functools.partial(normax.batch_norm, use_running_average=False, mask=valid)
        y, vjp, after = jax.vjp(lambda x: of(x, stats), x, has_aux=True)
        return y, after, *vjp(ct)

    put = lambda value, *axes: jax.device_put(value, NamedSharding(mesh, P(*axes)))
    given = put(x, *spec), put(ct, *spec), valid if valid is None else put(valid, spec[0])
    compiled = step.lower(*given).compile()
    assert collectives(compiled.as_text())["all-reduce"] == 2
    assert max(sent(compiled.as_text())) < x.size // 8
    agree(jax.tree.map(np.asarray, compiled(*given)), step(x, ct, valid))


@pytest.mark.parametrize("kind", ["complex", "forward"])
@pytest.mark.parametrize("spec", [P("data"), P("data", "model")], ids=str)
@MASKS
def test_complex_numbers_and_forward_mode_have_two_all_reduces(kind, spec, mask):
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2)
    parts = [jax.random.normal(jax.random.key(i), (32, 16, 32)) for i in range(4)]
    x, ct = parts[:2] if kind == "forward" else map(jax.lax.complex, parts[:2], parts[2:])
    valid = None if mask is None else jax.random.bernoulli(jax.random.key(4), 0.7, x.shape)

    @jax.jit
    def step(x, ct, valid):
        norm = lambda x: normax.standardize(x, reduction_axes=(0, 1), mask=valid)[0]
        if kind == "forward":
            return jax.jvp(norm, (x,), (ct,))
        y, vjp = jax.vjp(norm, x)
        return y, *vjp(ct)

    given = jax.device_put((x, ct, valid), NamedSharding(mesh, spec))
    compiled = step.lower(*given).compile()
    limit = 3 if kind == "complex" and spec != P("data") else 2
    assert collectives(compiled.as_text())["all-reduce"] <= limit
    for found, expected in zip(compiled(*given), step(x, ct, valid), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


@TYPES
@pytest.mark.parametrize("shape", [(16, 1, 1), (16, 8, 1), (1, 1, 4), (1, 1, 1)], ids=str)
def test_weights_that_broadcast_are_not_laid_out_for_their_gradient(axis_type, shape):
    mesh = jax.make_mesh((4, 2), ("data", "model"), (axis_type,) * 2)
    x, ct = (jax.random.normal(jax.random.key(i), (16, 8, 4)) for i in range(2))
    weights = jax.random.uniform(jax.random.key(2), shape, minval=0.5)

    @jax.jit
    def step(x, ct, weights):
        of = lambda x, w: normax.standardize(x, reduction_axes=(0, 1), mask=w)[0]
        y, vjp = jax.vjp(of, x, weights)
        return y, *vjp(ct)

    wide = zip(("data", None, "model"), shape, strict=True)
    of_weights = P(*(name if size > 1 else None for name, size in wide))
    specs = P("data", None, "model"), P("data", None, "model"), of_weights
    places = [NamedSharding(mesh, spec) for spec in specs]
    given = jax.device_put((x, ct, weights), tuple(places))
    compiled = step.lower(*given).compile()
    assert set(collectives(compiled.as_text())) == {"all-reduce"}
    *expected, of_expected = step(x, ct, weights)
    from_outside = step(*given[:2], weights)
    for *found, of_found in (compiled(*given), from_outside):
        agree(jax.tree.map(np.asarray, found), expected)
        # Sums of up to 512 terms: those of weights that groups have in common are of nothing else.
        np.testing.assert_allclose(of_found, of_expected, rtol=1e-5, atol=5e-6)


@TYPES
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize(
    ("form", "exchanges"),
    [(forms._about_samples, 1), (forms._in_a_unit, 1), (forms._about_zero, 2)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_forms_of_other_platforms_exchange_once(axis_type, centered, form, exchanges):
    """The second of a TPU's is in a branch, for where squares lose digits."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), (axis_type,) * 2)
    reduction = measure.Reduction((0, 1), centered, least=2.0**-60)
    parts = 2.0 ** jnp.arange(0.0, 8, 0.5).round()[:, None, None]  # each in a unit of its own
    x = (1e3 + jax.random.normal(jax.random.key(0), (16, 3, 4))) * parts
    given = jax.device_put(x, NamedSharding(mesh, P("data")))
    compiled = jax.jit(lambda x: form(reduction, x, None, devices=8)).lower(given).compile()
    assert collectives(compiled.as_text()) == {"all-reduce": exchanges}
    _, unit, mean, rest, var = compiled(given)
    entries = np.asarray(x, np.longdouble)
    if centered:
        np.testing.assert_allclose((mean + rest) * unit, entries.mean((0, 1), keepdims=True), 2e-7)
        entries = entries - entries.mean((0, 1), keepdims=True)
    wanted = (entries**2).mean((0, 1), keepdims=True)
    np.testing.assert_allclose(var * unit**2, wanted, 1e-6)


@MASKS
@pytest.mark.parametrize(
    ("spec", "axes"),
    [
        (P("data"), (0, 1)),
        (P(None, "data"), (1,)),
        (P("data", None, "model"), (0, 1)),
        (P("data", "model"), (0, 1)),
    ],
    ids=str,
)
def test_parts_are_in_a_unit_where_a_tpu_needs_one(spec, axes, mask):
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2)
    reduction = measure.Reduction(axes, True, least=2.0**-60)
    sizes = 10.0 ** jnp.arange(0.0, -32, -8)[None, None]
    x = jax.random.normal(jax.random.key(0), (8, 64, 4)) * sizes
    number = jnp.broadcast_to(jnp.arange(64)[:, None], x.shape)
    valid = number >= 0 if mask is None else number % 3 < 2
    put = lambda value: jax.device_put(value, NamedSharding(mesh, spec))
    form = functools.partial(forms._in_a_unit_where_needed, reduction, devices=8)
    _, unit, mean, rest, var = jax.jit(form)(put(x), put(valid))
    entries = np.ma.array(np.asarray(x / sizes, np.longdouble), mask=~np.asarray(valid))
    size, unit = (np.asarray(v, np.longdouble) for v in (sizes, unit))
    found = np.asarray(mean + rest) * unit / size, np.asarray(var) * (unit / size) ** 2
    np.testing.assert_allclose(found[0], entries.mean(axes, keepdims=True), rtol=0, atol=2e-7)
    np.testing.assert_allclose(found[1], entries.var(axes, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize(
    ("spec", "reduced"),
    [
        (P(None, "data"), (0, 1)),
        (P(None, ("data", "model")), (0, 1)),
        (P(None, "data"), (1, 2)),
        (P(None, None, ("data", "model")), (2,)),
        (P("data", None, "model"), (0, 1)),
        (P("data", None, "model"), (2,)),
        (P("model", "data"), (1,)),
        (P("data", "model"), (0, 1)),
        (P("data", None, "model"), (0, 2)),
        (P(None, "model", "data"), (0, 1, 2)),
    ],
    ids=str,
)
@MASKS
def test_any_axis_that_is_dealt_out_is_measured_in_parts(spec, reduced, mask):
    """Where layouts are in types; nor have groups that are apart on devices, too, to agree."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2)
    x = 1e4 + jax.random.normal(jax.random.key(0), (8, 64, 256))
    ct = jax.random.normal(jax.random.key(1), x.shape)
    valid = mask if mask is None else jax.random.bernoulli(jax.random.key(2), 0.7, x.shape)

    @jax.jit
    def both(x, ct, valid):
        norm = lambda x: normax.standardize(x, reduction_axes=reduced, mask=valid)[0]
        y, pull = jax.vjp(norm, x)
        return y, *pull(ct)

    put = lambda value: jax.device_put(value, NamedSharding(mesh, spec))
    given = jax.tree.map(put, (x, ct, valid))
    compiled = both.lower(*given).compile()
    text = compiled.as_text()
    assert collectives(text[text.index("\nENTRY ") :]) == {"all-reduce": 2}
    agree(jax.tree.map(np.asarray, compiled(*given)), both(x, ct, valid))
    # In units of their own, too: each feature in another, and none that a square of it would have.
    size = 1e-30 * 2.0 ** (jnp.arange(256.0) // 8)[None, None]
    form = functools.partial(normax.standardize, reduction_axes=reduced, mask=valid, epsilon=0)
    small = (x - 1e4) * size
    with_mask = functools.partial(form, mask=given[2])
    found, expected = jax.jit(with_mask)(put(small))[0], jax.jit(form)(small)[0]
    assert np.abs(np.asarray(expected)).max() > 1  # not what an epsilon leaves of it
    agree(np.asarray(found), expected)


def test_of_more_parts_than_are_laid_side_by_side_each_sum_is_of_all(monkeypatch):
    monkeypatch.setattr(parts, "MOST", N - 1)
    mesh = jax.make_mesh((N,), ("data",), (AxisType.Auto,), devices=jax.devices()[:N])
    reduction = measure.Reduction((0,), True, least=2.0**-60)
    x = 1e4 + jax.random.normal(jax.random.key(0), (8 * N, 4))
    given = jax.device_put(x, NamedSharding(mesh, P("data")))
    form = jax.jit(lambda x: forms._in_a_unit(reduction, x, None, devices=N))
    text = form.lower(given).compile().as_text()
    assert collectives(text) == {"all-reduce": 4}
    agree(jax.tree.map(np.asarray, form(given)), forms._in_a_unit(reduction, x, None))


@TYPES
def test_a_batch_that_devices_do_not_divide(axis_type):
    mesh = jax.make_mesh((4, 2), ("data", "model"), (axis_type,) * 2)
    x = X[:, :3].reshape(12, 5)
    given = jax.device_put(x, NamedSharding(mesh, P("data")))
    y, stats = jax.jit(lambda x: norm(x, SCALE, BIAS, None))(given)
    expected = norm(x, SCALE, BIAS, None)
    agree(jax.tree.map(np.asarray, (y, stats)), expected)


@pytest.mark.parametrize("change", [lambda x: x[:20], lambda x: jnp.concatenate([x, x[:4]])])
def test_what_devices_do_not_divide_within_a_program_is_not_gathered(change):
    """There the partitioner deals out what is padded, in parts that nobody else would cut."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    assert len(change(jnp.zeros(24))) % 8

    @jax.jit
    def step(x, w):
        loss = lambda w: (norm(change(x) @ w, SCALE, BIAS, None)[0] ** 3).sum()
        return jax.grad(loss)(w)

    given = jax.device_put(jnp.ones((24, 8, 5)), NamedSharding(mesh, P("data")))
    text = step.lower(given, jnp.eye(5)).compile().as_text()
    assert "all-gather" not in collectives(text)


def test_many_groups_are_not_laid_side_by_side():
    """It would be more than is normalized: a sum is sent for each of them, and no more."""
    mesh = jax.make_mesh((8,), ("model",), (AxisType.Explicit,))
    x = 1e4 + jax.random.normal(jax.random.key(0), (128, 64))
    given = jax.device_put(x, NamedSharding(mesh, P(None, "model")))
    compiled = jax.jit(normax.layer_norm).lower(given).compile()
    sent = re.findall(r" = \w+\[([\d,]*)\]\S* all-reduce", compiled.as_text())
    assert sent
    assert max(math.prod(map(int, shape.split(","))) if shape else 1 for shape in sent) <= 128
    agree(np.asarray(compiled(given)), normax.layer_norm(x))


@TYPES
@pytest.mark.parametrize("value", [3.3e7, 1.1e30])
def test_equal_entries_are_equal_on_any_number_of_devices(axis_type, value):
    """Six devices have shares that no binary number is."""
    mesh = jax.make_mesh((6,), ("data",), (axis_type,), devices=jax.devices()[:6])
    mask = jax.random.bernoulli(jax.random.key(0), 0.6, (48, 4)).at[0].set(True)
    weights = jnp.where(mask, jax.random.uniform(jax.random.key(1), mask.shape) + 0.1, 0)
    put = lambda v: jax.device_put(v, NamedSharding(mesh, P("data")))
    x = put(jnp.full((48, 4), value))
    for given in (None, mask, weights):
        f = jax.jit(lambda x, m: normax.standardize(x, reduction_axes=0, mask=m, epsilon=1e-5)[0])
        y = f(x, None if given is None else put(given))
        np.testing.assert_array_equal(y, jnp.zeros_like(y))


def test_a_mask_that_is_whole_is_not_gathered(monkeypatch):
    """Nor in the loop that a TPU has, where devices may need units."""
    monkeypatch.setattr(forms, "_in_a_unit_where_none_asks", forms._in_a_unit_where_needed)
    jax.clear_caches()
    mesh = jax.make_mesh((N,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:N])
    x = jax.device_put(jnp.ones((4 * N, 6, 16)), NamedSharding(mesh, P("data")))
    mask = jax.device_put(jnp.ones(x.shape, bool), NamedSharding(mesh, P()))
    f = jax.jit(lambda x, m: normax.standardize(x, reduction_axes=(0, 1), mask=m)[0])
    text = f.lower(x, mask).compile().as_text()
    jax.clear_caches()
    assert "while" in text
    assert set(collectives(text)) == {"all-reduce"}


class Model(nn.Module):
    """A layer whose features are dealt out, batch norm over them, and one more layer."""

    @nn.compact
    def __call__(self, x, train, mask=None):
        x = nn.Dense(16, use_bias=False, name="first")(x)
        x = normax.linen.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(
            x, mask=mask
        )
        return nn.Dense(1, name="last")(nn.relu(x))[:, 0]


def loss(model, batch, train):
    y = model(batch["x"], train=train, mask=batch["mask"])
    weight = batch["mask"][:, 0].astype(y.dtype)
    return (optax.l2_loss(y, batch["y"]) * weight).sum() / weight.sum()


@pytest.mark.parametrize("masked", [False, True], ids=["", "one device has nothing"])
@pytest.mark.usefixtures("optax_promotes")
def test_a_training_step_on_data_and_model_axes(masked):
    x = jax.random.normal(jax.random.key(0), (32, 6)) + 3
    mask = jnp.arange(32)[:, None] >= (8 if masked else 0)
    batch = {"x": x, "y": jnp.sin(x[:, 0]), "mask": mask}
    state = train.TrainState.create(Model(), optax.sgd(0.1), jax.random.key(1), x, train=False)
    step = train.train_step(loss, donate=False)
    expected, metrics = step(state, batch)
    # Automatic axes: with explicit ones Flax's Dense has no out_sharding for its product.
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    features = {"kernel": P(None, "model"), "scale": P("model"), "bias": P("model")}

    def place(path, leaf):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        spec = P()
        if "first" in names or "norm" in names:
            spec = features.get(names[-1], P("model"))
        elif names[-2:] == ["last", "kernel"]:
            spec = P("model", None)
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    given = jax.tree_util.tree_map_with_path(place, state)
    spread = jax.device_put(batch, NamedSharding(mesh, P("data")))
    compiled = step.lower(given, spread).compile()
    found, others = compiled(given, spread)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, found.params, expected.params)
    jax.tree.map(close, found.batch_stats, expected.batch_stats)
    close(others["loss"], metrics["loss"])
    assert "all-to-all" not in collectives(compiled.as_text())
    # Statistics stay with their features.
    kept = found.batch_stats["norm"]["mean"].sharding
    assert kept.is_equivalent_to(NamedSharding(mesh, P("model")), 1)


def sent(text):
    """Returns how many entries each array of each collective of a program has."""
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    types = re.findall(rf"= (.*?) (?:{names})(?:-start)?\(", text)
    dims = [dims for type_ in types for dims in re.findall(r"\w+\[([\d,]*)\]", type_)]
    return [math.prod(map(int, filter(None, each.split(",")))) for each in dims]


def in_sync(x, stats, scale, bias, **options):
    return normax.batch_norm(x, stats, scale, bias, axis_name="data", **options)


SYNCED = family.Member("in sync", in_sync, None, (2, 3, 3, 4), family.AFFINE, stats=(4,))
MAPPED = [
    SYNCED,
    SYNCED._replace(name="in sync, then relu", options={"activation": jax.nn.relu}),
    family.Member("layer", normax.layer_norm, None, (2, 3, 3, 4), family.AFFINE),
    family.Member("group", normax.group_norm, None, (2, 3, 3, 4), family.AFFINE, {"num_groups": 2}),
    *(member for member in family.FAMILY if not member.told or member.name == "kalman"),
]


@pytest.mark.parametrize("member", MAPPED, ids=lambda member: member.name)
def test_nothing_of_the_size_of_x_crosses_a_shard_map(member):
    """Where types say what varies, a parameter that is spread out too early is summed as large."""
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    x, parameters = member.inputs()
    times = -(-64 // len(x))
    x = jnp.tile(x, (times + times * len(x) % 2, *[1] * (x.ndim - 1)))

    def step(x, ct, parameters):
        y, pull = jax.vjp(member.call, x, parameters)
        return y, pull(ct)

    data, whole = P("data"), P()
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(data, data, whole), out_specs=(data, (data, whole))
    )
    found = sent(jax.jit(mapped).lower(x, x, parameters).compile().as_text())
    assert max(found, default=0) < x.size / 2
    assert found or not parameters


EXPLICIT = [member for member in MAPPED if not member.name.startswith(("in sync", "ghost"))]


@pytest.mark.parametrize(
    ("member", "spec"),
    [(member, P("data")) for member in EXPLICIT]
    + [(member, P("data", "model")) for member in EXPLICIT if len(member.shape) > 2],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_nothing_of_the_size_of_x_crosses_explicit_axes(member, spec):
    """Where parameters are placed on the mesh, as those of a model are."""
    sizes = (8,) if len(spec) == 1 else (4, 2)
    mesh = jax.make_mesh(sizes, tuple(spec), (AxisType.Explicit,) * len(spec))
    put = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))
    x, parameters = member.inputs()
    times = (-(-512 // len(x)), *[8] * (len(spec) - 1))
    x = jnp.tile(x, (*times, *[1] * (x.ndim - len(times))))[:512]

    def step(x, ct, parameters):
        y, pull = jax.vjp(member.call, x, parameters)
        return y, pull(ct)

    given = (
        put(x, spec),
        put(jnp.cos(x), spec),
        jax.tree.map(lambda v: put(v, P()), parameters),
    )
    compiled = jax.jit(step).lower(*given).compile()
    assert max(sent(compiled.as_text()), default=0) < x.size / mesh.size
    wanted = jax.jit(step)(x, jnp.cos(x), parameters)
    agree(jax.tree.map(np.asarray, compiled(*given)), wanted, units=8)  # long sums of gradients


@pytest.mark.parametrize("member", EXPLICIT, ids=lambda member: member.name)
def test_parameters_may_be_dealt_out_where_x_is_not(member):
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2)
    put = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))
    x, parameters = member.inputs()
    x = jnp.tile(x, (4, *[1] * (x.ndim - 1)))
    spec_of = lambda v: P("model") if v.ndim and v.shape[0] % 2 == 0 else P()
    placed = {name: put(v, spec_of(v)) for name, v in parameters.items()}

    @jax.jit
    def step(x, parameters):
        y, pull = jax.vjp(member.call, x, parameters)
        return y, pull(jnp.cos(y))

    found = step(put(x, P("data")), placed)
    agree(jax.tree.map(np.asarray, found), step(x, parameters), units=64)  # sums of gradients


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [5, 8, 32])
def test_ghosts_on_explicit_axes(size, masked):
    """Those that devices share, and those that do not come out even, are brought together."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    put = lambda value: jax.device_put(value, NamedSharding(mesh, P("data")))
    x, ct = (jax.random.normal(jax.random.key(i), (64, 5)) for i in range(2))
    mask = jax.random.bernoulli(jax.random.key(2), 0.8, (64, 1)) if masked else None

    @jax.jit
    def step(x, ct, mask):
        def call(x):
            return normax.ghost_batch_norm(
                x,
                normax.RunningStats.create(5),
                SCALE,
                BIAS,
                ghost_size=size,
                use_running_average=False,
                mask=mask,
            )

        y, pull, stats = jax.vjp(call, x, has_aux=True)
        return y, stats, *pull(ct)

    found = step(put(x), put(ct), None if mask is None else put(mask))
    assert jax.typeof(found[0]).sharding.spec[0] == "data"
    agree(jax.tree.map(np.asarray, found), step(x, ct, mask))


def spectral(w):
    state = normax.SpectralState.create(jax.random.key(1), w.shape[-1])
    return normax.spectral_norm(w, state, n_steps=3)


WHOLE = {
    "spectral": spectral,
    "exact": normax.exact_spectral_norm,
    "quantiles": normax.robust_features,
    "condition": normax.condition_number,
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    "spec",
    [
        P("data", None, None),
        P(None, "data", None),
        P(None, None, "model"),
        P("data", None, "model"),
    ],
    ids=str,
)
def test_orders_and_singular_values_on_explicit_axes(name, spec):
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2)
    w = jax.random.normal(jax.random.key(0), (8, 4, 6))

    @jax.jit
    def step(w):
        y, pull = jax.vjp(WHOLE[name], w)
        return y, pull(jax.tree.map(jnp.cos, y))

    found = step(jax.device_put(w, NamedSharding(mesh, spec)))
    agree(jax.tree.map(np.asarray, found), step(w), units=64)
    for like_w in jax.tree.leaves(found):
        if like_w.shape == w.shape:
            assert like_w.sharding.spec == spec


def test_a_spectral_state_stays_where_it_was():
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2)
    put = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))
    w = jax.random.normal(jax.random.key(0), (8, 6))
    state = normax.SpectralState.create(jax.random.key(1), 6)
    step = jax.jit(normax.spectral_norm)
    for spec in (P(), P(None, "model")):
        placed = state._replace(u=put(state.u, spec), sigma=put(state.sigma, P()))
        compiled = step.lower(put(w, P("data", "model")), placed).compile()
        assert max(sent(compiled.as_text())) <= w.shape[-1]  # no part of the kernel
        y, new = compiled(put(w, P("data", "model")), placed)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, placed)
        agree(jax.tree.map(np.asarray, (y, new)), step(w, state))


def test_segments_on_explicit_axes_are_refused():
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    x = jax.device_put(jnp.ones((16, 3)), NamedSharding(mesh, P("data")))
    with pytest.raises(
        ValueError, match=r"segment_norm: expected x .* not dealt out along explicit"
    ):
        normax.segment_norm(x, jnp.zeros(16, int), num_segments=2)


@pytest.mark.parametrize("spec", [P("data"), P(None, "model"), P("data", None, "model")], ids=str)
@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize("name", ["divisive_norm", "local_response_norm"])
def test_windows_over_what_is_dealt_out_on_explicit_axes(name, length, spec):
    mesh = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Explicit,) * 2)
    function = {
        "divisive_norm": functools.partial(normax.divisive_norm, window=(length, length)),
        "local_response_norm": functools.partial(normax.local_response_norm, size=length, alpha=1),
    }[name]
    x, ct = (jax.random.normal(jax.random.key(i), (4, 6, 8)) for i in range(2))

    @jax.jit
    def both(x, ct):
        y, vjp = jax.vjp(function, x)
        return y, *vjp(ct)

    expected = both(x, ct)
    dealt_out = [jax.device_put(value, NamedSharding(mesh, spec)) for value in (x, ct)]
    for ours, theirs in zip(both(*dealt_out), expected, strict=True):
        assert jax.typeof(ours).sharding == jax.typeof(dealt_out[0]).sharding
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
