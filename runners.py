"""Prompts to tokens: a model on its mesh, prefill, a decode step over slots, sampling.

A prompt is prefilled alone, in padded chunks, into a cache of one row. That row then takes a slot
of the big cache, where all requests decode together, one token each in a step. What a request
samples depends on its own row and seed only: the same request gives the same tokens alone or
beside others, in whichever slot.

Shape letters as in `model.py`; B counts slots here.
"""

import _signal
import contextlib
import dataclasses
import functools
import math
import numbers
import operator
import reprlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import attention
import checkpoint
import experts
import formats
import kernels
import layouts
import quantize
import sharding
from model import (
    MEMORY_AXES,
    LanguageModelConfig,
    Memory,
    abstract_params,
    attend_and_write,
    check_ids,
    formats_of,
    init_memory,
    make_model,
    precision_table,
)

BOS = 1  # what an empty prompt starts from
TOP_K = 8  # alternatives that come with each token
PAD_SIZES = (16, 32, 64, 128, 256, 512, 1024)  # prefill is compiled for each one that is used
SCORED_SIZE = 256  # chunks of a prompt all of whose logits are needed, 134 MB of Grok-1's
EMBEDDINGS = "language_model/in_out_embed"
FLOAT32_MAX = float(np.finfo(np.float32).max)
LAYER = "transformer/decoder_layer_0"
GROUP_SECONDS = 0.05  # for which tokens may be held back, to be fetched together
GROUP_STEPS = 16  # at most
NOT_FINITE = (
    "the logits of this request are not finite: its weights are damaged, or too large; "
    "verify the checkpoint"
)
EXACT = {"xla_allow_excess_precision": False}  # else the batch says where XLA rounds to bfloat16

# --- A model on its mesh --------------------------------------------------------------------------


class ModelRunner:
    """A configuration, the mesh that it runs on, and its parameters once loaded or initialised."""

    def __init__(self, config: LanguageModelConfig, mesh: jax.sharding.Mesh | None = None):
        """Allocates nothing."""
        self.config = config
        self.mesh = sharding.make_mesh() if mesh is None else mesh
        self.model = make_model(config)
        self._params = None
        self.mapped_bytes = 0  # of the parameters, those that `load` mapped from a layout file
        self._logits = jax.jit(lambda params, tokens: self.model.apply(params, None, tokens).logits)

    @property
    def params(self) -> dict:
        """The parameters; RuntimeError before there are any."""
        if self._params is None:
            raise RuntimeError(
                "this ModelRunner has no parameters yet; call load(folder) or init(), or set params"
            )
        return self._params

    @params.setter
    def params(self, params: dict | None) -> None:
        kernels.use_large_pages(params)
        self._params, self.mapped_bytes = params, 0

    def init(self, seed: int = 0) -> None:
        """Random float32 parameters, each made where it belongs."""
        shardings = sharding.parameter_shardings(self.mesh, abstract_params(self.config))
        tokens = np.zeros((1, 1), np.int32)
        with jax.set_mesh(self.mesh):
            init = jax.jit(self.model.init, out_shardings=shardings)
            self.params = init(jax.random.key(seed), tokens)

    def load(
        self, folder, weights: str | None = None, progress: bool = False, check: bool = True
    ) -> None:
        """The parameters of a checkpoint folder, in the precision that `weights` names.

        By default as the checkpoint was converted, and a released one as "ternary". On one CPU
        they are those of its layout file, if it has one: mapped, not copied, and not to be written.
        `progress` and `check` are those of `checkpoint.restore`, for what is not mapped. Raises
        checkpoint.CheckpointError.
        """
        loading = self.plan_loading(folder, weights)
        params = checkpoint.restore_entries(
            loading.entries,
            loading.placement,
            progress=progress and bool(loading.entries),
            check=check,
        )
        if EMBEDDINGS in params:
            params = cast_embeddings(params, self.config)
        kernels.use_large_pages(params)  # not what is mapped: its pages are the system's
        mapped = jax.tree.map(checkpoint.taken_over, loading.mapped, loading.where)
        modules = sorted(params.keys() | mapped.keys())
        self._params = {name: params.get(name, {}) | mapped.get(name, {}) for name in modules}
        self.mapped_bytes = loading.mapped_bytes

    def plan_loading(self, folder, weights: str | None = None) -> "Loading":
        """Where `load` will find each parameter; reads no numbers, and raises what `load` does."""
        template = abstract_params(self.config)
        entries, placement = checkpoint.plan(
            folder,
            template,
            precision_of(folder, template, weights),
            functools.partial(sharding.parameter_shardings, self.mesh),
            kernels.on_cpu(),
        )
        layout = layouts.open_layout(folder) if sharding.is_one_cpu(self.mesh) else None
        if layout is None:
            return Loading(entries, placement, {}, {})
        forms: dict[str, dict] = {}
        for entry in entries:
            form = form_in_memory(entry, self.config)
            forms.setdefault(entry.module, {})[entry.name] = form
        shardings = sharding.parameter_shardings(self.mesh, forms)
        rest, mapped, where = [], {}, {}
        for entry in entries:
            leaf = layout.leaf(entry.path, forms[entry.module][entry.name])
            if leaf is None:
                rest.append(entry)
            else:
                mapped.setdefault(entry.module, {})[entry.name] = leaf
                where.setdefault(entry.module, {})[entry.name] = shardings[entry.module][entry.name]
        return Loading(rest, placement, mapped, where)

    def logits(self, tokens) -> jax.Array:
        """One pass without a cache: token ids [B, T] to float32 [B, T, V], on the mesh.

        Raises ValueError for what `check_tokens` refuses.
        """
        tokens = check_tokens(tokens, self.config.vocab_size, axes=2)
        with jax.set_mesh(self.mesh):
            return self._logits(self.params, tokens)


class Loading(NamedTuple):
    """Where the parameters of a checkpoint come from.

    entries, placement: of those that are restored from its shards, for `checkpoint.restore_entries`
    mapped: {module: {name: weight}} of the others, NumPy arrays of its mapped layout file
    where: their shardings
    """

    entries: list[checkpoint.Entry]
    placement: dict
    mapped: dict
    where: dict

    @property
    def mapped_bytes(self) -> int:
        return sum(array.nbytes for array in jax.tree.leaves(self.mapped))


def check_tokens(tokens: Any, vocab_size: int, axes: int) -> np.ndarray:
    """Token ids as int32, [T] or [B, T] by the number of axes.

    Raises ValueError for anything but integers of the vocabulary in that many axes, and for none.
    """
    try:
        array = np.asarray(tokens)
    except ValueError:  # rows of different lengths
        array = np.empty(0, object)
    if array.dtype.kind not in "iu" or array.ndim != axes or not array.size:
        raise ValueError(
            f"token ids are integers, as in {'[5, 6]' if axes == 1 else '[[5, 6], [7, 8]]'}; "
            f"got {array.dtype} {list(array.shape)}, {reprlib.repr(tokens)}"
        )
    check_ids(array, vocab_size)
    return array.astype(np.int32)


