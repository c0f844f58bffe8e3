"""Looking into a forward pass, and changing it: values by name, captured or replaced.

    look = captures.capture(grok.apply, "layer_*/attention/weights", "layer_3/hidden")
    output, seen = jax.jit(look)(params, None, tokens)
    seen["layer_0/attention/weights"]  # [B, N, T, S]

    steered = captures.replace(grok.apply, {"layer_3/hidden": lambda h: h + direction})
    output = jax.jit(steered)(params, None, tokens)

Both are function transformations like `jax.grad`: they take a function in which the model is
called, and give a pure one of the same arguments. They go inside of `jax.jit`, `jax.grad`,
`jax.vmap` and `lax.scan`, around any arguments of the model, a cache among them; and around each
other: what `replace` put there is what `capture` finds. Without them `tap` is the identity, and
nothing of this is in the program.

Names may be patterns, matched by `fnmatch` between slashes; "*" by itself is all of them. There are
those that `names(f, *args)` lists. Of each layer i:

    layer_i/rms_norm                  [B, T, D]     what attention reads
    layer_i/attention/query           [B, T, N, H]  key and value [B, T, K, H]; not rotated
    layer_i/attention/rotated_query   [B, T, N, H]  rotated_key [B, T, K, H]
    layer_i/attention/weights         [B, N, T, S]  softmax over S, the tokens or the cache's slots
    layer_i/attention/heads           [B, T, N, H]  what each head makes of the values
    layer_i/attention/output          [B, T, D]
    layer_i/rms_norm_1                [B, T, D]     what attention adds to the stream
    layer_i/middle                    [B, T, D]     the residual stream then
    layer_i/rms_norm_2                [B, T, D]     what router and experts read
    layer_i/router/logits             [B, T, E]
    layer_i/router/chosen             [B, T, A]     int32, the experts of each token; -1 of padding
    layer_i/router/gates              [B, T, E]     by which their outputs are multiplied, others 0
    layer_i/experts/hidden            [B, T, A, F]  of each chosen expert, gelu(x @ w) * (x @ v)
    layer_i/experts/outputs           [B, T, A, D]  of each chosen expert, before its gate
    layer_i/experts/output            [B, T, D]     their gated sum
    layer_i/rms_norm_3                [B, T, D]     what experts add to the stream
    layer_i/hidden                    [B, T, D]     the residual stream after the layer

and embedding [B, T, D], rms_norm (the last one) and logits [B, T, V]. A dense model has no router;
its experts/hidden is [B, T, F], and there is no experts/outputs.

Attention's weights and what single experts compute are never in memory otherwise. Where they are
asked for, plain JAX computes them, to the same numbers but for the last bits.
"""

import contextlib
import contextvars
import difflib
import fnmatch
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import haiku as hk
import jax
from jax.extend.core import get_opaque_trace_state


class _Watch(NamedTuple):
    """What one transformation waits for.

    wanted: {pattern: what replaces the value, or None to capture it}
    seen: {name: value} of what is captured
    known: names that there are
    trace: where the transformation was called
    """

    wanted: dict[str, Any]
    seen: dict[str, Any]
    known: set[str]
    trace: Any


_watches: contextvars.ContextVar[tuple[_Watch, ...]] = contextvars.ContextVar("w", default=())


def capture(f: Callable, *names: str) -> Callable:
    """f, whose result comes with the values of these names: (f(...), {name: array}).

    f: a function that calls the model, such as `make_model(config).apply`; compile the whole, not f
    names: or patterns, such as "layer_*/router/chosen"; "*" for all

    Raises ValueError, when it is called, for a pattern that fits no name, and for a name that is
    computed twice in f; RuntimeError where f transforms what is captured, as by a `jax.jit` inside.
    """

    @functools.wraps(f)
    def captured(*args, **kwargs):
        with _watching(dict.fromkeys(names)) as seen:
            result = f(*args, **kwargs)
        return result, seen

    return captured


