"""How long Grok-1 takes to compile, all 64 layers, from shapes: no array is allocated.

    python -m benchmarks.compilation 1
    python -m benchmarks.compilation 8

A decode step and a chunk of a prompt, int8 activations, ternary weights, on a mesh of that many
devices, virtual ones of the CPU. Prints a line of JSON for each.
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import model
import runners
import sharding
from benchmarks import timer

MESHES = (1, 8)
PARTS = ("trace", "lower", "compile")
CONFIG = dataclasses.replace(model.PRESETS["grok-1"], activations="int8")


def placed(tree, shardings):
    """The same shapes, with where they lie."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
    )


def steps(runner: runners.ModelRunner) -> dict:
    """The two steps as `runners.InferenceRunner` compiles them, and their abstract arguments."""
    config, mesh = runner.config, runner.mesh
    params = runners.abstract_weights(config, model.PRECISIONS["ternary"])
    params = placed(params, sharding.parameter_shardings(mesh, params))
    slots = jax.eval_shape(functools.partial(runners.empty_slots, config, 1, config.sequence_len))
    where = runners.slots_shardings(mesh, slots)
    slots = placed(slots, where)
    prefill, decode = runners.jit_steps(runner, where, where.memory)
    size = runners.PAD_SIZES[-1]
    number = jax.ShapeDtypeStruct((), jnp.int32)
    prompt = (jax.ShapeDtypeStruct((1, size), jnp.int32), number, number)
    return {
        "decode": (decode, (params, slots)),
        f"prefill of {size}": (prefill, (params, slots.memory, *prompt)),
    }


def stages(step, arguments) -> dict:
    """Seconds of each of PARTS, and the instructions that are left in the end."""
    times = [time.perf_counter()]
    traced = step.trace(*arguments)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    spent = {f"{name}_s": b - a for name, a, b in zip(PARTS, times, times[1:], strict=False)}
    return spent | {"instructions": compiled.as_text().count(" = ")}


def full(report, limits) -> None:
    """A row for each step on each of MESHES, in processes of their own."""
    for devices in MESHES:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.compilation", str(devices)],
            env=environment,
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        for line in done.stdout.splitlines():
            report(**json.loads(line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("devices", type=int, help="of the mesh")
    runner = runners.ModelRunner(CONFIG, sharding.make_mesh(1, parser.parse_args().devices))
    with jax.set_mesh(runner.mesh):
        for name, (step, arguments) in steps(runner).items():
            row = stages(step, arguments) | {"processor": timer.processor()}
            seconds = sum(row[f"{part}_s"] for part in PARTS)
            case = f"grok-1 on {runner.mesh.size}, {name}: {row['instructions']} instructions"
            print(json.dumps({"case": case, "ms": seconds * 1e3} | row), flush=True)


if __name__ == "__main__":
    main()
