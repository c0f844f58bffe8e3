"""GPU kernels: interpreted on a CPU against NumPy, and lowered for CUDA at Grok-1's own sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import gpu_kernels
import quantize
from gpu_kernels import FEW_ROWS, MANY_ROWS

EXPERTS = [2, -1, 0, 2, 1]  # of the blocks: repeated, skipped, and not in order


def random_case(rows, inputs=1024, outputs=256, experts=EXPERTS, seed=0):
    """x, weights, the experts of the blocks, and what NumPy makes of them."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, (len(experts), rows, inputs)).astype(np.int8)
    trits = rng.integers(-1, 2, (3, inputs, outputs)).astype(np.int8)
    w = quantize.pack(trits, None, gpu_kernels.BLOCK)
    assert (quantize.unpack(w) == trits).all()
    experts = np.array(experts, np.int32)
    sums = x.astype(np.int64) @ trits[experts].astype(np.int64)
    return x, w, experts, np.where(experts[:, None, None] < 0, 0, sums)


def interpreted(x, w, experts, **options):
    y = gpu_kernels.ternary_sums(x, w.packed, experts, w.block, interpret=True, **options)
    assert y.dtype == jnp.int32
    return y


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 32, 128, 130])
def test_sums_are_exact(rows):
    x, w, experts, expected = random_case(rows)
    np.testing.assert_array_equal(interpreted(x, w, experts), expected)


@pytest.mark.parametrize("programs", [1, 130, 1000])  # 1, some and 12 parts of 12
@pytest.mark.parametrize("tile, outputs", [(FEW_ROWS, 64), (MANY_ROWS, 32)])
def test_tiles_and_parts_change_nothing(tile, outputs, programs):
    x, w, experts, expected = random_case(9, inputs=3072)
    tile = dataclasses.replace(tile, outputs=outputs, programs=programs, rows=8)
    np.testing.assert_array_equal(interpreted(x, w, experts, tile=tile), expected)


def test_largest_sums():
    """The longest rows, all at the ends of int8: masked codes are up to 128 times too large."""
    trits = np.array([-1, 0, 1], np.int8)[:, None, None]
    w = quantize.pack(np.broadcast_to(trits, (3, 32768, 128)), None, gpu_kernels.BLOCK)
    x = np.full((3, 1, 32768), -128, np.int8)
    y = interpreted(x, w, np.arange(3, dtype=np.int32))
    np.testing.assert_array_equal(y, np.broadcast_to(trits * np.int32(-(1 << 22)), y.shape))


@pytest.mark.parametrize(
    "programs, steps, wanted, parts",
    [(512, 24, 512, 1), (48, 24, 512, 12), (8, 24, 512, 24), (96, 128, 512, 8), (1, 7, 2, 7)],
)
def test_parts_of_the_inputs(programs, steps, wanted, parts):
    assert gpu_kernels._splits(programs, steps, wanted) == parts


def test_shapes_taken():
    takes = functools.partial(gpu_kernels.takes, block=64)
    assert takes((2, 1, 6144), (8, 32768, 1536))
    assert takes((4, 128, 32768), (8, 6144, 8192))
    assert takes((1, 1000, 256), (1, 128, 64))
    assert not takes((2, 1, 6144), (8, 32768 - 64, 1536)), "outputs that fill no tile"
    assert not takes((2, 1, 6142), (8, 32768, 1536)), "padding"
    assert not takes((2, 1, 6272), (8, 32768, 1568)), "half a block"
    assert not takes((2, 0, 6144), (8, 32768, 1536)), "no rows"
    assert not takes((0, 1, 6144), (8, 32768, 1536)), "no blocks"
    assert not takes((1, 6144), (8, 32768, 1536)), "no axis of blocks"
    assert not gpu_kernels.takes((2, 1, 6144), (8, 32768, 1536), 32), "smaller blocks"


def test_shapes_that_are_refused():
    x, w, experts, _ = random_case(1, outputs=192)
    with pytest.raises(ValueError, match=r"no kernel for \(5, 1, 1024\) times \(3, 192, 256\)"):
        interpreted(x, w, experts)


# --- For CUDA -------------------------------------------------------------------------------------


def lowered_for_cuda(f, *shapes) -> str:
    """The program for an H200, of arguments (shape, dtype): no GPU takes part."""
    device = AbstractDevice("NVIDIA H200", 132, "gpu")
    mesh = AbstractMesh((1,), ("devices",), abstract_device=device)
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("blocks, rows", [(2, 1), (5, 16), (24, 128), (1, 1000)])
@pytest.mark.parametrize("inputs, outputs", [(6144, 32768), (32768, 6144)])
def test_lowers_for_cuda(blocks, rows, inputs, outputs):
    def f(x, packed, experts):
        return gpu_kernels.ternary_sums(x, packed, experts, 64)

    text = lowered_for_cuda(
        f,
        ((blocks, rows, inputs), jnp.int8),
        ((8, outputs, inputs // 4), jnp.uint8),
        ((blocks,), jnp.int32),
    )
    assert text.count("__gpu$xla.gpu.triton") == 1
    assert ("ternary_few_rows" if rows <= 16 else "ternary_many_rows") in text


needs_gpu = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="runs compiled kernels; set JAX_PLATFORMS=cuda"
)


@needs_gpu
@pytest.mark.parametrize("rows", [1, 3, 16, 32, 100, 128, 300])
def test_compiled_sums_are_exact(rows):
    x, w, experts, expected = random_case(rows, inputs=3072, outputs=1024)
    y = gpu_kernels.ternary_sums(x, w.packed, experts, w.block)
    np.testing.assert_array_equal(y, expected)
