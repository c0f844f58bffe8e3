"""GPU kernels: interpreted on a CPU against NumPy, and lowered for CUDA at Grok-1's own sizes."""

import dataclasses
import functools

import factories
import haiku as hk
import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 (NumPy learns "bfloat16" from it)
import numpy as np
import pytest
from factories import slow
from jax.sharding import AbstractDevice, AbstractMesh

import captures
import experts as moe
import formats
import kernels
import model
import quantize
import runners
from kernels import gpu
from kernels.gpu import FEW_ROWS, MANY_ROWS

EXPERTS = [2, -1, 0, 2, 1]  # of the blocks: repeated, skipped, and not in order

needs_gpu = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="runs compiled kernels; set JAX_PLATFORMS=cuda"
)
interpreted_or_not = pytest.mark.parametrize(
    "interpret", [True, pytest.param(False, marks=needs_gpu)]
)


def random_case(rows, inputs=1024, outputs=256, groups=None, planes=1):
    """x, weights, the experts of the blocks, and what NumPy makes of them.

    groups, planes: of multipliers, from 0 to the largest that there may be; None: without
    """
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (len(EXPERTS), rows, inputs)).astype(np.int8)
    trits = rng.integers(-1, 2, (3, planes, inputs, outputs)).astype(np.int8)
    if groups is None:
        codes, w = trits[:, 0], quantize.pack(trits[:, 0], None, block=gpu.STEP)
    else:
        multipliers = random_multipliers(rng, (3, outputs, groups, planes))
        of_inputs = multipliers.repeat(inputs // groups, axis=2)  # [E, O, I, P]
        codes = np.einsum("epio,eoip->eio", trits, of_inputs)
        w = quantize.pack(trits, None, multipliers, gpu.STEP)
    assert (quantize.unpack(w) == codes).all()
    experts = np.array(EXPERTS, np.int32)
    sums = x.astype(np.int64) @ codes[experts].astype(np.int64)
    return x, w, experts, np.where(experts[:, None, None] < 0, 0, sums)


def random_multipliers(rng, shape):
    """int8 [..., P], P of 1 or 2: half of their sums are 127."""
    most = np.where(rng.random(shape[:-1]) < 0.5, 127, rng.integers(0, 128, shape[:-1]))
    first = most if shape[-1] == 1 else rng.integers(0, most + 1)
    return np.stack([first, most - first][: shape[-1]], axis=-1).astype(np.int8)


def interpreted(x, w, experts, **options):
    sums = functools.partial(gpu.ternary_sums, interpret=True, **options)
    y = jax.jit(sums, static_argnums=3)(x, w.packed, experts, w.block, w.multipliers)
    assert y.dtype == jnp.int32
    return y


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 32, 128, 130])
def test_sums_are_exact(rows):
    x, w, experts, expected = random_case(rows)
    np.testing.assert_array_equal(interpreted(x, w, experts), expected)


@pytest.mark.parametrize(
    "groups, planes, rows",  # groups of 4 blocks
    [(1, 2, 1), (4, 1, 9), (8, 1, 3), (16, 1, 16), (4, 2, 2), (8, 2, 1), (16, 2, 1)]
    + [(1, 2, 130), (8, 1, 17), (16, 2, 32)],
)
def test_sums_of_multiplied_trits_are_exact(groups, planes, rows):
    x, w, experts, expected = random_case(rows, groups=groups, planes=planes)
    np.testing.assert_array_equal(interpreted(x, w, experts), expected)


@pytest.mark.parametrize("multipliers", [{}, {"groups": 24, "planes": 2}])
@pytest.mark.parametrize("programs", [1, 1000])  # 1 and 12 parts of 12
@pytest.mark.parametrize("tile, outputs", [(FEW_ROWS, 64), (MANY_ROWS, 32)])
def test_tiles_and_parts_change_nothing(tile, outputs, programs, multipliers):
    tile = gpu.FEW_ROWS_MULTIPLIED if multipliers and tile is FEW_ROWS else tile
    x, w, experts, expected = random_case(9, inputs=3072, **multipliers)
    tile = dataclasses.replace(tile, outputs=outputs, programs=programs, rows=8)
    np.testing.assert_array_equal(interpreted(x, w, experts, tile=tile), expected)


def test_largest_sums():
    """The longest rows, all at the ends of int8: masked codes are up to 128 times too large."""
    trits = np.array([-1, 0, 1], np.int8)[:, None, None]
    w = quantize.pack(np.broadcast_to(trits, (3, 32768, 128)), None, block=gpu.STEP)
    x = np.full((3, 1, 32768), -128, np.int8)
    y = interpreted(x, w, np.arange(3, dtype=np.int32))
    np.testing.assert_array_equal(y, np.broadcast_to(trits * np.int32(-(1 << 22)), y.shape))
    w = dataclasses.replace(w, multipliers=np.full((3, 128, 128, 1), 127, np.int8))
    y = interpreted(x, w, np.arange(3, dtype=np.int32))
    np.testing.assert_array_equal(y, np.broadcast_to(trits * np.int32(-127 << 22), y.shape))