def cast_embeddings(params: dict, config: LanguageModelConfig) -> dict:
    """The embedding table in the compute dtype, or int8: no other float tensor is as large."""
    return params | {
        EMBEDDINGS: {"embeddings": cast_table(params[EMBEDDINGS]["embeddings"], config)}
    }


def cast_table(table: jax.Array, config: LanguageModelConfig):
    """As `cast_embeddings`, the table alone."""
    if config.embeddings == "int8":
        return quantize.quantize_table(table)
    return table.astype(config.fprop_dtype)


def form_in_memory(entry: checkpoint.Entry, config: LanguageModelConfig):
    """What `ModelRunner.load` makes of a parameter, in abstract form."""
    if entry.module != EMBEDDINGS:
        return entry.restored
    return jax.eval_shape(functools.partial(cast_table, config=config), entry.restored)


# --- Sampling -------------------------------------------------------------------------------------


class SampleSettings(NamedTuple):
    """How each row samples and when it ends; see Request. float32, float32, uint32, int32 [B]."""

    temperature: jax.Array
    nucleus_p: jax.Array
    rng_seed: jax.Array
    max_len: jax.Array


class LogProbs(NamedTuple):
    """What the model gave to tokens, before temperature and top-p: float32 [...], and the likeliest
    ones in their places, int32 [..., TOP_K], with theirs."""

    logprob: jax.Array
    top_k_token_ids: jax.Array
    top_k_logprobs: jax.Array


class Likeliest(NamedTuple):
    """Of logits [..., V] the TOP_K largest, or all if V is less, float32 [..., K], and their ids,
    of equals the lowest id first; and what probabilities need of the others: log of the sum of
    exp(logits - largest), [..., 1]. It is not finite if the largest is not, and with any NaN."""

    logits: jax.Array
    token_ids: jax.Array
    total: jax.Array

    @property
    def largest(self) -> jax.Array:
        """[..., 1]; XLA would search again for `logits[..., :1]`."""
        return jnp.max(self.logits, axis=-1, keepdims=True)


def likeliest(logits: jax.Array) -> Likeliest:
    """Of float32 logits."""
    return Likeliest(*_likeliest(logits, count=min(TOP_K, logits.shape[-1])))


@kernels.accelerated("likeliest")
def _likeliest(logits, *, count):
    top, ids = lax.top_k(logits, count)
    largest = jnp.max(top, axis=-1, keepdims=True)
    return top, ids, jax.nn.logsumexp(logits - largest, axis=-1, keepdims=True)


def log_probs(logits: jax.Array, token_id: jax.Array, top: Likeliest) -> LogProbs:
    """log p of tokens, int32 [...], and of the likeliest, from logits [..., V]."""
    chosen = jnp.take_along_axis(logits, token_id[..., None], axis=-1)
    of_token, of_top = (x - top.largest - top.total for x in (chosen, top.logits))
    return LogProbs(of_token[..., 0], top.token_ids, of_top)


class SampleOutput(NamedTuple):
    """A token of each row, int32 [B], and the most likely ones [B, TOP_K], with probabilities, and
    with those of `LogProbs`.

    prob is NaN if the largest logit of the row is not finite, as with any NaN among them; then
    nothing else in it has a meaning.
    """

    token_id: jax.Array
    prob: jax.Array
    top_k_token_ids: jax.Array
    top_k_probs: jax.Array
    logprob: jax.Array
    top_k_logprobs: jax.Array


def packed(sample: SampleOutput, active: jax.Array) -> jax.Array:
    """Samples, and which rows are active after them, as one array to be fetched: int32
    [B, 4 + 3 K], of floats the bits."""
    columns = (sample.token_id, sample.prob, sample.logprob, active)
    lists = (sample.top_k_token_ids, sample.top_k_probs, sample.top_k_logprobs)

    def integers(x):
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        return lax.bitcast_convert_type(x, jnp.int32) if is_float else x.astype(jnp.int32)

    return jnp.concatenate(
        [*(integers(x)[:, None] for x in columns), *map(integers, lists)], axis=1
    )


def unpacked(found: np.ndarray) -> tuple[SampleOutput, np.ndarray]:
    """What `packed` was given."""
    floats, count = found.view(np.float32), found.shape[1] // 3 - 1
    ids, probs = found[:, 4 : 4 + count], floats[:, 4 + count : -count]
    sample = SampleOutput(found[:, 0], floats[:, 1], ids, probs, floats[:, 2], floats[:, -count:])
    return sample, found[:, 3] != 0


def top_p_filter(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """-inf for all but the smallest set of tokens whose probabilities sum to top_p or more.

    Tokens as likely as the last one of that set are kept too, so that no tie is broken by id.
    With probabilities 0.5, 0.3, 0.15 and 0.05, top_p 0.6 keeps two tokens and 0.9 three.

    logits: float32 [B, V]; top_p: float32 [B], 1 for all tokens
    """

    def filtered():
        likely = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))  # 0 to 1
        enough = top_p[:, None] * jnp.sum(likely, axis=-1, keepdims=True)

        def halve(_, bounds):
            least, most = bounds
            middle = (least + most + 1) // 2
            mass = jnp.sum(likely, axis=-1, keepdims=True, where=likely >= number(middle))
            fits = mass >= enough
            return jnp.where(fits, middle, least), jnp.where(fits, most, middle - 1)

        # Sorting 131072 logits would take longer than all the rest of sampling. The largest number
        # that leaves enough is searched for among all there are: the bits of positive ones, as
        # integers, are in their order. (Rounded sums may never be enough: then it is 0.)
        number = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.float32)
        one = lax.bitcast_convert_type(jnp.ones_like(enough), jnp.int32)
        least, _ = lax.fori_loop(0, 30, halve, (jnp.zeros_like(one), one))
        keep = (likely >= number(least)) | (top_p >= 1)[:, None]
        return jnp.where(keep, logits, -jnp.inf)

    return lax.cond(jnp.any(top_p < 1), filtered, lambda: logits)


def sample_token(logits: jax.Array, settings: SampleSettings, count: jax.Array) -> SampleOutput:
    """Samples from float32 logits [B, V]; count, int32 [B], numbers the tokens of each row.

    The random key of a token is that of its row's seed and its number. At temperature 0 the most
    likely token is taken (of equals, the lowest id), and probabilities are those of temperature 1.
    Token 0, Grok-1's padding, is a token like any other.
    """
    random = settings.temperature > 0
    asked = random | (settings.nucleus_p < 1)
    top = likeliest(logits)
    # Their first one: XLA would search again for `token_ids[:, 0]`, and makes argmax slow.
    is_first, none = top.logits == top.largest, logits.shape[-1] - 1
    greedy = jnp.min(top.token_ids, axis=-1, where=is_first, initial=none)
    unfiltered = log_probs(logits, greedy, top)

    def draw(seed, number, logits):
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), number), logits)

    def filtered():
        temperature = jnp.where(random, settings.temperature, 1)[:, None]
        # The largest becomes 0 first, which no small temperature can make infinite.
        allowed = top_p_filter((logits - top.largest) / temperature, settings.nucleus_p)
        drawn = lax.cond(
            jnp.any(random),
            lambda: jax.vmap(draw)(settings.rng_seed, count, allowed),
            lambda: greedy,
        )
        token = jnp.where(random, drawn, greedy).astype(jnp.int32)
        logits_of_top = jnp.take_along_axis(allowed, top.token_ids, axis=-1)
        total = jax.nn.logsumexp(allowed, axis=-1, keepdims=True)
        probs = log_probs(allowed, token, Likeliest(logits_of_top, top.token_ids, total))
        # The others get what they would get by themselves, to the bit.
        return token, jax.tree.map(functools.partial(jax.vmap(jnp.where), asked), probs, unfiltered)

    # Sums over the vocabulary, and random numbers for all of it: not when nobody asks for them.
    token, probs = lax.cond(jnp.any(asked), filtered, lambda: (greedy, unfiltered))
    of_model = log_probs(logits, token, top)
    prob = jnp.where(jnp.isfinite(of_model.logprob), jnp.exp(probs.logprob), jnp.nan)
    top_k_probs = jnp.exp(probs.top_k_logprobs)
    return SampleOutput(
        token, prob, top.token_ids, top_k_probs, of_model.logprob, of_model.top_k_logprobs
    )


