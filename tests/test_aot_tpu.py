"""Steps compiled for TPUs that are not here: what a change must not bring back.

Each of these faults was there, and no test on a CPU could see it.
"""

import dataclasses
import functools
import re

import pytest

import aot
import model

LAYER = dataclasses.replace(model.PRESETS["grok-1"], num_layers=1, vocab_size=1024)

pytestmark = pytest.mark.skipif(
    aot.missing_compiler("tpu") is not None,
    reason="libtpu is not installed; pip install -r requirements-aot.txt",
)


@functools.cache
def compiled(step, weights="ternary", slots=1):
    mesh = aot.described_mesh("v5e", 1, 8)
    return aot.compiled_steps(LAYER, model.PRECISIONS[weights], mesh, slots, [step])[step]


def check(step, products, most_added):
    """All products are kernels, which read the experts where they lie."""
    found = aot.Compiled.of(step)
    assert found.kernels == {"slabs": 4, "ternary_sums": products}
    for op in aot.operations(step.as_text()):
        if re.match("copy|(dynamic-)?slice", op.opcode):  # to another layout, or into the VMEM
            assert "u8[8," not in op.text and "s8[8," not in op.text, op.text
    assert found.added < most_added
    return found


def test_a_decode_step_on_tpus():
    """Nothing loops, and little is in between: 1.6 MB."""
    found = check(compiled("decode"), 4, 10e6)
    assert found.loops == 0
    assert found.operations < 210  # 196


def test_a_decode_step_of_many_requests():
    """Whose experts XLA would fetch into the VMEM, needed or not, if they were not kept in HBM."""
    assert check(compiled("decode", slots=8), 4, 10e6).loops == 0


@pytest.mark.slow
def test_a_decode_step_with_multipliers():
    """Of groups of inputs, in two planes."""
    assert check(compiled("decode", "ternary2-128"), 4, 10e6).loops == 0


@pytest.mark.slow
def test_a_chunk_of_a_prompt_on_tpus():
    """Attention alone loops, over blocks of the cache."""
    found = check(compiled("prefill"), 7, 150e6)
    assert found.loops == 1
    assert found.collective_bytes < 95e6  # 88; with rows of padding 110