def replace(f: Callable, values: Mapping[str, Any]) -> Callable:
    """f, in which values of these names are others: {pattern: array, or function of the value}.

    Raises what `capture` does, and ValueError for a value of another shape or dtype.
    """
    for name, value in values.items():
        if value is None:
            raise ValueError(f"{name!r} is replaced by None; give an array or a function")

    @functools.wraps(f)
    def replaced(*args, **kwargs):
        with _watching(dict(values)):
            return f(*args, **kwargs)

    return replaced


def names(f: Callable, *args, **kwargs) -> dict[str, jax.ShapeDtypeStruct]:
    """The names that there are in a call of f, with their shapes and dtypes; computes nothing."""
    return jax.eval_shape(lambda: capture(f, "*")(*args, **kwargs)[1])


# --- In the model ---------------------------------------------------------------------------------


def tap(name: str, value: Any) -> Any:
    """The value of this name of the Haiku module around it, or what replaces it.

    Where nothing watches, the value, and nothing is added to the program.
    """
    if not (watches := _watches.get()):
        return value
    name = _full(name)
    for watch in reversed(watches):  # from the inside
        patterns = _patterns(watch, name)
        if patterns and get_opaque_trace_state(convention="captures") != watch.trace:
            raise RuntimeError(
                f"{name} is computed inside another transformation than the one that captures or "
                "replaces it; call capture or replace inside of it, as in jax.jit(capture(f, ...))"
            )
        for pattern in patterns:
            to = watch.wanted[pattern]
            if to is None and name in watch.seen:
                raise ValueError(f"{name} is computed twice here; capture each call by itself")
            if to is None:
                watch.seen[name] = value
            else:
                value = _checked(name, value, to(value) if callable(to) else to)
    return value


def is_tapped(*names: str) -> bool:
    """Whether values of one of these names of the Haiku module around it are watched: a reason to
    compute them."""
    pairs = [(watch, _full(name)) for watch in _watches.get() for name in names]
    return any([_patterns(*pair) for pair in pairs])  # of each, so that it is known


def _full(name: str) -> str:
    """A name with those of the modules around it, "transformer/decoder_layer_0/moe" and so on."""
    module = f"{hk.experimental.current_name()}/"
    for pattern, short in (
        (r"^(transformer|language_model|~)/(decoder_)?", ""),
        ("multi_head_attention/", "attention/"),
        ("moe/", "experts/"),
        ("in_out_embed/", ""),
    ):
        module = re.sub(pattern, short, module)
    return module + name if name else module.rstrip("/")


def _patterns(watch: _Watch, name: str) -> list[str]:
    watch.known.add(name)
    return [pattern for pattern in watch.wanted if _fits(name, pattern)]


def _fits(name: str, pattern: str) -> bool:
    parts = name.split("/"), pattern.split("/")
    same = len(parts[0]) == len(parts[1])
    return pattern == "*" or (same and all(map(fnmatch.fnmatchcase, *parts)))


@contextlib.contextmanager
def _watching(wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Inside, values are captured and replaced; what was seen, once it has ended."""
    watch = _Watch(wanted, {}, set(), get_opaque_trace_state(convention="captures"))
    token = _watches.set((*_watches.get(), watch))
    try:
        yield watch.seen
    finally:
        _watches.reset(token)
    for pattern in wanted:
        if not any(_fits(name, pattern) for name in watch.known):
            raise ValueError(f"no value is named {pattern!r}; {_near(pattern, watch.known)}")


def _near(pattern: str, known: set[str]) -> str:
    if not known:
        return (
            "none was computed: is the model called in this function, and was the function "
            "compiled before? Compile the whole, as in jax.jit(capture(f, ...))"
        )
    near = difflib.get_close_matches(pattern, sorted(known), n=4, cutoff=0.5) or sorted(known)[:4]
    return f"near are {', '.join(near)}; captures.names lists all"


def _checked(name: str, value, other):
    """What replaces a value, in its dtype if it is a Python number."""
    found = [(tuple(x.shape), x.dtype.name) for x in (value, jax.numpy.asarray(other))]
    if found[0] != found[1]:
        (shape, dtype), (wrong, other_dtype) = found
        raise ValueError(
            f"{name} is {dtype} {list(shape)}, and what replaces it {other_dtype} {list(wrong)}; "
            "give an array of the same shape and dtype"
        )
    return jax.numpy.asarray(other)