# --- Slots: all that decoding keeps between two steps ---------------------------------------------


class Slots(NamedTuple):
    """Requests that decode together, a row for each; arrays are [B].

    token: int32, sampled last and not yet in the cache
    count: int32, how many were sampled
    active: bool, false for a free slot; its row is not computed, and its cache stays as it is
    """

    memory: Memory
    settings: SampleSettings
    token: jax.Array
    count: jax.Array
    active: jax.Array


def empty_slots(config: LanguageModelConfig, slots: int, sequence_len: int) -> Slots:
    """B free slots of `sequence_len` cache slots each."""
    zeros = functools.partial(jnp.zeros, slots)
    settings = SampleSettings(
        zeros(jnp.float32), zeros(jnp.float32), zeros(jnp.uint32), zeros(jnp.int32)
    )
    memory = init_memory(config, slots, sequence_len)
    return Slots(memory, settings, zeros(jnp.int32), zeros(jnp.int32), zeros(bool))


def slots_shardings(mesh: jax.sharding.Mesh, slots: Slots) -> Slots:
    """Rows of the cache over "data", its heads over "model", where these divide them; the small
    arrays on every device."""
    everywhere = sharding.activation_sharding(mesh)
    shardings = jax.tree.map(lambda _: everywhere, slots)
    layers = jax.tree.map(
        lambda x: sharding.activation_sharding(mesh, MEMORY_AXES, x.shape), slots.memory.layers
    )
    return shardings._replace(memory=Memory(layers, everywhere))


def replicated(x: jax.Array) -> jax.Array:
    """x on every device of the mesh, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else lax.with_sharding_constraint(x, sharding.activation_sharding(mesh))


def advance(logits: jax.Array, slots: Slots, eos: int) -> tuple[Slots, SampleOutput]:
    """The next token of each row from its logits [B, V]; rows that are then complete go idle.

    So do rows whose logits are not finite.
    """
    greedy = SampleSettings(0.0, 1.0, 0, 0)  # of a free row: nothing is drawn or filtered for it
    settings = jax.tree.map(functools.partial(jnp.where, slots.active), slots.settings, greedy)
    # One gather here, or each sum and sort of sampling would be one over the vocabulary's shards.
    sample = sample_token(replicated(logits), settings, slots.count)
    count = slots.count + slots.active
    done = (sample.token_id == eos) | (count >= slots.settings.max_len) | jnp.isnan(sample.prob)
    active = slots.active & ~done
    return slots._replace(token=sample.token_id, count=count, active=active), sample


def prefill_chunk(
    model: hk.Transformed,
    params: dict,
    memory: Memory,
    tokens: jax.Array,
    start,
    length,
    following: jax.Array | None = None,
) -> tuple[Memory, jax.Array, LogProbs | None]:
    """Puts part of a prompt into a cache of one row: its new state, and the logits [1, V] after it.

    tokens: int32 [1, T], padded on the right to one of few sizes
    start: where they go, the number of tokens before them; whatever lies there is overwritten
    length: how many are not padding
    following: what follows each token, int32 [1, T], whose `LogProbs` [1, T] then come too
    """
    memory = memory._replace(step=jnp.full(1, start, jnp.int32))
    lengths = jnp.full(1, length, jnp.int32)
    output = model.apply(params, None, tokens, memory, lengths, last_only=following is None)
    if following is None:
        return output.model_state, output.logits, None
    logits = replicated(output.logits)
    last = lax.dynamic_index_in_dim(logits, length - 1, axis=1, keepdims=False)
    return output.model_state, last, log_probs(logits, following, likeliest(logits))


def insert_row(
    slots: Slots, memory: Memory, logits: jax.Array, settings: SampleSettings, slot, eos: int
) -> tuple[Slots, jax.Array]:
    """Gives a slot to a prefilled prompt, with its cache of one row, and samples its first token,
    which comes `packed`.

    settings: scalars
    """
    settings = jax.tree.map(lambda value: value[None], settings)
    row = Slots(memory, settings, slots.token[:1], jnp.zeros(1, jnp.int32), jnp.ones(1, bool))
    row, sample = advance(logits, row, eos)
    slots = jax.tree.map(
        lambda all_rows, one: lax.dynamic_update_index_in_dim(all_rows, one[0], slot, axis=0),
        slots,
        row,
    )
    return slots, packed(sample, row.active)


def decode_step(
    model: hk.Transformed, params: dict, slots: Slots, eos: int
) -> tuple[Slots, jax.Array]:
    """One more token for every active row, `packed`."""
    lengths = slots.active.astype(jnp.int32)
    tokens = slots.token[:, None]
    output = model.apply(params, None, tokens, slots.memory, lengths, last_only=True)
    slots, sample = advance(output.logits, slots._replace(memory=output.model_state), eos)
    return slots, packed(sample, slots.active)


def jit_steps(runner: ModelRunner, in_slots: Slots, in_row: Memory) -> tuple[Callable, Callable]:
    """`prefill_chunk` and `decode_step`, to be compiled; the cache that they are given is donated.

    in_slots, in_row: shardings of all slots, and of the cache of one row
    """
    everywhere = sharding.activation_sharding(runner.mesh)
    jit = functools.partial(jax.jit, donate_argnums=1, compiler_options=EXACT)
    decode = functools.partial(decode_step, runner.model, eos=runner.config.eos_token)
    return (
        jit(
            functools.partial(prefill_chunk, runner.model),
            out_shardings=(in_row, everywhere, everywhere),
        ),
        jit(decode, out_shardings=(in_slots, everywhere)),
    )


def lower_steps(
    runner: ModelRunner,
    params: dict,
    slots: int,
    sequence_len: int,
    steps: Sequence[str] = ("prefill", "decode"),
) -> dict[str, jax.stages.Lowered]:
    """The steps that serving will compile, of the largest chunk and of all slots, by name.

    params: as from `abstract_weights`; nothing is allocated
    steps: "scored", too, the largest chunk whose tokens' log-probabilities are computed
    """
    make = functools.partial(empty_slots, runner.config, sequence_len=sequence_len)
    shapes = [jax.eval_shape(functools.partial(make, slots=n)) for n in (slots, 1)]
    places = [slots_shardings(runner.mesh, x) for x in shapes]
    params, all_slots, row = jax.tree.map(
        lambda x, where: x.update(sharding=where),
        (params, *shapes),
        (sharding.parameter_shardings(runner.mesh, params), *places),
    )
    everywhere = sharding.activation_sharding(runner.mesh)
    number, *tokens = (
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=everywhere)
        for shape in ((), *((1, min(n, sequence_len)) for n in (PAD_SIZES[-1], SCORED_SIZE)))
    )
    prefill, decode = jit_steps(runner, places[0], places[1].memory)
    with jax.set_mesh(runner.mesh):
        lower = {
            "prefill": lambda: prefill.lower(params, row.memory, tokens[0], number, number),
            "scored": lambda: prefill.lower(
                params, row.memory, tokens[1], number, number, tokens[1]
            ),
            "decode": lambda: decode.lower(params, all_slots),
        }
        return {step: lower[step]() for step in steps}


# --- Serving --------------------------------------------------------------------------------------


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the end of a block, where KeyboardInterrupt is then raised; a second
    one is not held back, for a block may compile for minutes, or wait for another host for ever.

    What a donated cache became must not get lost between the call and its assignment. So it waits
    for some steps or a chunk of a prompt, and for what the first of these compile. Python runs
    signal handlers in the main thread alone: in another one there is nothing to hold back.
    """
    handler = _signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held = []

    def hold(*caught):
        held.append(True)
        if len(held) > 1:
            handler(*caught)

    # `signal.signal` makes enums of handlers: two such calls are 4 % of a step of the demo.
    _signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        _signal.signal(signal.SIGINT, handler)
        if len(held) == 1:
            signal.raise_signal(signal.SIGINT)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue.

    prompt: text, or token ids; an empty one starts from [BOS]
    temperature: 0 takes the most likely token each time
    nucleus_p: sample among the most likely tokens that make up this much probability
    rng_seed: 0 to 2**32 - 1; with the rest of the request it fixes the tokens that come
    max_len: new tokens, at most; [EOS] ends a request earlier
    truncate: drop the start of a prompt that does not fit; positions then count from what is left
    """

    prompt: str | Sequence[int]
    temperature: float = 1.0
    nucleus_p: float = 1.0
    rng_seed: int = 42
    max_len: int = 100
    truncate: bool = False


class Token(NamedTuple):
    """A new token of the request in a slot; top_k_* are [TOP_K], likeliest first.

    Probabilities are those it was sampled from, after temperature and top-p; logarithms those of
    the model, before them. `done` marks the last token of its request, [EOS] or not.

    error: why the request ended without a token: then `token_id` is -1, `prob` 0, top_k_* empty,
        and `slot` is -1 if the request never had one
    """

    slot: int
    token_id: int
    prob: float
    top_k_token_ids: np.ndarray
    top_k_probs: np.ndarray
    logprob: float
    top_k_logprobs: np.ndarray
    done: bool
    error: ValueError | None = None


def failed(slot: int, error: ValueError) -> Token:
    """The end of a request without a token."""
    none = np.empty(0, np.float32)
    return Token(slot, -1, 0.0, np.empty(0, np.int32), none, -math.inf, none, True, error)


@dataclasses.dataclass
class Prefill:
    """A request on its way to a slot, as `InferenceRunner.start` makes it.

    request: with its prompt as tokens, int32 [T]
    left: the chunks of it that are still to be computed, as from `chunks`
    scores: `LogProbs` of the tokens after each of those computed, if these are wanted, else None
    """

    request: Request
    left: list[tuple[int, int, int]]
    scores: list[LogProbs] | None
    row: Memory | None  # the cache; None once a slot has it, or an error took it
    logits: jax.Array | None = None  # [1, V], after the last chunk computed

    def log_probs(self) -> LogProbs:
        """Of all tokens but the first, which nothing predicts: [T - 1], in NumPy; once none is
        left."""
        parts = zip(*self.scores, strict=True)
        return LogProbs(*(np.concatenate(part)[:-1] for part in parts))


@dataclasses.dataclass
class Timing:
    """Tokens and seconds spent so far; those of prefill include each request's first new token."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


