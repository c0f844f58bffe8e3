"""Compiles a model's steps for accelerators that are not here, and reads what came of it.

The compilers of JAX's plugins for GPUs and TPUs take the description of a device in place of the
device. So memory is known as it is compiled, and which kernels, loops and collectives a step has,
before anybody rents what it runs on. Nothing is said of its speed but the bound that the memory's
bandwidth sets: what the compilers themselves estimate was wrong by factors of up to six.

requirements-aot.txt lists the plugins.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh

import kernels
import model
import quantize
import runners
import sharding
from checkpoint import readable_size

ENVIRONMENT = {  # of libtpu, here, for it reads that when JAX loads it
    "TPU_SKIP_MDS_QUERY": "1",  # it asks no server where it is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # and leaves others theirs
}
for variable, value in ENVIRONMENT.items():
    os.environ.setdefault(variable, value)

# --- Devices --------------------------------------------------------------------------------------


class Device(NamedTuple):
    """An accelerator, by its data sheet.

    platform: "gpu" or "tpu"
    memory: bytes that a program can have; bandwidth: bytes a second that it reads of them
    description: of a GPU, what fills GPU_DESCRIPTION; of a TPU, the shapes of slices with so many
        chips, of which the smallest one that is large enough is taken
    packs: whether its compiler packs large programs, so that those of few layers tell nothing
    """

    platform: str
    memory: int
    bandwidth: float
    description: Mapping
    packs: bool = False


def _gpu(name, memory, bandwidth, capability, cores, shared, l2, clock) -> Device:
    """shared: kB of shared memory of a multiprocessor; l2: MB; clock: GHz"""
    described = {
        "name": name,
        "memory": memory,
        "bandwidth": round(bandwidth),
        "major": capability[0],
        "minor": capability[1],
        "features": "feature_extension: ACCELERATED_FEATURES" if capability >= (9, 0) else "",
        "cores": cores,
        "shared": shared << 10,
        "shared_of_block": (shared - 1) << 10,
        "l2": l2 << 20,
        "clock": clock,
    }
    return Device("gpu", memory, bandwidth, described)


SLICES = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
GiB = 1 << 30

DEVICES = {
    "a100": _gpu("NVIDIA A100-SXM4-80GB", 84_974_239_744, 2.039e12, (8, 0), 108, 164, 40, 1.41),
    "h100": _gpu("NVIDIA H100 80GB HBM3", 85_017_493_504, 3.352e12, (9, 0), 132, 228, 50, 1.98),
    "h200": _gpu("NVIDIA H200 141GB HBM3e", 150_754_820_096, 4.8e12, (9, 0), 132, 228, 50, 1.98),
    "b200": _gpu("NVIDIA B200", 191_506_677_760, 7.7e12, (10, 0), 148, 228, 126, 1.965),
    "v5e": Device("tpu", round(15.75 * GiB), 0.819e12, SLICES, packs=True),  # from 30 MB on
    "v5p": Device("tpu", round(95.74 * GiB), 2.765e12, CUBES),
    "v6e": Device("tpu", round(31.25 * GiB), 1.64e12, SLICES),
}

GPU_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {shared_of_block}
  cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}"
  device_address_bits: 64
  ecc_enabled: true
  name: "{name}"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


def parse_devices(text: str) -> tuple[str, int]:
    """("h200", 8) of "h200x8", and ("v5e", 8) of "v5e-8": so many chips, as JAX counts devices.

    ValueError for what is not in DEVICES, and for more chips than can be described.
    """
    found = re.fullmatch(r"(\w+?)(?:x|-)(\d+)", text.lower())
    name, count = (found[1], int(found[2])) if found else (text, 1)
    if name not in DEVICES or not 1 <= count <= max_count(DEVICES[name]):
        known = ", ".join(DEVICES)
        raise ValueError(
            f"devices are named as in h200x8 or v5e-8, one of {known} and how many chips, up to "
            f"64 GPUs and as many TPUs as a slice has; got {text!r}"
        )
    return name, count


def max_count(device: Device) -> int:
    return 64 if device.platform == "gpu" else max(device.description)


def missing_compiler(platform: str) -> str | None:
    """The distribution that has the compiler for "gpu" or "tpu", if it is not installed."""
    package = {"gpu": "jax_cuda13_plugin", "tpu": "libtpu"}[platform]
    return None if importlib.util.find_spec(package) else package.replace("_", "-")


def described_mesh(name: str, data: int, heads: int) -> Mesh:
    """A mesh of data x heads devices of this name in DEVICES, none of which need be here.

    ValueError without their compiler.
    """
    device, count = DEVICES[name], data * heads
    if package := missing_compiler(device.platform):
        raise ValueError(
            f"compiling for {name} needs {package}, which is not installed; "
            "pip install -r requirements-aot.txt"
        )
    if device.platform == "gpu":
        described = topologies.get_topology_desc(
            name,
            platform="cuda",
            topology=f"1x1x{count}",
            target_config=GPU_DESCRIPTION.format(**device.description),
        )
    else:
        shape = device.description[min(n for n in device.description if n >= count)]
        described = topologies.get_topology_desc(f"{name}:{shape}", platform="tpu")
    devices = np.array(described.devices[:count]).reshape(data, heads)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


# --- What a compiler made -------------------------------------------------------------------------


class Operation(NamedTuple):
    """Something that a compiled program does.

    opcode: of HLO, such as "fusion"
    kernel: the name of a kernel of ours, or ""
    bytes: of what it makes
    times: how often; the product of the trips of the loops that it is in
    choice: whether it is in a branch that may not be taken
    source: where it comes from in the model, as JAX names it
    text: its line
    """

    opcode: str
    kernel: str
    bytes: int
    times: int
    choice: bool
    source: str
    text: str


FREE = {  # take no time of their own
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "call", "while", "conditional"),
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"(pred|[a-z]+\d+)\w*\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def operations(text: str) -> Iterator[Operation]:
    """Each operation of a compiled program, from its text in HLO, with those of its loops,
    branches and calls.

    A loop whose number of trips is not known counts as one trip.
    """
    computations: dict[str, list[str]] = {}
    entry = None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith(" ") and computations:
            lines.append(line)

    def of(name: str, times: int, choice: bool):
        for line in computations[name]:
            if not (found := _LINE.match(line)):
                continue
            opcode = found[2]
            source = (re.search(r'op_name="([^"]*)"', line) or ("", ""))[1]
            kernel = source.split("/")[-2] if source.endswith("/pallas_call") else ""
            kernel = kernel if opcode == "custom-call" else ""
            yield Operation(opcode, kernel, _bytes(found[1]), times, choice, source, line)
            if opcode == "while":
                trips = int((_TRIPS.search(line) or (0, 1))[1])
                (body,) = _called(line, "body")
                yield from of(body, times * trips, choice)
            elif opcode == "conditional":
                for branch in _called(line, "(?:branch|true|false)_computations?"):
                    yield from of(branch, times, True)
            elif opcode == "call":
                (called,) = _called(line, "to_apply")
                yield from of(called, times, choice)

    yield from of(entry, 1, False)


def _called(line: str, attribute: str) -> list[str]:
    """The computations that an attribute names: one, or several in braces."""
    found = re.findall(rf"\b{attribute}=(%[\w.\-]+|\{{[^}}]*\}})", line)
    return re.findall(r"%([\w.\-]+)", " ".join(found))


def _bytes(shape: str) -> int:
    """Of all arrays in a shape's text, such as "(f32[2,3]{1,0}, pred[])"."""
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
        total += int(np.prod([int(n) for n in sizes.split(",") if n], dtype=np.int64)) * bits // 8
    return total


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step as it was compiled for one device, or what a model of more layers makes of it.

    arguments, added, code: bytes of what it is given, of what it needs besides (what it makes, but
        not in place of arguments, and what is in between), and of the program itself
    operations: each is a launch of a GPU, or a few
    kernels: how often each of our kernels runs
    loops: trips of loops in the model; those of sampling do not count
    collectives: how often each kind runs; collective_bytes: what they make, together
    """

    arguments: int
    added: int
    code: int
    operations: int
    kernels: Counter
    loops: int
    collectives: Counter
    collective_bytes: int

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> "Compiled":
        memory = compiled.memory_analysis()
        found = list(operations(compiled.as_text()))
        taken = [op for op in found if not op.choice]
        shared = [(op, _collective(op.opcode)) for op in taken]
        shared = [(op, kind) for op, kind in shared if kind]
        return cls(
            arguments=memory.argument_size_in_bytes,
            added=memory.temp_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes,
            code=memory.generated_code_size_in_bytes,
            operations=sum(op.times for op in taken if _takes_time(op)),
            kernels=_counted((op.kernel, op.times) for op in taken if op.kernel),
            loops=sum(op.times for op in found if op.opcode == "while" and not is_sampling(op)),
            collectives=_counted((kind, op.times) for op, kind in shared),
            collective_bytes=sum(op.times * op.bytes for op, _ in shared),
        )

    def extended(self, shorter: "Compiled", layers: int) -> "Compiled":
        """With so many layers more, of which each adds what this has more than `shorter`."""

        def at(long, short):
            if isinstance(long, Counter):
                return Counter({k: at(long[k], short[k]) for k in long | short})
            return max(0, long + layers * (long - short))

        fields = dataclasses.fields(self)
        return Compiled(
            **{f.name: at(getattr(self, f.name), getattr(shorter, f.name)) for f in fields}
        )


def is_sampling(op: Operation) -> bool:
    """Whether an operation samples a token, outside the model."""
    return "language_model" not in op.source


def _collective(opcode: str) -> str | None:
    if opcode.endswith("-done"):
        return None
    return next((kind for kind in COLLECTIVES if opcode.startswith(kind)), None)


def _takes_time(op: Operation) -> bool:
    return op.opcode not in FREE and not op.opcode.endswith("-done")


def _counted(pairs) -> Counter:
    counts = Counter()
    for name, times in pairs:
        counts[name] += times
    return counts


# --- Steps ----------------------------------------------------------------------------------------


def compiled_steps(
    config: model.LanguageModelConfig,
    precision: quantize.Rules,
    mesh: Mesh,
    slots: int,
    steps: Sequence[str] = ("prefill", "decode"),
) -> dict[str, jax.stages.Compiled]:
    """`runners.lower_steps`, compiled for the devices of a mesh, which need not be here.

    precision: the weights' formats, as in `model.PRECISIONS`
    """
    with kernels.compiling_for(mesh.devices.flat[0].platform):
        runner = runners.ModelRunner(config, mesh)
        params = runners.abstract_weights(config, precision)
        lowered = runners.lower_steps(runner, params, slots, config.sequence_len, steps)
    with _nothing_kept(), concurrent.futures.ThreadPoolExecutor() as threads:
        compiled = threads.map(lambda step: step.compile(), lowered.values())
        return dict(zip(lowered, compiled, strict=True))


@contextlib.contextmanager
def _nothing_kept():
    """Turns off JAX's folder of programs, which it cannot read for a device that is not here."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


