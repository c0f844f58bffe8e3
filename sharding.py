"""The (data, model) mesh and the one table that lays arrays out over it.

Modules and parameters name logical axes; `AXES` says which mesh axis each one is split over.
"data" carries the batch, "model" the heads, the feed-forward width and the vocabulary, so that
each decoder layer sums over "model" twice: after the attention's and after the experts' output.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import quantize

AXES = {
    "batch": "data",
    "embed": None,
    "experts": None,
    "ffn": "model",
    "heads": "model",
    "vocab": "model",
    None: None,
}

# Ordered, first match wins; a dense feed-forward block has the last two axes of an expert's.
PARAMETER_RULES = (
    (r"in_out_embed/embeddings$", ("vocab", "embed")),
    (r"multi_head_attention/(query|key|value)/w$", ("embed", "heads")),
    (r"multi_head_attention/linear/w$", ("heads", "embed")),
    (r"/linear(_v)?/w$", ("experts", "embed", "ffn")),
    (r"/linear_1/w$", ("experts", "ffn", "embed")),
    (r"/router/w$|/scale$", ()),
)

Axes = Sequence[str | None]


def parameter_axes(path: str, rank: int) -> Axes:
    """The logical axes of the parameter "module/name", of this rank: the last ones of its rule.

    Raises ValueError if no rule of `PARAMETER_RULES` matches.
    """
    for pattern, axes in PARAMETER_RULES:
        if re.search(pattern, path):
            return axes[-rank:] or (None,) * rank
    raise ValueError(f"no rule matches parameter {path!r}; add one to sharding.PARAMETER_RULES")


def make_mesh(data: int = 1, model: int = 1) -> Mesh:
    """A mesh of `data * model` devices, over all hosts; the first ones where there are more.

    Raises ValueError if there are too few devices.
    """
    if data < 1 or model < 1:
        raise ValueError(f"both mesh axes must be at least 1, got {data},{model}")
    if data * model > len(jax.devices()):
        raise ValueError(
            f"mesh {data},{model} needs {data * model} devices, but only {len(jax.devices())} "
            f"{jax.default_backend()} device(s) are here; choose a smaller mesh, or on CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={data * model}"
        )
    devices = np.array(jax.devices()[: data * model]).reshape(data, model)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def parse_mesh(text: str) -> Mesh:
    """The mesh of a command's "D,M": sizes of the data and model axes."""
    return make_mesh(*parse_shape(text))


def parse_shape(text: str) -> tuple[int, int]:
    """The sizes of "D,M"; ValueError for other texts."""
    try:
        data, model = (int(size) for size in text.split(","))
    except ValueError:
        raise ValueError(f"a mesh is two numbers, data,model, as in 1,8; got {text!r}") from None
    return data, model


def is_one_cpu(mesh: Mesh) -> bool:
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def memory_limit(mesh: Mesh) -> int:
    """Bytes that one device of the mesh has; on CPU its share of the host's memory."""
    devices = mesh.local_devices
    stats = devices[0].memory_stats() or {}
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
    return stats.get("bytes_limit", host)


def device_bytes(shapes, shardings) -> int:
    """Bytes on each device of a tree of arrays or `ShapeDtypeStruct`s that is sharded like this."""

    def one(x, where):
        return math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(one, shapes, shardings)))


# --- Arrays that live on a mesh -------------------------------------------------------------------


def parameter_shardings(mesh: Mesh, params: dict) -> dict:
    """A NamedSharding for every array of a parameter tree `{module: {name: weight}}`.

    Leaves may be arrays, `ShapeDtypeStruct`s or quantized weights of these; packed bytes and scales
    follow the weight that they stand for. Raises ValueError if a parameter matches no rule of
    `PARAMETER_RULES`, if a rule matches no parameter, or if an axis does not divide, into whole
    packing blocks where it is packed.
    """

    def one(path, axes, weight):
        specs = weight_specs(axes, weight)
        if isinstance(weight, quantize.PackedWeight):
            _check_whole_blocks(mesh, path, weight, specs.packed[len(weight.shape) - 1])
        jax.tree.map(functools.partial(_check_divides, mesh, path), weight, specs)
        return jax.tree.map(functools.partial(NamedSharding, mesh), specs)

    return quantize.apply_rules(PARAMETER_RULES, params, one)