class Begun(NamedTuple):
    """A step of decoding that the device was given, and whose tokens nobody has fetched.

    running: the request of each slot that gets one, unless it turns out to have ended before
    found: `packed` samples
    """

    running: dict[int, Request]
    found: jax.Array


class InferenceRunner:
    """Serves requests with a loaded ModelRunner.

    `generate` runs any number of them; `insert`, `step` and `remove` are its parts, for callers
    that come and go; `start`, `prefill` and `insert_row` are those of `insert`, for callers who
    make steps between the chunks of a prompt; `run` is the reference's interface. One at a time:
    they share the slots. With several processes each makes the same calls.

    After Ctrl-C or an error it goes on. Ctrl-C loses nothing but the requests of a `generate` that
    it ends. An error ends others only if the device has already been given their cache, and then it
    says so.

    busy: the request that runs in each slot that is not free
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Any = None,
        slots: int = 1,
        sequence_len: int | None = None,
        pad_sizes: Sequence[int] = PAD_SIZES,
    ):
        """Allocates the cache: `slots` rows, and one to prefill, of `sequence_len` tokens.

        The parameters may be loaded later.

        tokenizer: has `encode` and `decode`; only needed for text
        sequence_len: longest prompt and continuation, by default the model's context
        pad_sizes: what the chunks of a prompt are padded to; the largest bounds a chunk
        """
        config, mesh = runner.config, runner.mesh
        check_slots(slots, mesh)
        self.runner = runner
        self.tokenizer = tokenizer
        self.sequence_len = config.sequence_len if sequence_len is None else sequence_len
        if self.sequence_len < 2:
            raise ValueError(f"sequence_len must be 2 or more, got {sequence_len}")
        self.pad_sizes = tuple(sorted({min(size, self.sequence_len) for size in pad_sizes}))
        self.num_slots = slots
        self.busy: dict[int, Request] = {}
        self._left: dict[int, int] = {}  # by slot, steps that a request takes part in, at most
        self._begun: list[Begun] = []
        self._undelivered: list[Token] = []  # of steps that Ctrl-C, or `generate`, did not hand out
        self._losses = 0  # how many times an error took all requests
        self._fetched, self._step_seconds = -math.inf, math.inf  # when the last step was, how long
        self.timing = Timing()

        make = functools.partial(empty_slots, config, sequence_len=self.sequence_len)
        make_slots, make_row = (functools.partial(make, slots=n) for n in (slots, 1))
        in_slots, in_row = (
            slots_shardings(mesh, jax.eval_shape(f)) for f in (make_slots, make_row)
        )
        everywhere = sharding.activation_sharding(mesh)
        with jax.set_mesh(mesh):
            self._new_slots = jax.jit(make_slots, out_shardings=in_slots)
            self._new_row = jax.jit(make_row, out_shardings=in_row)
            self._slots, self._row = self._new_slots(), self._new_row().memory
        self._prefill, self._decode = jit_steps(runner, in_slots, in_row.memory)
        self._insert = jax.jit(
            functools.partial(insert_row, eos=config.eos_token),
            donate_argnums=0,
            out_shardings=(in_slots, everywhere),
        )
        self._free = jax.jit(lambda active, slot: active.at[slot].set(False))

    def prompt_tokens(self, request: Request) -> np.ndarray:
        """The prompt as int32 [T], as it will be fed; ValueError for a request that cannot run."""
        check_sampling(request)
        tokens = self.encode(request.prompt)
        room = self.sequence_len - request.max_len
        if room < 1 or (len(tokens) > room and not request.truncate):
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and {request.max_len} new ones do not fit into "
                f"{self.sequence_len} cache slots; ask for fewer new tokens, shorten the prompt or "
                "have its start dropped (truncate), or choose a longer sequence_len"
            )
        return tokens[-room:]

    def encode(self, prompt: str | Sequence[int]) -> np.ndarray:
        """The tokens of a prompt of any length, int32 [T]; ValueError if it is none."""
        tokens = self._encode(prompt) if isinstance(prompt, str) else prompt
        empty = operator.length_hint(tokens, 1) == 0
        return check_tokens([BOS] if empty else tokens, self.runner.config.vocab_size, axes=1)

    def _encode(self, text: str) -> Sequence[int]:
        self._check_tokenizer()
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the prompt has {text[error.start]!r} at character {error.start}, half of a "
                "character or a byte that was not UTF-8; convert the text to UTF-8"
            ) from None
        return self.tokenizer.encode(text)

    def _check_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise ValueError("text needs a tokenizer; give InferenceRunner one, or use token ids")

    def insert(self, request: Request) -> Token:
        """Prefills a request, gives it the lowest free slot, and samples its first token.

        ValueError for a request that cannot run, or if no slot is free. After an exception it has
        no slot.
        """
        return self._insert_all(self._with_tokens(request))

    def start(self, request: Request, scored: bool = False) -> Prefill:
        """A request to `prefill` chunk by chunk, and then to give a slot with `insert_row`.

        Any calls may come between these, and it may be dropped at any time. ValueError for a
        request that cannot run.

        scored: whether to compute the log-probabilities of its prompt, in chunks of at most
            SCORED_SIZE tokens: it takes all their logits, not those of the last one
        """
        return self._start(self._with_tokens(request), scored)

    def prefill(self, started: Prefill) -> None:
        """Computes the next chunk of a prompt, of which some must be left.

        After an exception it has to be started anew; after Ctrl-C it goes on.
        """
        tokens, (start, stop, size) = started.request.prompt, started.left[0]
        padded = np.zeros((2, 1, size), np.int32)
        for row, part in enumerate((tokens[start:stop], tokens[start + 1 : stop + 1])):
            padded[row, 0, : len(part)] = part
        following = () if started.scores is None else (padded[1],)
        begin = time.perf_counter()
        with uninterrupted(), jax.set_mesh(self.runner.mesh):
            row, started.row = self._row_of(started), None
            row, logits, scores = self._prefill(
                self.runner.params, row, padded[0], start, stop - start, *following
            )
            # An error on the device must come out here, before the slots are given away.
            jax.block_until_ready(logits)
            if scores is not None:
                found = jax.device_get(scores)
                started.scores += [LogProbs(*(x[0, : stop - start] for x in found))]
            started.row, started.logits, started.left = row, logits, started.left[1:]
        self.timing.prefill_seconds += time.perf_counter() - begin
        self.timing.prefill_tokens += stop - start

    def insert_row(self, started: Prefill) -> Token:
        """Gives the lowest free slot to a prompt of which nothing is left, and samples its first
        token.

        ValueError if something is left, or if no slot is free: it can have one later.
        """
        if started.left:
            raise ValueError(f"{len(started.left)} chunks of this prompt are still to be computed")
        slot, request, row = self._free_slot(), started.request, self._row_of(started)
        settings = SampleSettings(
            np.float32(request.temperature),
            np.float32(request.nucleus_p),
            np.uint32(request.rng_seed),
            np.int32(request.max_len),
        )
        begin = time.perf_counter()
        with uninterrupted():
            found = self._exchange(
                lambda slots: self._insert(slots, row, started.logits, settings, slot)
            )
            ((sample, active),) = self._fetch([found])
        self.timing.prefill_seconds += time.perf_counter() - begin
        token = make_token(slot, active[0], *(x[0] for x in sample))
        # Plain JAX multiplies what is masked by 0, and 0 times NaN is NaN.
        self._row, started.row = None if token.error else row, None
        self._left[slot] = request.max_len - 1
        busy = self.busy if token.done else self.busy | {slot: request}
        # Until here only the device knows of the request, and it computes a row that nobody reads.
        self.busy = busy
        return token

    def step(self, seconds: float = 0.0) -> list[Token]:
        """The next token of every request that has a slot, but for one that has just got it: the
        device may already be at a step without it, and the next call has its token.

        Those that an interrupted call computed come with the next one, before any others.

        seconds: how long tokens may be held back. Then the next ones come, too, in order, of as
            many steps as last so long, up to GROUP_STEPS and to the end of any request: the host
            wakes up once for all of them. Not with several processes, whose clocks differ
        """
        slots = self.busy.keys()
        self._wait_for(slots, seconds)
        return self._take(slots)

    def remove(self, slot: int) -> None:
        """Ends a request early; nothing happens to a free slot."""
        self._release({slot} & self.busy.keys())

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[int, Token]]:
        """(number of the request, its next token), as they come.

        A request starts as soon as a slot is free, beside those that run. One that cannot run, or
        whose logits are not finite, ends with a token that has an `error`, and the others go on.
        Closing the iterator ends them, but none that others inserted.
        """
        waiting, losses = enumerate(requests), self._losses
        running: dict[int, tuple[int, Request]] = {}  # number: slot, and the request as in `busy`
        try:
            while True:
                while len(self.busy) < self.num_slots or not running:
                    if (item := next(waiting, None)) is None:
                        break
                    number, token = item[0], self._try(item[1])
                    if not token.done:
                        running[number] = token.slot, self.busy[token.slot]
                    yield number, token
                own = self._own(running)
                if len(own) < len(running) and self._losses > losses:
                    raise RuntimeError("an error in another call ended these requests; see there")
                running = {number: running[number] for number in own.values()}
                if not running and item is None:
                    return
                self._wait_for(own.keys(), GROUP_SECONDS)
                while tokens := self._take(own.keys(), most=1):  # between two, one may be removed
                    number = own[tokens[0].slot]
                    if tokens[0].done:
                        del running[number]
                    yield number, tokens[0]
                    own = self._own(running)
        finally:
            self._release(self._own(running).keys())

    # What follows is what Ctrl-C must not break. Python handles signals when a function is called
    # or returns from C, and when it loops: lines without these are never left halfway.

    def _with_tokens(self, request: Request) -> Request:
        return dataclasses.replace(request, prompt=self.prompt_tokens(request))

    def _try(self, request: Request) -> Token:
        """`insert`; a request that cannot run fails."""
        try:
            request = self._with_tokens(request)
        except ValueError as error:
            return failed(-1, error)
        return self._insert_all(request)

    def _own(self, running: dict[int, tuple[int, Request]]) -> dict[int, int]:
        """{slot: number} of those of `generate`'s requests that still have their slot."""
        return {slot: n for n, (slot, own) in running.items() if self.busy.get(slot) is own}

    def _insert_all(self, request: Request) -> Token:
        """`insert`, of a prompt of tokens."""
        self._free_slot()
        started = self._start(request)
        while started.left:
            self.prefill(started)
        return self.insert_row(started)

    def _free_slot(self) -> int:
        """The lowest one; ValueError if there is none."""
        free = set(range(self.num_slots)) - self.busy.keys()
        if not free:
            raise ValueError(f"all {self.num_slots} slots are busy; step until one is done")
        return min(free)

    def _start(self, request: Request, scored: bool = False) -> Prefill:
        """`start`, of a prompt of tokens; it is given the row that the last one left, if any."""
        row, self._row = self._row, None
        if row is None:
            with jax.set_mesh(self.runner.mesh):
                row = self._new_row().memory
        sizes = self.pad_sizes
        if scored:
            sizes = [size for size in sizes if size <= SCORED_SIZE] or sizes[:1]
        left = list(chunks(len(request.prompt), sizes))
        return Prefill(request, left, [] if scored else None, row)

    def _row_of(self, started: Prefill) -> Memory:
        if started.row is None:
            raise RuntimeError("this prompt has a slot, or an error took its cache; start it anew")
        return started.row

    def _exchange(self, call: Callable) -> jax.Array:
        """All slots for those that a call makes of them; what else it returns, to be fetched.

        The call is given the old ones for good. If it fails then, all requests are lost with them.
        Needs `uninterrupted`.
        """
        with jax.set_mesh(self.runner.mesh):
            slots, self._slots = self._slots or self._new_slots(), None
            try:
                self._slots, found = call(slots)
            except BaseException as error:
                if any(x.is_deleted() for x in jax.tree.leaves(slots)):
                    self._lose(error)
                else:
                    self._slots = slots
                raise
            return found

    def _fetch(self, found: Sequence[jax.Array]) -> list[tuple[SampleOutput, np.ndarray]]:
        """Waits for the device. If it fails, so has the cache, and all requests are lost."""
        try:
            jax.block_until_ready(found[-1])  # to wake up once
            return [unpacked(x) for x in jax.device_get(found)]
        except BaseException as error:
            self._lose(error)
            raise

    def _lose(self, error: BaseException) -> None:
        self.busy, self._begun, self._undelivered, self._slots = {}, [], [], None
        self._losses += 1
        error.add_note("All requests of this runner are lost; its slots are free.")

    def _going_on(self, requests: dict[int, Request]) -> dict[int, Request]:
        """Those that still have their slot, and of which no last token is known."""
        ended = {token.slot for token in self._undelivered if token.done}
        return {
            slot: request
            for slot, request in requests.items()
            if self.busy.get(slot) is request and slot not in ended
        }

    def _begin(self) -> None:
        """Gives the device a step of every request that has tokens left."""
        running = self._with_steps_left()
        found = self._exchange(functools.partial(self._decode, self.runner.params))
        self._begun.append(Begun(running, found))
        self._left.update((slot, self._left[slot] - 1) for slot in running)

    def _with_steps_left(self) -> dict[int, Request]:
        going_on = self._going_on(self.busy)
        return {slot: request for slot, request in going_on.items() if self._left[slot]}

    def _steps_within(self, seconds: float) -> int:
        """How many steps to fetch together: none after the last one of a request."""
        if jax.process_count() > 1:
            return 1
        ends = [len(self._begun) + self._left[slot] for slot in self._going_on(self.busy)]
        within = int(min(GROUP_STEPS, seconds / self._step_seconds))
        return max(1, min([within, *ends]))

    def _step(self, seconds: float = 0.0) -> None:
        """The next token of every request in the first step that was begun; and of those after it
        that are done within some seconds.

        Needs `uninterrupted`. Before it waits for them, it begins one more, so that the device can
        go on at once.
        """
        begin = time.perf_counter()
        count = self._steps_within(seconds)
        while not self._begun or len(self._begun) <= count and self._with_steps_left():
            self._begin()
        fetched = self._fetch([step.found for step in self._begun[:count]])
        for samples, active in fetched:
            tokens = [
                make_token(slot, active[slot], *(x[slot] for x in samples))
                for slot in sorted(self._going_on(self._begun[0].running))
            ]
            self.timing.decode_tokens += len(tokens)
            self._begun, self._undelivered = self._begun[1:], self._undelivered + tokens
        end = time.perf_counter()
        self.timing.decode_seconds += end - begin
        # Whatever came between counts, too, such as a prompt: then fewer are held back.
        self._step_seconds, self._fetched = (end - self._fetched) / len(fetched), end

    def _wait_for(self, slots: Set[int], seconds: float) -> None:
        """Makes steps until there are tokens for these slots, if there are none."""
        while not any(token.slot in slots for token in self._undelivered):
            with uninterrupted():
                self._step(seconds)
            if not slots & self.busy.keys():
                break

    def _take(self, slots: Set[int], most: float = math.inf) -> list[Token]:
        """The first tokens that are there for these slots."""
        tokens, others, busy = [], [], dict(self.busy)
        for token in self._undelivered:
            if len(tokens) == most:
                break
            mine = token.slot in slots
            (tokens if mine else others).append(token)
            if mine and token.done:
                del busy[token.slot]
        rest = self._undelivered[len(tokens) + len(others) :]
        # The caller has them as soon as they are gone from here.
        self._undelivered, self.busy = others + rest, busy
        return tokens

    def _release(self, slots: Set[int]) -> None:
        """Frees slots that are busy."""
        with uninterrupted(), jax.set_mesh(self.runner.mesh):
            self.busy = {slot: r for slot, r in self.busy.items() if slot not in slots}
            self._undelivered = [token for token in self._undelivered if token.slot not in slots]
            for slot in slots:
                active = self._free(self._slots.active, slot)
                self._slots = self._slots._replace(active=active)

    def warm_up(self, lengths: Iterable[int], scored: bool = False) -> None:
        """Compiles what prompts of these lengths need; takes a free slot, and resets `timing`.

        scored: whether some of them will be
        """
        sizes = {size for length in lengths for *_, size in chunks(length, self.pad_sizes)}
        for size in sorted(sizes):
            request = Request([BOS] * min(size, self.sequence_len - 1), max_len=1)
            self.insert(request)
            if scored and size <= SCORED_SIZE:
                self.prefill(self.start(request, scored))
        with uninterrupted():
            self._step()
        self.timing = Timing()

    def run(self) -> "Server":
        """The reference's server: after a first `next`, `send` a Request to get its text."""
        return Server(self)

    def text(self, request: Request) -> str:
        """The continuation of one prompt, without [EOS].

        Raises ValueError if it cannot run, or if its logits are not finite.
        """
        return self.texts([request])[0]

    def texts(self, requests: Iterable[Request]) -> list[str]:
        """The continuations of some prompts, in their order; they share the slots.

        Raises what `text` does, once all others have ended.
        """
        self._check_tokenizer()
        requests = list(requests)
        tokens: list[list[Token]] = [[] for _ in requests]
        # Closed here: a traceback, which a notebook keeps, would keep it open, and its slot busy.
        with contextlib.closing(self.generate(requests)) as generated:
            for number, token in generated:
                tokens[number].append(token)
        for number, of_one in enumerate(tokens):
            if error := of_one[-1].error:
                error.add_note(f"That is request {number} of {len(requests)}, counted from 0.")
                raise error
        return [self._decode_tokens(of_one) for of_one in tokens]

    def _decode_tokens(self, tokens: Sequence[Token]) -> str:
        found = [token.token_id for token in tokens]
        if found[-1] == self.runner.config.eos_token:
            found.pop()
        return self.tokenizer.decode(found)


