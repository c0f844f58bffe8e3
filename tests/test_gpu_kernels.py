"""GPU kernels: interpreted on a CPU against NumPy, and lowered for CUDA at Grok-1's own sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 (NumPy learns "bfloat16" from it)
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import kernels
import model
import quantize
import runners
from kernels import gpu
from kernels.gpu import FEW_ROWS, MANY_ROWS

EXPERTS = [2, -1, 0, 2, 1]  # of the blocks: repeated, skipped, and not in order


def random_case(rows, inputs=1024, outputs=256, experts=EXPERTS, seed=0):
    """x, weights, the experts of the blocks, and what NumPy makes of them."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, (len(experts), rows, inputs)).astype(np.int8)
    trits = rng.integers(-1, 2, (3, inputs, outputs)).astype(np.int8)
    w = quantize.pack(trits, None, gpu.BLOCK)
    assert (quantize.unpack(w) == trits).all()
    experts = np.array(experts, np.int32)
    sums = x.astype(np.int64) @ trits[experts].astype(np.int64)
    return x, w, experts, np.where(experts[:, None, None] < 0, 0, sums)


def interpreted(x, w, experts, **options):
    sums = functools.partial(gpu.ternary_sums, block=w.block, interpret=True, **options)
    y = jax.jit(sums)(x, w.packed, experts)
    assert y.dtype == jnp.int32
    return y


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 32, 128, 130])
def test_sums_are_exact(rows):
    x, w, experts, expected = random_case(rows)
    np.testing.assert_array_equal(interpreted(x, w, experts), expected)


@pytest.mark.parametrize("programs", [1, 1000])  # 1 and 12 parts of 12
@pytest.mark.parametrize("tile, outputs", [(FEW_ROWS, 64), (MANY_ROWS, 32)])
def test_tiles_and_parts_change_nothing(tile, outputs, programs):
    x, w, experts, expected = random_case(9, inputs=3072)
    tile = dataclasses.replace(tile, outputs=outputs, programs=programs, rows=8)
    np.testing.assert_array_equal(interpreted(x, w, experts, tile=tile), expected)


def test_largest_sums():
    """The longest rows, all at the ends of int8: masked codes are up to 128 times too large."""
    trits = np.array([-1, 0, 1], np.int8)[:, None, None]
    w = quantize.pack(np.broadcast_to(trits, (3, 32768, 128)), None, gpu.BLOCK)
    x = np.full((3, 1, 32768), -128, np.int8)
    y = interpreted(x, w, np.arange(3, dtype=np.int32))
    np.testing.assert_array_equal(y, np.broadcast_to(trits * np.int32(-(1 << 22)), y.shape))


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
    assert not takes((2, 1, 6144), (8, 32768 - 64, 1536)), "outputs that fill no tile"
    assert not takes((2, 1, 6142), (8, 32768, 1536)), "padding"
    assert not takes((2, 1, 6272), (8, 32768, 1568)), "half a block"
    assert not takes((2, 0, 6144), (8, 32768, 1536)), "no rows"
    assert not takes((0, 1, 6144), (8, 32768, 1536)), "no blocks"
    assert not takes((1, 6144), (8, 32768, 1536)), "no axis of blocks"
    assert not gpu.takes((2, 1, 6144), (8, 32768, 1536), 32), "smaller blocks"


def test_shapes_that_are_refused():
    x, w, experts, _ = random_case(1, outputs=192)
    with pytest.raises(ValueError, match=r"no kernel for \(5, 1, 1024\) times \(3, 192, 256\)"):
        interpreted(x, w, experts)
    x, w, experts, _ = random_case(1)
    with pytest.raises(ValueError, match=r"experts is int32 \[4\], expected int32 \[5\]"):
        interpreted(x, w, experts[1:])
    with pytest.raises(ValueError, match=r"x is float32 .*, expected int8"):
        interpreted(x.astype(np.float32), w, experts)
    with pytest.raises(ValueError, match=r"packed is int8 .*, expected uint8"):
        interpreted(x, dataclasses.replace(w, packed=w.packed.view(np.int8)), experts)


@pytest.mark.parametrize("tile", [FEW_ROWS, MANY_ROWS])
def test_experts_that_are_not_there_give_zeros(tile):
    """And are not read: the memory behind the weights may belong to anything."""
    x, w, experts, expected = random_case(2)
    experts[:3], expected[:3] = [3, 2**31 - 1, -(2**31)], 0
    np.testing.assert_array_equal(interpreted(x, w, experts, tile=tile), expected)


# --- Attention ------------------------------------------------------------------------------------

# Largest difference from float64, relative to the largest |result|: float32 sums lose a few ulps;
# in bfloat16 the softmax weights and the result are rounded to 8 bits.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-7}