FEW_LAYERS = (3, 4)  # not 2: on TPUs that one's memory is up to 0.1 GB off the others' line


def steps_of_all_layers(
    config: model.LanguageModelConfig,
    formats: Mapping[str, str],
    mesh: Mesh,
    slots: int,
    packed: bool = False,
    progress: bool = False,
) -> dict[str, Compiled]:
    """What both steps take with all layers, of what is compiled with few.

    From three layers on, each adds the same.

    formats: {path: format} of all parameters; those of the first layers stand for all others
    packed: compile all layers, for programs of few are not like theirs; this takes some minutes
    progress: says on stderr what is compiled
    """
    few, some = [], (config.num_layers,) if packed else FEW_LAYERS
    for layers in sorted({min(layers, config.num_layers) for layers in some}):
        part = dataclasses.replace(config, num_layers=layers)
        template = model.abstract_params(part)
        paths = [f"{module}/{name}" for module in template for name in template[module]]
        chosen = {path: formats[path] for path in paths}
        if progress:
            what = f"{layers} of {config.num_layers} layers"
            print(f"compiling   {what}, for {mesh.devices.flat[0].device_kind}", file=sys.stderr)
        steps = compiled_steps(part, chosen, mesh, slots)
        few.append({name: Compiled.of(step) for name, step in steps.items()})
    more = config.num_layers - FEW_LAYERS[-1]
    if packed or more <= 0:
        return few[-1]
    return {name: few[1][name].extended(few[0][name], more) for name in few[0]}


