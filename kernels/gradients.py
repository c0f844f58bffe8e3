"""Linear functions with a transpose of one's own, which leave all other transforms to JAX.

`jax.custom_vjp` gives a function a gradient and takes forward mode away. A `jax.custom_jvp` whose
tangent is `linear` has both: `jax.grad` transposes the tangent, and gets the function that is given
here; `jax.jvp`, `jax.vmap` and derivatives of derivatives see plain functions.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
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

    found = _linear.bind(*arrays, *inputs, f=forward, transpose=backward, kept=len(arrays))
    return out_tree.unflatten(found)


_linear = Primitive("linear")
_linear.multiple_results = True


@_linear.def_impl
def _apply(*arrays, f, transpose, kept):
    return f(arrays[:kept], arrays[kept:])


@_linear.def_abstract_eval
def _shapes(*avals, f, transpose, kept):
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    return jax.make_jaxpr(f)(shapes[:kept], shapes[kept:]).out_avals


def _jvp(primals, tangents, *, f, transpose, kept):
    arrays, x = list(primals[:kept]), primals[kept:]
    call = {"f": f, "transpose": transpose, "kept": kept}
    y = _linear.bind(*primals, **call)
    dy = _linear.bind(*arrays, *map(ad.instantiate_zeros, tangents[kept:]), **call)
    moved = [i for i, t in enumerate(tangents[:kept]) if type(t) is not ad.Zero]

    def of_moved(*values):
        given = dict(zip(moved, values, strict=True))
        return f([given.get(i, array) for i, array in enumerate(arrays)], x)

    if moved:
        _, more = jax.jvp(of_moved, [arrays[i] for i in moved], [tangents[i] for i in moved])
        dy = [a + b for a, b in zip(dy, more, strict=True)]
    return y, dy


def _transposed(dy, *arrays, f, transpose, kept):
    given, x = arrays[:kept], arrays[kept:]
    dy = [ad.instantiate_zeros(d) for d in dy]
    dx = _linear.bind(*given, *dy, f=transpose, transpose=f, kept=kept)
    # What is known of x is zeros, the tangents of what does not move.
    wanted = map(ad.is_undefined_primal, x)
    return [None] * kept + [d if want else None for d, want in zip(dx, wanted, strict=True)]


def _batched(arrays, axes, *, f, transpose, kept):
    size = next(a.shape[axis] for a, axis in zip(arrays, axes, strict=True) if axis is not None)
    pairs = zip(arrays[kept:], axes[kept:], strict=True)
    x = [batching.bdim_at_front(a, axis, size) for a, axis in pairs]
    f, transpose = (jax.vmap(one, (tuple(axes[:kept]), 0)) for one in (f, transpose))

    def of_tuple(one):
        return lambda kept, x: one(tuple(kept), x)

    call = {"f": of_tuple(f), "transpose": of_tuple(transpose), "kept": kept}
    found = _linear.bind(*arrays[:kept], *x, **call)
    return found, [0] * len(found)


ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transposed
batching.primitive_batchers[_linear] = _batched
mlir.register_lowering(_linear, mlir.lower_fun(_apply, multiple_results=True))