@interpreted_or_not
@pytest.mark.parametrize(
    "weights, inputs, outputs, rows, activations",
    [
        ("ternary", 1024, 192, 2, "int15"),  # whose outputs are three tiles
        slow("ternary", 256, 16, 24, "int8"),
        ("ternary-fit", 256, 16, 136, "int15"),  # whose rows are two tiles, with their halves
        slow("ternary-fit-128", 2048, 128, 2, "int15"),
        ("ternary2-64", 2048, 16, 36, "int8"),
    ],
)
def test_products_that_share_a_launch(
    weights, inputs, outputs, rows, activations, interpret, monkeypatch
):
    """Three weights, and a gated product: blocks of rows of two experts, one of which is skipped.

    A step's blocks of 64 bytes are 1 packing block for 2048 inputs, 2 for 1024 and 8 for 256. Rows
    are rounded by the same kernel, for XLA divides less exactly on a CPU.
    """
    random = np.random.default_rng(0)

    def rounded(x, axis_name, activations):
        levels, dtype = (127, jnp.int8) if activations == "int8" else (127 * 128, jnp.int16)
        return gpu.quantize_rows(x, levels, dtype, interpret=interpret)

    monkeypatch.setattr(quantize, "quantize_rows", rounded)
    ws = [
        formats.FORMATS[weights].quantize(
            jnp.asarray(random.standard_normal((2, inputs, size)), jnp.float32)
        )
        for size in (32, outputs, outputs)
    ]
    x = jnp.asarray(random.standard_normal((rows, inputs)), jnp.float32)
    experts = jnp.array([0, -1])
    options = {"activations": activations, "interpret": interpret}
    assert gpu.takes_dots(x, ws, experts, activations=activations)
    with kernels.disabled():
        plain = quantize.grouped_dots(x, ws, experts, activations=activations)
        gated = quantize.gated_dot(x, *ws[1:], experts, activations=activations)
    found = gpu.ternary_dots(x, ws, experts, **options)
    for y, expected in zip(found, plain, strict=True):
        np.testing.assert_array_equal(y, expected)
    found = gpu.gated_dot(x, *ws[1:], experts, **options)
    # Another formula for GELU: some units in the last place of numbers of a few hundreds.
    np.testing.assert_allclose(found, gated, rtol=0, atol=1e-6 * np.abs(gated).max())
    assert not found[rows // 2 :].any()
    # Rows of both blocks' tokens, in another order, one of them twice and one not there.
    tokens = jnp.arange(rows)[::-1].at[-2].set(rows // 2).at[-1].set(rows)
    blocks = moe.ExpertBlocks(None, tokens, jnp.array([-1, 1]))
    with kernels.disabled():
        gated = moe.gated_rows(x, *ws[1:], blocks, activations=activations)
    found = gpu.gated_rows(x, *ws[1:], blocks, **options)
    np.testing.assert_allclose(found, gated, rtol=0, atol=1e-6 * np.abs(gated).max())


@interpreted_or_not
def test_rows_that_are_rounded_already(interpret):
    """Kernels do not look at their floats, and plain JAX rounds these again."""
    random = np.random.default_rng(0)
    ws = [quantize.pack(random.integers(-1, 2, (2, 256, 16)), np.ones((2, 1, 1), np.float32))] * 2
    x, activations = jnp.asarray(random.standard_normal((2, 256)), jnp.float32), "int15"
    integers, step = gpu.quantize_rows(x, 127 * 128, jnp.int8, halves=2, interpret=interpret)
    unseen = quantize.RoundedRows(jnp.full_like(x, jnp.nan), integers, step)
    seen = dataclasses.replace(unseen, rows=x)
    blocks = moe.ExpertBlocks(None, jnp.array([1, 0]), jnp.array([0, 1]))
    for kernel, plain, arguments in (
        (gpu.ternary_dots, quantize.grouped_dots, (ws, blocks.expert_of_block)),
        (gpu.gated_rows, moe.gated_rows, (*ws, blocks)),
    ):
        with kernels.disabled():
            expected, same = (plain(y, *arguments, activations=activations) for y in (x, seen))
        jax.tree.map(np.testing.assert_array_equal, same, expected)
        found = kernel(unseen, *arguments, activations=activations, interpret=interpret)
        near = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-2)  # of hundreds
        jax.tree.map(near, found, expected)


@pytest.mark.parametrize(
    "programs, steps, wanted, parts",
    [(512, 24, 512, 1), (48, 24, 512, 12), (8, 24, 512, 24), (96, 128, 512, 8), (1, 7, 2, 7)],
)
def test_parts_of_the_inputs(programs, steps, wanted, parts):
    assert gpu._splits(programs, steps, wanted) == parts


def test_shapes_taken():
    takes = functools.partial(gpu.takes, block=64)
    assert takes((2, 1, 6144), (8, 32768, 1536))
    assert takes((4, 128, 32768), (8, 6144, 8192))
    assert takes((1, 1000, 256), (1, 128, 64))
    assert takes((2, 1, 6144), (8, 32768 - 64, 1536)) and takes((1, 1, 256), (1, 16, 64))
    assert not takes((2, 1, 6144), (8, 32768 - 8, 1536)), "outputs that fill no tile"
    assert not takes((2, 1, 6142), (8, 32768, 1536)), "padding"
    assert not takes((2, 1, 6272), (8, 32768, 1568)), "half a block"
    assert not takes((2, 0, 6144), (8, 32768, 1536)), "no rows"
    assert not takes((0, 1, 6144), (8, 32768, 1536)), "no blocks"
    assert not takes((1, 6144), (8, 32768, 1536)), "no axis of blocks"
    assert gpu.takes((2, 1, 256), (8, 256, 64), 8), "the demo's blocks"
    assert not gpu.takes((2, 1, 6144), (8, 32768, 1536), 48), "blocks that make no step"


def test_shapes_of_multipliers_taken():
    def takes(*multipliers, width=3072):
        return gpu.takes((2, 1, 6144), (8, 192, width), 64, multipliers)

    for groups in (1, 24, 48, 96):
        assert takes(8, 192, groups, 2)
        assert takes(8, 192, groups, 1, width=1536)
    assert not takes(8, 192, 12, 2), "groups of two blocks"
    assert not takes(8, 192, 192, 2), "half a slab"
    assert not takes(8, 192, 24, 1), "the bytes of two planes"
    assert not takes(8, 192, 24, 3, width=4608), "three planes"
    assert not takes(8, 192, 24, 2, width=3072 + 64), "half a block"
    assert not takes(8, 192, 0, 2), "no groups"
    assert not takes(192, 24, 2), "no axis of experts"
    assert not takes(7, 192, 24, 2), "of other experts"
    assert not takes(8, 128, 24, 2), "of other outputs"
    assert not gpu.takes((2, 1, 6144), (8, 192, 1536), 32, (8, 192, 24, 1)), "smaller blocks"


def test_shapes_that_are_refused():
    x, w, experts, _ = random_case(1, outputs=200)
    with pytest.raises(ValueError, match=r"no kernel for \(5, 1, 1024\) times \(3, 200, 256\)"):
        interpreted(x, w, experts)
    x, w, experts, _ = random_case(1)
    with pytest.raises(ValueError, match=r"experts is int32 \[4\], expected int32 \[5\]"):
        interpreted(x, w, experts[1:])
    with pytest.raises(ValueError, match=r"x is float32 .*, expected int8"):
        interpreted(x.astype(np.float32), w, experts)
    with pytest.raises(ValueError, match=r"packed is int8 .*, expected uint8"):
        interpreted(x, dataclasses.replace(w, packed=w.packed.view(np.int8)), experts)
    x, w, experts, _ = random_case(1, groups=4, planes=2)
    with pytest.raises(ValueError, match=r"64 bytes with multipliers \(3, 256, 3, 2\)"):
        interpreted(x, dataclasses.replace(w, multipliers=w.multipliers[:, :, 1:]), experts)
    with pytest.raises(ValueError, match=r"multipliers is uint8 .*, expected int8"):
        interpreted(x, dataclasses.replace(w, multipliers=w.multipliers.view(np.uint8)), experts)


@pytest.mark.parametrize(
    "tile, multipliers", [(FEW_ROWS, {}), (MANY_ROWS, {}), (None, {"groups": 8, "planes": 2})]
)
def test_experts_that_are_not_there_give_zeros(tile, multipliers):
    """And are not read: the memory behind the weights may belong to anything."""
    x, w, experts, expected = random_case(2, **multipliers)
    experts[:3], expected[:3] = [3, 2**31 - 1, -(2**31)], 0
    np.testing.assert_array_equal(interpreted(x, w, experts, tile=tile), expected)


def executed(assembly: str, arguments) -> np.ndarray:
    """Register $0 after a kernel's assembly, uint32, of arguments $1, $2 and so on."""
    operations = {
        "mov": lambda x: x,
        "sub": np.subtract,
        "and": np.bitwise_and,
        "xor": np.bitwise_xor,
        "shr": np.right_shift,
        "mad": lambda x, y, z: x * y + z,
    }
    registers = {f"${i + 1}": x for i, x in enumerate(arguments)}
    for line in assembly.strip("{ }").split(";")[1:-1]:  # not the declaration
        name, rest = line.split(maxsplit=1)
        to, *of = rest.split(", ")
        of = [registers[x] if x in registers else np.uint32(int(x, 0)) for x in of]
        registers[to] = operations[name.split(".")[0]](*of)
    return registers["$0"]


@pytest.mark.parametrize("slab", range(4))
def test_the_assembly_gives_the_integers_of_the_interpreter(slab, monkeypatch):
    """Four bytes at a time: all multipliers that there may be, each with bytes of both planes."""
    monkeypatch.setattr(gpu, "_in_assembly", lambda text, arrays: executed(text, bytes_of(arrays)))
    bytes_of = functools.partial(map, lambda x: np.ascontiguousarray(x).view(np.uint32))
    first, second = np.mgrid[:128, :128].astype(np.int8)
    there = first.astype(int) + second <= 127
    digits = np.array([sum(n // 3**k % 3 << 2 * k for k in range(4)) for n in range(81)], np.uint8)
    codes = np.random.default_rng(0).choice(digits, (2, there.sum(), 8))
    multipliers = [np.broadcast_to(m[there][:, None], codes[0].shape) for m in (first, second)]
    for planes in (1, 2):
        arguments = (codes[:planes], multipliers[:planes], slab)
        expected = gpu._summed(*arguments, interpret=True)
        found = gpu._summed(*arguments, interpret=False).view(np.int8)
        np.testing.assert_array_equal(found, expected)
    found = gpu._shifted(codes[0], slab, interpret=False).view(np.int8)
    np.testing.assert_array_equal(found, gpu._shifted(codes[0], slab, interpret=True))


# --- Attention ------------------------------------------------------------------------------------

# Largest difference from float64, relative to the largest |result|: float32 sums lose a few ulps;
# in bfloat16 the softmax weights and the result are rounded to 8 bits.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-7}


def assert_near(y, expected):
    error = np.abs(np.asarray(y, np.float64) - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE[y.dtype.name], f"relative error {error:.2g}"


OPTIONS = {"multiplier": 0.5, "cap": 30.0}


def random_attention(dtype: str, lengths=(1, 100, 300, 0), shape=(2, 5, 192, 32), seed=0):
    """Arguments, and what NumPy makes of them in float64; what must not be seen is huge.

    lengths: tokens of the rows, the new one included, if there is a slot for it
    """
    rng = np.random.default_rng(seed)
    (kv_heads, group, slots, size), batch = shape, len(lengths)
    q = 3 * rng.standard_normal((batch, 1, kv_heads * group, size))
    k, v = rng.standard_normal((2, batch, 1, kv_heads, size))
    keys, values = rng.standard_normal((2, batch, kv_heads, slots, size))
    rounded = functools.partial(lambda a: a.astype(dtype).astype(np.float64))
    q, k, v, keys, values = map(rounded, (q, k, v, keys, values))
    positions = np.array(lengths, np.int32)[:, None] - 1
    frequencies = np.float32(100) ** (np.arange(size // 2, dtype=np.float32) / (-size // 2))
    angles = (positions * frequencies)[:, None, None].astype(np.float64)  # [B, 1, 1, H/2]

    def rotated(x):
        first, second = np.split(x, 2, axis=-1)
        sin, cos = np.sin(angles), np.cos(angles)
        return rounded(
            np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        )

    seen, expected = [keys.copy(), values.copy()], np.zeros((batch, kv_heads, group, size))
    for b, length in enumerate(lengths):
        if 0 < length <= slots:
            for cache, new in zip(seen, (rotated(k), v), strict=True):
                cache[b, :, length - 1] = new[b, 0]
        of_row = rotated(q)[b].reshape(kv_heads, group, size)
        logits = of_row @ seen[0][b, :, :length].swapaxes(1, 2) * OPTIONS["multiplier"]
        weights = np.exp(30 * np.tanh(logits / 30))
        if length:
            weights /= weights.sum(axis=-1, keepdims=True)
        expected[b] = weights @ seen[1][b, :, :length]
        tile_end = -(-length // gpu.SLOTS) * gpu.SLOTS
        for cache in (keys, values, *seen):
            cache[b, :, length:] = 2.0**13
            cache[b, :, tile_end:] = np.nan  # not even read
        for cache in (keys, values):
            cache[b, :, length - 1 : length] = 2.0**13
    expected = [expected.reshape(q.shape), *seen]
    arrays = [jnp.asarray(a, dtype) for a in (q, k, v, keys, values)]
    return [*arrays, jnp.asarray(positions), jnp.asarray(frequencies)], expected


@pytest.mark.parametrize("programs", [1, 1000])  # all of the cache at once, and in 3 parts
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention(dtype, programs, monkeypatch):
    """And the cache that it writes, of which nothing else changes."""
    monkeypatch.setattr(gpu, "ATTENTION_PROGRAMS", programs)
    arguments, (expected, *caches) = random_attention(dtype)
    y, *found = gpu.decode_attention(*arguments, **OPTIONS, interpret=True)
    assert_near(y, expected)
    for cache, before, after in zip(found, arguments[3:5], caches, strict=True):
        np.testing.assert_allclose(cache.astype("float32"), after, rtol=0, atol=TOLERANCE[dtype])
        changed = (cache != before) & ~np.isnan(before)
        assert changed.any(axis=(1, 3)).sum(axis=1).tolist() == [1, 1, 0, 0]


def test_attention_at_the_cap():
    """Logits of 30 and -30: exp(-60) is not lost where there is nothing larger."""
    q = jnp.full((2, 1, 1, 16), 100.0)
    k = jnp.stack([q[0], -q[1]])
    cache = k.swapaxes(1, 2).repeat(64, axis=2)
    values = jnp.arange(64.0)[:, None] * jnp.ones((2, 1, 64, 16))
    v, positions = jnp.array([2.0, 4.0])[:, None, None, None] * jnp.ones(k.shape), [[2], [4]]
    y, *_ = gpu.decode_attention(
        q, k, v, cache, values, jnp.array(positions), jnp.zeros(8),
        multiplier=1.0, cap=30.0, interpret=True,
    )  # fmt: skip
    np.testing.assert_allclose(y[:, 0, 0], [[1] * 16, [2] * 16], rtol=1e-6)


def abstract_attention(batch, heads, kv_heads, slots, size, queries=1, dtypes=("float32",) * 2):
    """Shapes of arguments; dtypes of q, k and v, and of the cache."""
    of_token, of_cache = dtypes
    of = jax.ShapeDtypeStruct
    new = of((batch, queries, kv_heads, size), of_token)
    cache = of((batch, kv_heads, slots, size), of_cache)
    positions, frequencies = of((batch, queries), "int32"), of((size // 2,), "float32")
    q = of((batch, queries, heads, size), of_token)
    return q, new, new, cache, cache, positions, frequencies


def test_attention_shapes_taken():
    def takes(*sizes, **options):
        return gpu.takes_attention(*abstract_attention(*sizes, **options), **OPTIONS)

    assert takes(4, 48, 8, 8192, 128)
    assert takes(1, 6, 1, 64, 128)
    assert not takes(4, 48, 8, 8200, 128), "slots that fill no tile"
    assert not takes(4, 44, 8, 8192, 128), "uneven groups"
    assert not takes(4, 48, 8, 8192, 96), "no power of two"
    assert not takes(4, 48, 8, 8192, 256), "more than shared memory holds"
    assert not takes(4, 48, 8, 8192, 128, queries=2)
    assert not takes(0, 48, 8, 8192, 128)
    assert not takes(4, 48, 8, 8192, 128, dtypes=("bfloat16", "float32"))


def test_attention_has_a_kernel_up_to_the_largest_cap(monkeypatch):
    """exp(-2 cap) must be a float32: with 50 it would be none."""
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    kernel = functools.partial(
        model.attend_and_write.kernel, *abstract_attention(2, 4, 2, 64, 16), multiplier=1.0
    )
    assert kernel(cap=40.0)
    for cap in (0.0, -1.0, 40.1, 50.0, float("nan")):
        assert not kernel(cap=cap)


def test_no_logits_are_planned_where_the_kernel_makes_none():
    config = dataclasses.replace(model.PRESETS["grok-1"], num_layers=1)
    with kernels.compiling_for("gpu"):
        params = runners.abstract_weights(config, model.PRECISIONS["ternary"])
        one, two = (runners.logit_bytes(config, params, 8192, 1, tokens) for tokens in (1, 2))
    assert one == 0 < two


@pytest.mark.parametrize(
    "which, change, message",
    [
        (3, lambda keys: keys[:3], "no kernel for q, k, v and cache float32"),
        (3, lambda keys: keys[..., :16], "no kernel for q"),
        (4, lambda values: values[:, :, :64], r"no kernel for q.*, float32 \[4, 2, 64, 32\]"),
        (1, lambda k: k[:, :, :1], "no kernel for q"),
        (2, lambda v: v.astype("bfloat16"), "no kernel for q"),
        (5, lambda n: n[:3], r"positions is int32 \[3, 1\], expected int32 \[4, 1\]"),
        (6, lambda f: f[1:], r"frequencies is float32 \[15\], expected float32 \[16\]"),
    ],
)
def test_attention_of_arrays_that_do_not_fit(which, change, message):
    arguments = random_attention("float32")[0]
    arguments[which] = change(arguments[which])
    with pytest.raises(ValueError, match=message):
        gpu.decode_attention(*arguments, **OPTIONS, interpret=True)


def test_attention_of_the_model(monkeypatch):
    """A model's step with the kernel is that of plain JAX, its cache too."""
    config = dataclasses.replace(
        model.PRESETS["tiny"], key_size=16, emb_size=96, vocab_size=128, activations="float"
    )
    run = model.make_model(config)
    tokens = jnp.array([[3, 5, 7], [2, 4, 6]])
    params = run.init(jax.random.key(0), tokens)

    def steps():
        memory = model.init_memory(config, 2, 64)
        memory = run.apply(params, None, tokens, memory, jnp.array([3, 2])).model_state
        return run.apply(params, None, tokens[:, :1], memory)

    with kernels.disabled():
        plain = steps()
    interpreted = functools.partial(gpu.decode_attention, interpret=True)
    monkeypatch.setattr(gpu, "decode_attention", interpreted)
    only = {"attend_and_write": kernels.KERNELS["attend_and_write"]}
    monkeypatch.setattr(kernels, "KERNELS", dict.fromkeys(kernels.KERNELS, {}) | only)
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    found = steps()
    near = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
    near(found.logits, plain.logits)
    jax.tree.map(near, found.model_state, plain.model_state)


def test_experts_whose_norm_rounds(monkeypatch):
    """They give what they do where products round, and gradients; and floats to look at."""
    config = dataclasses.replace(factories.EVEN, activations="int15")
    valid = jnp.array([[True, True, False]])
    run = hk.transform(lambda h: model.add_experts(config, h, valid).hidden)
    h = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 40)), jnp.float32)
    params = jax.jit(run.init)(jax.random.key(0), h)

    def outputs(params):
        loss = lambda params: jnp.sum(jnp.sin(run.apply(params, None, h)))  # noqa: E731
        return run.apply(params, None, h), jax.grad(loss)(params)

    def with_kernels(*names):
        only = {name: kernels.KERNELS[name] for name in names}
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "KERNELS", dict.fromkeys(kernels.KERNELS, {}) | only)
            traced = jax.jit(lambda params: outputs(params)).trace(params)
            return str(traced.jaxpr), traced.lower().compile()(params)

    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    for name in ("rms_norm", "rounded_norm", "quantize_rows"):
        monkeypatch.setattr(gpu, name, functools.partial(getattr(gpu, name), interpret=True))
    _, expected = with_kernels("rms_norm", "quantize_rows")
    text, found = with_kernels("rms_norm", "quantize_rows", "rounded_norm")
    assert "rounded_norm" in text
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert captures.names(run.apply, params, None, h)["rms_norm_2"].shape == (1, 3, 40)


# --- Norm -----------------------------------------------------------------------------------------


def random_norm(dtype):
    """x, scale and the norm in float64."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((5, 97)), dtype)
    scale = rng.uniform(0.5, 1.5, 97).astype(np.float32)
    wide = np.asarray(x, np.float64)
    rms = np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5)
    return x, scale, scale * wide / rms


@interpreted_or_not
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norm(dtype, interpret):
    x, scale, expected = random_norm(dtype)
    y = gpu.rms_norm(x, scale, 1e-5, interpret=interpret)
    assert y.dtype == x.dtype
    assert_near(y, expected)
    h = x[::-1] * 3
    added = gpu.added_norm(h, x, scale, 1e-5, interpret=interpret)
    assert added.dtype == x.dtype
    assert_near(added, np.asarray(h, np.float64) + expected)
    if dtype == "bfloat16":  # what is added is rounded to it, as if there were two launches
        np.testing.assert_array_equal(added, h + y)


@interpreted_or_not
@pytest.mark.parametrize("activations", ["int8", "int15"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_norm_that_rounds(dtype, activations, interpret, monkeypatch):
    """As the two kernels do, one after the other: to the same bits."""
    x, scale, _ = random_norm(dtype)
    x = x.at[2].set(0)
    rounding = functools.partial(gpu.quantize_rows, interpret=interpret)
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    monkeypatch.setattr(gpu, "quantize_rows", rounding)
    rows = gpu.rms_norm(x, scale, 1e-5, interpret=interpret)
    expected = quantize.RoundedRows.of(rows, activations)
    found = gpu.rounded_norm(x, scale, 1e-5, activations, interpret=interpret)
    for y, of_two in zip(found, jax.tree.leaves(expected), strict=True):
        assert y.dtype == of_two.dtype
        np.testing.assert_array_equal(y, of_two)
    halves = np.split(np.asarray(found[1], np.int64), found[1].shape[1] // 97, axis=1)
    integers = sum(half * 128**i for i, half in enumerate(halves[::-1]))
    np.testing.assert_allclose(integers * found[2], rows, rtol=0, atol=0.51 * found[2].max())


def test_rows_that_do_not_fit():
    x, scale, _ = random_norm("float32")
    with pytest.raises(ValueError, match=r"h is float32 \[4, 97\], expected float32 \[5, 97\]"):
        gpu.added_norm(x[1:], x, scale, 1e-5, interpret=True)
    with pytest.raises(ValueError, match=r"scale is float32 \[96\], expected float32 \[97\]"):
        gpu.rms_norm(x, scale[1:], 1e-5, interpret=True)
    with pytest.raises(ValueError, match=r"rms_norm takes rows of rank 2, found \[97\]"):
        gpu.rms_norm(x[0], scale, 1e-5, interpret=True)
    with pytest.raises(ValueError, match="quantize_rows takes rows of rank 2"):
        gpu.quantize_rows(x[None], 127, jnp.int8, interpret=True)


@pytest.mark.parametrize("activations", ["int8", "int15"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding(dtype, activations, monkeypatch):
    """To the integers of plain JAX, through the same `quantize_rows`."""
    x = random_norm(dtype)[0].at[2].set(0)
    plain = quantize.quantize_rows(x, None, activations)
    interpreted = functools.partial(gpu.quantize_rows, interpret=True)
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    monkeypatch.setattr(gpu, "quantize_rows", interpreted)
    integers, step = quantize.quantize_rows(x, None, activations)
    assert integers.dtype == plain[0].dtype
    np.testing.assert_array_equal(integers, plain[0])
    np.testing.assert_array_equal(step, plain[1])


def test_halves_round_to_even():
    x = np.array([-63.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49999997, -0.49999997], np.float32)
    np.testing.assert_array_equal(gpu._round(x), np.round(x))


# --- Router ---------------------------------------------------------------------------------------


@interpreted_or_not
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_router(dtype, interpret):
    """Logits, probabilities and choices of plain JAX; of equal probabilities the first."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((3, 1500)), dtype).at[1].set(0)
    w = jnp.asarray(random.standard_normal((1500, 8)) / 30, jnp.float32)
    valid = jnp.array([True, True, False])
    with kernels.disabled():
        expected = model.routed(x, w, valid, selected=3)
    found = gpu.route(x, w, valid, selected=3, interpret=interpret)
    for y, plain in zip(found, expected, strict=True):
        assert y.dtype == plain.dtype
        np.testing.assert_allclose(y, plain, rtol=0, atol=2e-6)
    assert found[3][1:].tolist() == [[0, 1, 2], [-1, -1, -1]]


def test_what_the_router_takes():
    def takes(rows, experts, dtype="float32"):
        x, w = jax.ShapeDtypeStruct((rows, 96), dtype), jax.ShapeDtypeStruct((96, experts), dtype)
        return gpu.takes_route(x, w, jax.ShapeDtypeStruct((rows,), bool), selected=2)

    assert takes(1, 8) and takes(16, 2)
    assert not takes(17, 8), "rows that would each read the matrix"
    assert not takes(0, 8), "no rows"
    assert not takes(1, 12), "no power of two"
    assert not takes(1, 8, "bfloat16")
    x, w = jnp.zeros((2, 96)), jnp.zeros((97, 8))
    with pytest.raises(ValueError, match=r"w is float32 \[97, 8\], expected float32 \[96, 8\]"):
        gpu.route(x, w, jnp.ones(2, bool), selected=2, interpret=True)
    with pytest.raises(ValueError, match=r"valid is bool \[3\], expected bool \[2\]"):
        gpu.route(x, w[:96], jnp.ones(3, bool), selected=2, interpret=True)


# --- For CUDA -------------------------------------------------------------------------------------


def lowered_for_cuda(f, *shapes) -> str:
    """The program for an H200, of arguments (shape, dtype): no GPU takes part."""
    device = AbstractDevice("NVIDIA H200", 132, "gpu")
    mesh = AbstractMesh((1, 1), ("data", "model"), abstract_device=device)
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("blocks, rows", [(2, 1), (5, 16), (24, 128), (1, 1000)])
@pytest.mark.parametrize(
    "inputs, outputs, group, planes",
    [(6144, 32768, None, 1), (32768, 6144, None, 1), (6144, 32768, 256, 1)]
    + [(32768, 6144, 64, 2), (6144, 32768, None, 2)],
)
def test_lowers_for_cuda(blocks, rows, inputs, outputs, group, planes):
    shapes = [
        ((blocks, rows, inputs), jnp.int8),
        ((8, outputs, planes * inputs // 4), jnp.uint8),
        ((blocks,), jnp.int32),
    ]
    if group or planes == 2:
        shapes.append(((8, outputs, inputs // (group or inputs), planes), jnp.int8))
    text = lowered_for_cuda(lambda x, w, e, *m: gpu.ternary_sums(x, w, e, 64, *m), *shapes)
    assert text.count("__gpu$xla.gpu.triton") == 1
    assert ("ternary_few_rows" if rows <= 16 else "ternary_many_rows") in text


@pytest.mark.parametrize("batch, slots, dtype", [(1, 8192, "bfloat16"), (3, 1024, "float32")])
def test_attention_lowers_for_cuda(batch, slots, dtype):
    arguments = abstract_attention(batch, 48, 8, slots, 128, dtypes=(dtype, dtype))
    attention = functools.partial(gpu.decode_attention, multiplier=0.088, cap=30.0)
    text = lowered_for_cuda(attention, *((x.shape, x.dtype) for x in arguments))
    assert text.count("__gpu$xla.gpu.triton") == 2


def test_norm_and_rounding_lower_for_cuda():
    x = ((2, 6144), jnp.bfloat16)
    norm = functools.partial(gpu.rms_norm, eps=1e-5)
    text = lowered_for_cuda(norm, x, ((6144,), jnp.float32))
    assert text.count("__gpu$xla.gpu.triton") == 1
    text = lowered_for_cuda(lambda x: gpu.quantize_rows(x, 127, jnp.int8), x)
    assert text.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.parametrize("rows, weights", [(1, "ternary"), (4, "ternary-fit"), (2, "ternary2-64")])
def test_the_decode_step_lowers_for_cuda(rows, weights, monkeypatch):
    """Kernels of a layer: products and what rounds their rows, norms, attention, the router."""
    config = model.LanguageModelConfig(
        vocab_size=512, emb_size=2048, num_layers=2, num_q_heads=32, num_kv_heads=4, key_size=64,
        sequence_len=256, widening_factor=3, activations="int8",
    )  # fmt: skip
    params = runners.abstract_weights(config, model.PRECISIONS[weights])
    slots = jax.eval_shape(lambda: runners.empty_slots(config, rows, config.sequence_len))
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    step = functools.partial(runners.decode_step, model.make_model(config), eos=2)
    leaves, structure = jax.tree.flatten((params, slots))
    text = lowered_for_cuda(
        lambda *leaves: step(*jax.tree.unflatten(structure, leaves)),
        *((leaf.shape, leaf.dtype) for leaf in leaves),
    )
    of_layer = {
        "ternary_few_rows": 3,
        "gated_dot": 1,
        "quantize_rows": 2,
        "rounded_norm": 2,
        "added_norm": 2,
        "decode_attention": 1,
        "joined_attention": 1,
        "route": 1,
    }
    calls = [line for line in text.splitlines() if "__gpu$xla.gpu.triton" in line]
    for name, count in of_layer.items():
        found = sum(f'"{name}"' in line for line in calls)
        assert found == 2 * count, (name, found)
    assert sum('"rms_norm"' in line for line in calls) == 1  # the last one, which feeds no product


@needs_gpu
@pytest.mark.parametrize("rows", [1, 3, 16, 32, 100, 128, 300])
def test_compiled_sums_are_exact(rows):
    for groups, planes in ((None, 1), (1, 2), (24, 1), (48, 2)):
        x, w, experts, expected = random_case(rows, 3072, 1024, groups, planes)
        y = gpu.ternary_sums(x, w.packed, experts, w.block, w.multipliers)
        np.testing.assert_array_equal(y, expected)


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_attention(dtype):
    arguments, expected = random_attention(dtype, (1, 777, 2048, 0), (8, 6, 2048, 128))
    for found, of_numpy in zip(gpu.decode_attention(*arguments, **OPTIONS), expected, strict=True):
        there = ~np.isnan(of_numpy)
        assert_near(np.where(there, found, 0), np.where(there, of_numpy, 0))


@needs_gpu
@pytest.mark.parametrize("activations", ["int8", "int15"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_norm_and_rounding(dtype, activations):
    """A GPU divides less exactly: integers may be one off where the quotient is near a half."""
    x, scale, expected = random_norm(dtype)
    y = gpu.rms_norm(x, scale, 1e-5)
    assert_near(y, expected)
    integers, step = quantize.quantize_rows(y, None, activations)
    exact = np.asarray(y, np.float64) / np.asarray(step)
    assert np.abs(np.asarray(integers, np.int64) - exact).max() <= 0.51