# --- The plan -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """What serving takes on each of some devices that need not be here.

    memory: bytes by purpose, as `runners.device_memory` names them: parameters and cache by their
        shapes, what the steps need besides as compiled; "layout" is what the device's memory
        layout adds to arrays, "programs" the code
    steps: "prefill", of the largest chunk, and "decode", as compiled
    token_bytes: that a token of one request reads, at least: weights, and its cache if it is full
    """

    device: Device
    memory: dict[str, int]
    steps: dict[str, Compiled]
    token_bytes: int

    @property
    def limit(self) -> int:
        """Bytes that JAX can have on a device."""
        return round(self.device.memory * (GPU_FRACTION if self.device.platform == "gpu" else 1))

    def lines(self) -> dict[str, str]:
        """For reading."""
        sizes = {name: size for name, size in self.memory.items() if size}
        told = {
            "memory": " + ".join(f"{name} {readable_size(n)}" for name, n in sizes.items()),
            "total": f"{readable_size(sum(sizes.values()))} of {readable_size(self.limit)} on each "
            "device"
            + (f", of which JAX gets {GPU_FRACTION:.0%}" if self.device.platform == "gpu" else ""),
        }
        for name, step in self.steps.items():
            told[name] = f"about {two_digits(step.operations):,} operations: " + ", ".join(
                f"{count:,} {kernel}" for kernel, count in sorted(step.kernels.items())
            )
            told[name] += f"; {step.loops:,} turns of loops" if step.loops else "; no loops"
        for name, step in self.steps.items():
            if step.collectives:
                counts = (f"{n:,} {kind}" for kind, n in sorted(step.collectives.items()))
                told[f"{name} sends"] = (
                    f"{', '.join(counts)}: {readable_size(step.collective_bytes)}"
                )
        seconds = self.token_bytes / self.device.bandwidth
        told["reads"] = (
            f"{readable_size(self.token_bytes)} a token, {1000 * seconds:.2f} ms at best with "
            f"{self.device.bandwidth / 1e12:.2f} TB/s"
        )
        return told


def two_digits(n: int) -> int:
    """n rounded to two digits: with more layers, XLA fuses some of them otherwise."""
    return round(n, 2 - len(str(n)))


GPU_FRACTION = 0.97  # XLA_PYTHON_CLIENT_MEM_FRACTION, as docs/grok-1.md sets it


def make_plan(
    runner: runners.ModelRunner,
    formats: Mapping[str, str],
    name: str,
    slots: int,
    progress: bool = False,
) -> Plan:
    """The plan of a model on a mesh of devices that have this name in DEVICES."""
    with kernels.compiling_for(DEVICES[name].platform):
        config, mesh = runner.config, runner.mesh
        params = runners.abstract_weights(config, formats)
        needed = runners.device_memory(runner, params, slots, config.sequence_len)
        packs = DEVICES[name].packs
        steps = steps_of_all_layers(config, formats, mesh, slots, packs, progress)
        shapes = needed["weights"] + needed["embeddings"] + needed["cache"]
        row = jax.eval_shape(functools.partial(runners.empty_slots, config, 1, config.sequence_len))
        row_bytes = sharding.device_bytes(row, runners.slots_shardings(mesh, row))
        local = runners.local_shapes(params, sharding.parameter_shardings(mesh, params))
        needed["activations"] = max(step.added for step in steps.values())
        needed["layout"] = max(0, steps["decode"].arguments + row_bytes - shapes)
        needed["programs"] = sum(step.code for step in steps.values())
        read, _ = runners.token_bytes(config, local, room=0)
        return Plan(DEVICES[name], needed, steps, read + row_bytes)