class Server:
    """What `next` and `send` are in the reference's generator; an error does not end it."""

    def __init__(self, inference: InferenceRunner):
        self.inference = inference

    def __next__(self) -> None:
        """Ready."""

    def send(self, request: Request | None) -> str | None:
        """The text that a request gets."""
        return None if request is None else self.inference.text(request)


def sample_from_model(server: Server, prompt: str, max_len: int, temperature: float) -> str:
    """The reference's call: the text that a server of `InferenceRunner.run` adds to a prompt."""
    next(server)
    return server.send(Request(prompt, temperature, max_len=max_len))


def make_token(slot: int, active, token_id, prob, ids, probs, logprob, logprobs) -> Token:
    """The token of a slot, of what it sampled; active: whether it goes on."""
    if math.isnan(prob):
        return failed(slot, ValueError(NOT_FINITE))
    logprob, done = float(logprob), not active
    return Token(slot, int(token_id), float(prob), ids, probs, logprob, logprobs, done)


def chunks(length: int, pad_sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """The parts that a prompt is prefilled in: start, stop and padded size of each.

    >>> list(chunks(10, (2, 4)))
    [(0, 4, 4), (4, 8, 4), (8, 10, 2)]
    """
    for start in range(0, length, pad_sizes[-1]):
        stop = min(start + pad_sizes[-1], length)
        yield start, stop, next(size for size in pad_sizes if size >= stop - start)


def check_slots(slots: int, mesh: jax.sharding.Mesh) -> None:
    """ValueError for a number of slots that cannot be spread over the mesh."""
    rows = mesh.shape["data"]
    if slots < 1 or slots % rows:
        raise ValueError(
            f"{slots} slots do not spread over the {rows} rows of the mesh; choose a multiple of "
            f"its 'data' axis, {rows}"
        )


def check_sampling(request: Request) -> None:
    """ValueError for settings that mean nothing."""
    finite, whole = "a number, finite in float32", "a whole number"
    rules = {
        "temperature": (numbers.Real, lambda x: 0 <= x <= FLOAT32_MAX, f"0 or more ({finite})"),
        "nucleus_p": (numbers.Real, lambda x: 0 < x <= 1, "above 0 and at most 1 (a number)"),
        "rng_seed": (numbers.Integral, lambda x: 0 <= x < 2**32, f"from 0 to 2**32 - 1 ({whole})"),
        "max_len": (numbers.Integral, lambda x: x >= 1, f"1 or more ({whole})"),
    }
    for name, (kind, fine, expected) in rules.items():
        value = getattr(request, name)
        if isinstance(value, bool) or not isinstance(value, kind) or not fine(value):
            raise ValueError(f"{name} must be {expected}, got {reprlib.repr(value)}")


# --- Planning -------------------------------------------------------------------------------------


def precision_of(folder, template: dict, weights: str | None = None) -> dict[str, str]:
    """{path: format} to load a checkpoint in: what `weights` names in PRECISIONS.

    By default as it was converted, and a released one as "ternary". template: as from
    `abstract_params`
    """
    stored = None if weights else checkpoint.stored_precision(folder)
    return stored or formats_of(template, precision_table(weights or "ternary"))


def abstract_weights(config: LanguageModelConfig, precision: quantize.Rules) -> dict:
    """The shapes and dtypes that `ModelRunner.load` gives the parameters; nothing is allocated.

    Int8 matrices have the one scale for each column that they have at least.
    """
    params = quantize.apply_rules(
        precision, abstract_params(config), lambda _, format, w: formats.shapes(format, w.shape)
    )
    return jax.eval_shape(functools.partial(cast_embeddings, config=config), params)


def device_memory(
    runner: ModelRunner, params: dict, slots: int, sequence_len: int, scored: bool = False
) -> dict:
    """Bytes that serving takes on each device, by purpose; nothing is allocated.

    params: as from `abstract_weights`
    scored: whether prompts will be: two or four times the logits of SCORED_SIZE tokens

    "activations" is an estimate: what the larger of a prefill chunk and a decode step needs besides
    its arguments, and the logits of all slots, five times, to sort and to sample them.
    """
    config, mesh = runner.config, runner.mesh
    shardings = sharding.parameter_shardings(mesh, params)
    table = sharding.device_bytes(params[EMBEDDINGS], shardings[EMBEDDINGS])
    rows = [
        jax.eval_shape(functools.partial(empty_slots, config, n, sequence_len)) for n in (slots, 1)
    ]
    local = local_shapes(params, shardings)
    step = functools.partial(step_bytes, config, local, sequence_len)
    prefill = step(1, min(PAD_SIZES[-1], sequence_len))
    decode = step(-(-slots // mesh.shape["data"]), 1)
    copies = 4 if kernels.platform() == "tpu" else 2  # as compiled
    scores = copies * 4 * min(SCORED_SIZE, sequence_len) * config.vocab_size if scored else 0
    return {
        "weights": sharding.device_bytes(params, shardings) - table,
        "embeddings": table,
        "cache": sum(sharding.device_bytes(row, slots_shardings(mesh, row)) for row in rows),
        "activations": max(prefill, decode, scores) + 5 * 4 * slots * config.vocab_size,
    }


def token_bytes(config: LanguageModelConfig, params: dict, room: int) -> tuple[int, int]:
    """Bytes of weights that a decoded token reads, and of these, from the disk, if they are mapped
    and memory has room for so many.

    params: as from `abstract_weights`

    What every token needs stays in memory, and of the experts as many as there is room for. If not
    even that fits, all is read again: what was used longest ago goes first.
    """
    experts = others = 0
    for module, entries in params.items():
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(entries))
        if "/moe/" in module:
            experts += size
        else:
            others += size
    share = config.num_selected_experts / config.num_experts
    read = others + share * experts
    missing = share * max(0, experts + others - room) if room >= others else read
    return round(read), round(missing)


def local_shapes(params, shardings):
    """The shapes of a device's parts of a tree of `ShapeDtypeStruct`s."""
    return jax.tree.map(lambda x, to: x.update(shape=to.shard_shape(x.shape)), params, shardings)


def step_bytes(
    config: LanguageModelConfig, local: dict, sequence_len: int, batch: int, tokens: int
) -> int:
    """Bytes that a device needs for its part of tokens [B, T], besides the step's arguments.

    local: the shapes of the device's parts of the parameters

    Four arrays of hidden states stay. Beside them come, one after the other: three arrays of
    attention's logits for a block of the cache; the sums of both products that go into the experts,
    with what they read and what is made of them; the sums that come out of the experts, and once
    more where two planes are joined, or few are added over a mesh. So XLA does with Grok-1 on GPUs
    and TPUs, small models on CPUs.
    """
    count, size, sums = batch * tokens, jnp.dtype(config.fprop_dtype).itemsize, sum_bytes(config)
    up, rows = expert_weight(config, local), expert_rows(config, local, count)[0]
    width, x = up.shape[-1], jax.ShapeDtypeStruct((rows, config.emb_size), config.fprop_dtype)
    if quantize.gated_dot.kernel(x, up, up, None, activations=config.activations):
        on_cpu = kernels.platform() == "cpu"  # elsewhere sums are scaled after the kernel
        inner, outer = 0, size if on_cpu and width == config.ffn_size else sums
    else:
        inner, outer = 2 * sums, sums
    scattered = experts.is_scattered(up, count, config.ffn_size // width)
    again = 4 if not scattered or config.activations == "int15" else 0
    stages = (
        logit_bytes(config, local, sequence_len, batch, tokens),
        rows * (size * config.emb_size + inner * width + size * width),
        rows * (size * width + (outer + again) * config.emb_size),
    )
    hidden = 4 * size * count * config.emb_size
    return hidden + max(stages) + plain_bytes(config, local, count)


def logit_bytes(
    config: LanguageModelConfig, local: dict, sequence_len: int, batch: int, tokens: int
) -> int:
    """Three arrays of attention's logits for a block of the cache; a kernel makes none."""
    heads, kv_heads = (
        local[f"{LAYER}/multi_head_attention/{name}"]["w"].shape[-1] // config.key_size
        for name in ("query", "key")
    )
    q, new, cache = (
        jax.ShapeDtypeStruct(shape, config.fprop_dtype)
        for shape in (
            (batch, tokens, heads, config.key_size),
            (batch, tokens, kv_heads, config.key_size),
            (batch, kv_heads, sequence_len, config.key_size),
        )
    )
    options = {"multiplier": config.attn_output_multiplier, "cap": config.attn_logit_cap}
    arrays = q, new, new, cache, cache, None, None
    if attention.attend.kernel(q, cache, **options) or attend_and_write.kernel(*arrays, **options):
        return 0
    seen = sequence_len if tokens == 1 else min(attention.CACHE_BLOCK, sequence_len)
    return 3 * 4 * batch * tokens * heads * seen


def plain_bytes(config: LanguageModelConfig, local: dict, count: int) -> int:
    """What products without a kernel add to `step_bytes`, for so many tokens."""
    up, (rows, blocks) = expert_weight(config, local), expert_rows(config, local, count)
    platform, total = kernels.platform(), 0
    if platform == "cpu" and not kernels.on_cpu():  # the table in float32
        total += 4 * math.prod(local[EMBEDDINGS]["embeddings"].shape)
    if quantize.has_grouped_kernel(up, config.activations, rows, config.fprop_dtype):
        return total
    if isinstance(up, jax.ShapeDtypeStruct):  # a copy of the matrix for each block, then rounded
        rounded = 2 if config.fprop_dtype == "bfloat16" else 0
        return total + blocks * math.prod(up.shape[-2:]) * (4 + rounded)
    if platform == "cpu":
        return total + loop_bytes(config, local, count, rows)
    if isinstance(up, quantize.QuantizedWeight) and config.activations != "float":
        # XLA:GPU transposes all experts for products of integers, of two matrices at a time.
        total += 2 * up.codes.size if platform == "gpu" else 0
    if platform == "tpu" and config.activations == "int15":  # sums of planes beside those of both
        total += 2 * sum_bytes(config) * rows * up.shape[-1]
    return total


def loop_bytes(config: LanguageModelConfig, local: dict, count: int, rows: int) -> int:
    """What loops of plain JAX add on a CPU, for so many tokens and rows of experts.

    XLA makes the sums that they fill before anything else, those of all layers. Then there are the
    tiles that they unpack, and the planes of int15 by themselves.
    """
    sums = sum_bytes(config)

    def loops(w) -> bool:
        quantized = isinstance(w, quantize.QuantizedWeight | quantize.PackedWeight)
        return quantized and not _has_kernel(w, config.activations)

    matrices = {
        module: entries["w"]
        for module, entries in local.items()
        if module.startswith(f"{LAYER}/") and loops(entries.get("w"))
    }
    if not matrices:
        return 0
    filled = sum(
        sums * (count if "attention" in module else rows) * w.shape[-1]
        for module, w in matrices.items()
    )
    up = expert_weight(config, local)
    counted = 2 * sums * rows * up.shape[-1] if loops(up) else 0  # in `step_bytes`
    tile = min(quantize.TILE, max(math.prod(w.shape[-2:]) for w in matrices.values()))
    planes = 0 if sums == 4 else 4 * rows * up.shape[-1]
    return config.num_layers * filled - counted + planes + 10 * tile


def sum_bytes(config: LanguageModelConfig) -> int:
    """Bytes of an unscaled sum: int32 or float32, or two for the planes of int15 activations."""
    return 8 if config.activations == "int15" else 4


def expert_weight(config: LanguageModelConfig, params: dict):
    """A matrix that goes into the experts, or into a dense block."""
    return params[f"{LAYER}/moe/linear" if config.num_experts > 1 else f"{LAYER}/linear"]["w"]


def expert_rows(config: LanguageModelConfig, params: dict, count: int) -> tuple[int, int]:
    """Rows, padding included, and blocks that the experts make of so many tokens."""
    if config.num_experts == 1:
        return count, 1
    index = jax.ShapeDtypeStruct((count, config.num_selected_experts), jnp.int32)
    weights = [params[f"{LAYER}/moe/{name}"]["w"] for name in ("linear", "linear_v", "linear_1")]
    group = functools.partial(
        experts.group_by_expert,
        num_experts=config.num_experts,
        joined=experts.joins_blocks(weights, config.activations, index.size, config.fprop_dtype),
    )
    blocks = jax.eval_shape(group, index)
    return blocks.token_of_row.size, blocks.expert_of_block.size


def products_by_path(runner: ModelRunner, params: dict) -> dict[str, list[str]]:
    """Which quantized matrices of layers a kernel multiplies on this backend, and which plain JAX.

    {"kernel": names, "plain JAX": names}, such as "moe/linear_v"; of one row as of many.

    params: as from `abstract_weights`
    """
    local = local_shapes(params, sharding.parameter_shardings(runner.mesh, params))
    found: dict[str, list[str]] = {"kernel": [], "plain JAX": []}
    for module, entries in local.items():
        w = entries.get("w")
        if isinstance(w, quantize.PackedWeight | quantize.QuantizedWeight):
            names = found["kernel" if _has_kernel(w, runner.config.activations) else "plain JAX"]
            name = module.split("/", 2)[2]
            names += [name] * (name not in names)
    return found


def _has_kernel(w, activations: str) -> bool:
    """Whether a weight, in abstract form, has a kernel for such activations."""
    return all(quantize.has_kernel(w, activations, rows) for rows in (1, PAD_SIZES[-1]))