def activation_sharding(mesh: Mesh, axes: Axes = (), shape: Sequence[int] = ()) -> NamedSharding:
    """The sharding of an activation or cache, from its logical axes; on every device without any.

    An axis that its mesh axis does not divide is whole on every device: few key/value heads on many
    devices, one prompt beside several rows of slots.
    """
    mesh_axes = (AXES[axis] for axis in axes)
    return NamedSharding(
        mesh,
        P(
            *(
                None if axis is None or size % mesh.shape[axis] else axis
                for axis, size in zip(mesh_axes, shape, strict=True)
            )
        ),
    )


def weight_specs(axes: Axes, weight):
    """Partition specs of a weight of any format, from the logical axes of its matrix [..., I, O].

    A weight with fewer axes than the rule has the last ones; `()` means replicated. Scales follow
    their weight: along an axis where there are several, they are split as it is.
    """
    rank = len(weight.shape)
    mesh_axes = [AXES[axis] for axis in axes][-rank:] or [None] * rank

    def scales(array, *axes):
        pairs = zip(array.shape, axes, strict=True)
        return P(*(axis if size > 1 else None for size, axis in pairs))

    if isinstance(weight, quantize.QuantizedWeight):
        return dataclasses.replace(
            weight, codes=P(*mesh_axes), scales=scales(weight.scales, *mesh_axes)
        )
    if isinstance(weight, quantize.PackedWeight):
        *lead, inputs, outputs = mesh_axes
        multipliers, lanes = weight.multipliers, [None] * weight.interleaved
        if multipliers is not None:
            multipliers = scales(multipliers, *lead, outputs, inputs, None, *lanes)
        return dataclasses.replace(
            weight,
            packed=P(*lead, outputs, inputs, *lanes, *lanes),
            scales=scales(weight.scales, *mesh_axes),
            multipliers=multipliers,
        )
    return P(*mesh_axes)


def _check_divides(mesh, path, array, spec):
    for size, axis in zip(array.shape, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"{path}: an array of shape {tuple(array.shape)} does not split evenly over "
                f"the {mesh.shape[axis]} devices of mesh axis {axis!r}; choose a mesh whose "
                f"{axis!r} axis divides {size}"
            )


def _check_whole_blocks(mesh, path, weight, axis):
    inputs, devices = weight.shape[-2], 1 if axis is None else mesh.shape[axis]
    if devices > 1 and inputs % (4 * weight.block * devices):
        raise ValueError(
            f"{path}: {inputs} packed inputs do not split into blocks of {4 * weight.block} over "
            f"the {devices} devices of mesh axis {axis!r}; choose a mesh with fewer"
        )


# --- Inside the model -----------------------------------------------------------------------------


def mesh_axis(axis: str | None, size: int) -> str | None:
    """The mesh axis that `shard_map` splits a logical one of this size over, of the whole array.

    None without several devices, and where the size does not split evenly, so that sums are whole.
    """
    mesh, name = jax.sharding.get_abstract_mesh(), AXES[axis]
    return None if mesh.size <= 1 or name is None or size % mesh.shape[name] else name


def shard_map(f: Callable, in_axes: Sequence[Axes], out_axes: Axes | list[Axes]) -> Callable:
    """f on each device's shards under `jax.set_mesh`, and f itself without several devices.

    Each argument is an array or a weight of any format, its axes are logical ones. An axis that
    does not split evenly, such as a batch of one, is computed whole on every device.
    """

    @functools.wraps(f)
    def sharded(*args):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.size <= 1:
            return f(*args)
        uneven = {
            axis
            for arg, axes in zip(args, in_axes, strict=True)
            for size, axis in zip(arg.shape, axes, strict=True)
            if AXES[axis] is not None and size % mesh.shape[AXES[axis]]
        }

        def even(axes):
            return tuple(None if axis in uneven else axis for axis in axes)

        in_specs = tuple(weight_specs(even(axes), x) for x, axes in zip(args, in_axes, strict=True))
        out_specs = jax.tree.map(
            lambda axes: P(*(AXES[axis] for axis in even(axes))),
            out_axes,
            is_leaf=lambda axes: isinstance(axes, tuple),
        )
        # Sums over the mesh are explicit in f, and replication is for AXES to say, not to infer.
        return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)

    return sharded