def assert_near(y, expected):
    error = np.abs(np.asarray(y, np.float64) - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE[y.dtype.name], f"relative error {error:.2g}"


def random_attention(dtype: str, lengths=(1, 100, 300, 0), shape=(2, 5, 192, 32), seed=0):
    """q, k, v, lengths and soft-capped attention in float64; what must not be seen is huge."""
    rng = np.random.default_rng(seed)
    (kv_heads, group, slots, size), batch = shape, len(lengths)
    q = 3 * rng.standard_normal((batch, kv_heads, group, size))
    k, v = rng.standard_normal((2, batch, kv_heads, slots, size))
    q, k, v = (a.astype(dtype).astype(np.float64) for a in (q, k, v))
    expected = np.zeros(q.shape)
    for b, length in enumerate(lengths):
        logits = q[b] @ k[b, :, :length].swapaxes(1, 2) * 0.5
        weights = np.exp(30 * np.tanh(logits / 30))
        if length:
            weights /= weights.sum(axis=-1, keepdims=True)
        expected[b] = weights @ v[b, :, :length]
        tile_end = -(-length // gpu.SLOTS) * gpu.SLOTS
        for cache in (k, v):
            cache[b, :, length:] = 1e4
            cache[b, :, tile_end:] = np.nan  # not even read
    q, expected = (a.reshape(batch, kv_heads * group, size) for a in (q, expected))
    return (*(jnp.asarray(a, dtype) for a in (q, k, v)), jnp.array(lengths)), expected


@pytest.mark.parametrize("programs", [1, 1000])  # all of the cache at once, and in 3 parts
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention(dtype, programs, monkeypatch):
    monkeypatch.setattr(gpu, "ATTENTION_PROGRAMS", programs)
    arguments, expected = random_attention(dtype)
    assert_near(gpu.decode_attention(*arguments, 0.5, 30.0, interpret=True), expected)


def test_attention_at_the_cap():
    """Logits of 30 and -30: exp(-60) is not lost where there is nothing larger."""
    q = jnp.full((2, 1, 16), 100.0)
    k = jnp.stack([q[0], -q[1]])[:, :, None].repeat(64, axis=2)
    v = jnp.arange(64.0)[:, None] * jnp.ones((2, 1, 64, 16))
    y = gpu.decode_attention(q, k, v, jnp.array([3, 5]), 1.0, 30.0, interpret=True)
    np.testing.assert_allclose(y[:, 0, 0], [1, 2], rtol=1e-6)


def test_attention_shapes_taken():
    takes = gpu.takes_attention
    assert takes((4, 48, 128), (4, 8, 8192, 128))
    assert takes((1, 6, 128), (1, 1, 64, 128))
    assert not takes((4, 48, 128), (4, 8, 8200, 128)), "slots that fill no tile"
    assert not takes((4, 44, 128), (4, 8, 8192, 128)), "uneven groups"
    assert not takes((4, 48, 96), (4, 8, 8192, 96)), "no power of two"
    assert not takes((4, 48, 256), (4, 8, 8192, 256)), "more than shared memory holds"
    with pytest.raises(ValueError, match=r"no kernel for q \(.*\) and cache"):
        q, k, v, lengths = random_attention("float32")[0]
        gpu.decode_attention(q, k[:, :, 1:], v, lengths, 1.0, 30.0)


def test_attention_has_a_kernel_up_to_the_largest_cap(monkeypatch):
    """exp(-2 cap) must be a float32: with 50 it would be none."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q, k = jnp.zeros((2, 1, 4, 16)), jnp.zeros((2, 2, 64, 16))
    assert kernels.attention_kernel(q, k, 40.0) is gpu.attend
    for cap in (0.0, -1.0, 40.1, 50.0, float("nan")):
        assert kernels.attention_kernel(q, k, cap) is None


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v, n: (q, k[:3], v, n), "no kernel for q"),
        (lambda q, k, v, n: (q, k[..., :16], v, n), "no kernel for q"),
        (lambda q, k, v, n: (q, k[0], v, n), "no kernel for q"),
        (lambda q, k, v, n: (q, k[:, :0], v, n), "no kernel for q"),
        (lambda q, k, v, n: (q, k, v[:, :, :64], n), r"v is float32 \[4, 2, 64, 32\], expected"),
        (lambda q, k, v, n: (q, k, v.astype("bfloat16"), n), "v is bfloat16 .*, expected float32"),
        (lambda q, k, v, n: (q, k.astype("bfloat16"), v, n), "k is bfloat16 .*, expected float32"),
        (lambda q, k, v, n: (q, k, v, n[:3]), r"lengths is int32 \[3\], expected int32 \[4\]"),
    ],
)
def test_attention_of_arrays_that_do_not_fit(change, message):
    arguments = change(*random_attention("float32")[0])
    with pytest.raises(ValueError, match=message):
        gpu.decode_attention(*arguments, 0.5, 30.0, interpret=True)


# --- Norm -----------------------------------------------------------------------------------------


def random_norm(dtype):
    """x, scale and the norm in float64."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((5, 97)), dtype)
    scale = rng.uniform(0.5, 1.5, 97).astype(np.float32)
    wide = np.asarray(x, np.float64)
    rms = np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5)
    return x, scale, scale * wide / rms


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norm(dtype):
    x, scale, expected = random_norm(dtype)
    y = gpu.rms_norm(x, scale, 1e-5, interpret=True)
    assert y.dtype == x.dtype
    assert_near(y, expected)


def test_rows_that_do_not_fit():
    x, scale, _ = random_norm("float32")
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
    monkeypatch.setattr(kernels, "rounding_kernel", lambda: interpreted)
    integers, step = quantize.quantize_rows(x, None, activations)
    assert integers.dtype == plain[0].dtype
    np.testing.assert_array_equal(integers, plain[0])
    np.testing.assert_array_equal(step, plain[1])


def test_halves_round_to_even():
    x = np.array([-63.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49999997, -0.49999997], np.float32)
    np.testing.assert_array_equal(gpu._round(x), np.round(x))


# --- For CUDA -------------------------------------------------------------------------------------


def lowered_for_cuda(f, *shapes) -> str:
    """The program for an H200, of arguments (shape, dtype): no GPU takes part."""
    device = AbstractDevice("NVIDIA H200", 132, "gpu")
    mesh = AbstractMesh((1, 1), ("data", "model"), abstract_device=device)
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("blocks, rows", [(2, 1), (5, 16), (24, 128), (1, 1000)])
@pytest.mark.parametrize("inputs, outputs", [(6144, 32768), (32768, 6144)])
def test_lowers_for_cuda(blocks, rows, inputs, outputs):
    def f(x, packed, experts):
        return gpu.ternary_sums(x, packed, experts, 64)

    text = lowered_for_cuda(
        f,
        ((blocks, rows, inputs), jnp.int8),
        ((8, outputs, inputs // 4), jnp.uint8),
        ((blocks,), jnp.int32),
    )
    assert text.count("__gpu$xla.gpu.triton") == 1
    assert ("ternary_few_rows" if rows <= 16 else "ternary_many_rows") in text


@pytest.mark.parametrize("batch, slots, dtype", [(1, 8192, "bfloat16"), (3, 1024, "float32")])
def test_attention_lowers_for_cuda(batch, slots, dtype):
    cache = ((batch, 8, slots, 128), dtype)
    attention = functools.partial(gpu.decode_attention, multiplier=0.088, cap=30.0)
    text = lowered_for_cuda(
        attention, ((batch, 48, 128), dtype), cache, cache, ((batch,), jnp.int32)
    )
    assert text.count("__gpu$xla.gpu.triton") == 1


def test_norm_and_rounding_lower_for_cuda():
    x = ((2, 6144), jnp.bfloat16)
    norm = functools.partial(gpu.rms_norm, eps=1e-5)
    text = lowered_for_cuda(norm, x, ((6144,), jnp.float32))
    assert text.count("__gpu$xla.gpu.triton") == 1
    text = lowered_for_cuda(lambda x: gpu.quantize_rows(x, 127, jnp.int8), x)
    assert text.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.parametrize("rows", [1, 4])
def test_the_decode_step_lowers_for_cuda(rows, monkeypatch):
    """Kernels of a layer: seven products and what rounds their rows, four norms, attention."""
    config = model.LanguageModelConfig(
        vocab_size=512, emb_size=2048, num_layers=2, num_q_heads=32, num_kv_heads=4, key_size=64,
        sequence_len=256, widening_factor=3, activations="int8",
    )  # fmt: skip
    params = runners.abstract_weights(config, model.PRECISIONS["ternary"])
    slots = jax.eval_shape(lambda: runners.empty_slots(config, rows, config.sequence_len))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    step = functools.partial(runners.decode_step, model.make_model(config), eos=2)
    leaves, structure = jax.tree.flatten((params, slots))
    text = lowered_for_cuda(
        lambda *leaves: step(*jax.tree.unflatten(structure, leaves)),
        *((leaf.shape, leaf.dtype) for leaf in leaves),
    )
    of_layer = {"ternary_few_rows": 7, "quantize_rows": 7, "rms_norm": 4, "decode_attention": 1}
    calls = [line for line in text.splitlines() if "__gpu$xla.gpu.triton" in line]
    for name, count in of_layer.items():
        found = sum(f'"{name}"' in line for line in calls)
        assert found == 2 * count + (name == "rms_norm"), (name, found)


needs_gpu = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="runs compiled kernels; set JAX_PLATFORMS=cuda"
)


@needs_gpu
@pytest.mark.parametrize("rows", [1, 3, 16, 32, 100, 128, 300])
def test_compiled_sums_are_exact(rows):
    x, w, experts, expected = random_case(rows, inputs=3072, outputs=1024)
    y = gpu.ternary_sums(x, w.packed, experts, w.block)
    np.testing.assert_array_equal(y, expected)


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_attention(dtype):
    arguments, expected = random_attention(dtype, (1, 777, 2048, 0), (8, 6, 2048, 128))
    assert_near(gpu.decode_attention(*arguments, 0.5, 30.0), expected)


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
