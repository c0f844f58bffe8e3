"""Linear functions with a transpose of one's own, which leave all other transforms to JAX.

`jax.custom_vjp` gives a function a gradient and takes forward mode away. A `jax.custom_jvp` whose
tangent is `linear` has both: `jax.grad` transposes the tangent, and gets the function that is given
here; `jax.jvp`, `jax.vmap` and derivatives of derivatives see plain functions.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir


def linear(f: Callable, transpose: Callable, kept: Any, x: Any) -> Any:
    """f(kept, x), whose gradient is transpose(kept, dy): a tree like x.

    f: linear in x; transpose: linear in dy, which is a tree like the result
    kept: a tree of any arrays; x: a tree of floats
    """
    arrays, kept_tree = jax.tree.flatten(kept)
    inputs, in_tree = jax.tree.flatten(x)
    out_tree = jax.tree.structure(jax.eval_shape(f, kept, x))

    def forward(kept, x):
        return jax.tree.leaves(f(kept_tree.unflatten(kept), in_tree.unflatten(x)))

    def backward(kept, dy):
        return jax.tree.leaves(transpose(kept_tree.unflatten(kept), out_tree.unflatten(dy)))

    return out_tree.unflatten(_bind(arrays, inputs, forward, backward))


_linear = Primitive("linear")
_linear.multiple_results = True


def _bind(kept, x, f, transpose):
    jaxpr = jax.make_jaxpr(f)(*jax.tree.map(_abstract, (list(kept), list(x))))
    return _linear.bind(*kept, *x, jaxpr=jaxpr, f=f, transpose=transpose, kept=len(kept))


def _abstract(x):
    kind = jax.typeof(x)
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype)


@_linear.def_impl
def _apply(*arrays, jaxpr, f, transpose, kept):
    return jaxpr_as_fun(jaxpr)(*arrays)


@_linear.def_abstract_eval
def _shapes(*avals, jaxpr, f, transpose, kept):
    return jaxpr.out_avals


def _jvp(primals, tangents, *, jaxpr, f, transpose, kept):
    arrays, x = list(primals[:kept]), list(primals[kept:])
    y = _bind(arrays, x, f, transpose)
    dy = _bind(arrays, [ad.instantiate_zeros(t) for t in tangents[kept:]], f, transpose)
    moved = [i for i, t in enumerate(tangents[:kept]) if type(t) is not ad.Zero]

    def of_moved(*values):
        given = dict(zip(moved, values, strict=True))
        return f([given.get(i, array) for i, array in enumerate(arrays)], x)

    if moved:
        _, more = jax.jvp(of_moved, [arrays[i] for i in moved], [tangents[i] for i in moved])
        dy = [a + b for a, b in zip(dy, more, strict=True)]
    return y, dy


def _transposed(dy, *arrays, jaxpr, f, transpose, kept):
    dx = _bind(list(arrays[:kept]), [ad.instantiate_zeros(d) for d in dy], transpose, f)
    # What is known of x is zeros, the tangents of what does not move.
    wanted = map(ad.is_undefined_primal, arrays[kept:])
    return [None] * kept + [d if want else None for d, want in zip(dx, wanted, strict=True)]


def _batched(arrays, axes, *, jaxpr, f, transpose, kept):
    size = next(a.shape[axis] for a, axis in zip(arrays, axes, strict=True) if axis is not None)
    pairs = zip(arrays[kept:], axes[kept:], strict=True)
    x = [batching.bdim_at_front(a, axis, size) for a, axis in pairs]
    f, transpose = (jax.vmap(one, (list(axes[:kept]), 0)) for one in (f, transpose))
    found = _bind(list(arrays[:kept]), x, f, transpose)
    return found, [0] * len(found)


ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transposed
batching.primitive_batchers[_linear] = _batched
mlir.register_lowering(_linear, mlir.lower_fun(_apply, multiple_results=True))
