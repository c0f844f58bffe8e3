"""Grok as a GGUF file, for llama.cpp, and such a file as a checkpoint.

`gguf_file.py` has the bytes; here is which tensor and which key is what, the vocabulary, and what a
weight of ours can be there. In a file of ours integers and trits are the same, and scales are
rounded to the types' floats; a format that no type holds exactly is refused.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import tqdm

import checkpoint
import conversion
import files
import formats
import gguf_file
import model
import quantize
import shards
from files import CheckpointError
from gguf_file import BLOCKS, CURE, FLOATS, TERNARY, File, Stored, Tensor, decode
from quantize import PackedWeight, QuantizedWeight
from tensor_file import release

TABLE = "language_model/in_out_embed/embeddings"
AUTO = ("TQ2_0", "Q2_0", "Q8_0")  # the first that holds a matrix
CHOICES = ("auto", *TERNARY, "Q8_0", "F16", "F32")  # for the matrices
TABLES = ("F16", "F32", "BF16", "Q8_0")  # for the embeddings
HALF = 2**-11  # what rounding to float16 makes of numbers from 2^-14 on, relative
CLOSE = 2**-10  # relative: two roundings to float16


# --- What a matrix can be -------------------------------------------------------------------------


def obstacle(w: Any, kind: str) -> str | None:
    """Why a type has no exact form of a weight, real or abstract; None if it has."""
    if kind in FLOATS:
        return None
    form, inputs, groups = BLOCKS[kind], w.shape[-2], 1
    if isinstance(w, PackedWeight):
        if kind in TERNARY and w.planes > 1:
            return "it is the sum of two ternary matrices"
        if kind in TERNARY and w.multipliers is not None:
            groups = w.multipliers.shape[-2]
    elif not isinstance(w, QuantizedWeight):
        return "it is float32"
    elif kind in TERNARY:
        return "it is int8"
    else:
        groups = w.scales.shape[-2]
    if inputs % form.inputs:
        return f"it has {inputs} inputs, no multiple of {form.inputs}"
    if inputs // groups % (block := form.block or inputs):
        return f"{inputs // groups} of its inputs share a scale, and {block} do there"
    return None


def type_of(w: Any, wanted: str) -> str:
    """The type that a matrix of a linear layer is written as, of CHOICES what is wanted.

    int8 is Q8_0 beside ternary types, too, and float32 is F32 beside all types of integers.
    """
    if wanted in FLOATS or not isinstance(w, PackedWeight | QuantizedWeight):
        return wanted if wanted in FLOATS else "F32"
    if wanted == "auto":
        return next((kind for kind in AUTO if obstacle(w, kind) is None), "F32")
    return "Q8_0" if isinstance(w, QuantizedWeight) else wanted


def types_of(leaves: dict[str, Any], wanted: str) -> dict[str, str]:
    """{path: type} of matrices {path: leaf}, real or abstract; ValueError, with the cure, where a
    type has no exact form of one, and where none would be of the type that is wanted."""
    chosen = {path: type_of(leaf, wanted) for path, leaf in leaves.items()}
    integers = [path for path, kind in chosen.items() if kind not in FLOATS]
    reasons = {path: obstacle(leaves[path], chosen[path]) for path in integers}
    if wrong := next((path for path in reasons if reasons[path]), None):
        fitting = [
            kind
            for kind in CHOICES[1:]
            if not any(obstacle(leaves[path], type_of(leaves[path], kind)) for path in integers)
        ]
        raise ValueError(
            f"{wrong} cannot be {chosen[wrong]}: {reasons[wrong]}; these types take all matrices "
            f"of this checkpoint: {', '.join(fitting)}; or let auto choose for each"
        )
    if wanted != "auto" and wanted not in chosen.values():
        found = sorted(set(chosen.values()))
        raise ValueError(
            f"no matrix would be {wanted}, but {found}: this checkpoint has none of its kind; "
            "choose other --weights, or --gguf auto"
        )
    return chosen


# --- Grok -----------------------------------------------------------------------------------------

NORMS = {
    "attn_norm": "rms_norm",
    "attn_output_norm": "rms_norm_1",
    "ffn_norm": "rms_norm_2",
    "layer_output_norm": "rms_norm_3",
}
MATRICES = {
    "attn_q": "multi_head_attention/query",
    "attn_k": "multi_head_attention/key",
    "attn_v": "multi_head_attention/value",
    "attn_output": "multi_head_attention/linear",
    "ffn_gate_exps": "moe/linear",
    "ffn_up_exps": "moe/linear_v",
    "ffn_down_exps": "moe/linear_1",
}
LINEAR = tuple(f"/{name}/w" for name in MATRICES.values())
ALIASES = {"post_ffw_norm": "layer_output_norm"}

KEYS = {  # llama.cpp's, behind "grok.", and the names of our configuration
    "vocab_size": "vocab_size",
    "context_length": "sequence_len",
    "embedding_length": "emb_size",
    "block_count": "num_layers",
    "feed_forward_length": "ffn_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_selected_experts",
    "embedding_scale": "embedding_multiplier_scale",
    "logit_scale": "output_multiplier_scale",
    "attention.head_count": "num_q_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.key_length": "key_size",
    "attention.value_length": "key_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.output_scale": "attn_output_multiplier",
    "attn_logit_softcapping": "attn_logit_cap",
    "rope.dimension_count": "key_size",
    "rope.freq_base": "rope_base",
}
# Keys of ours, which llama.cpp passes over: config.json, and tokenizer.model as it is.
OURS, TOKENIZER = "ternary_grok.config", "ternary_grok.tokenizer"


def grok_keys(config: model.LanguageModelConfig) -> dict:
    """What llama.cpp must know of a model; ValueError for one that it cannot run.

    Without more keys, of `vocabulary`, token ids stand for themselves.
    """
    c = config
    if c.num_experts <= 1 or c.num_q_heads * c.key_size != c.emb_size:
        raise ValueError(
            "llama.cpp's grok has experts, and as many query heads as fill emb_size; got "
            f"{c.num_experts} experts and {c.num_q_heads} x {c.key_size} for {c.emb_size}"
        )
    floats = {field.name for field in dataclasses.fields(c) if field.type is float} | {"rope_base"}
    values = {f"grok.{k}": getattr(c, ours) for k, ours in KEYS.items()}
    values |= {f"grok.{k}": float(getattr(c, ours)) for k, ours in KEYS.items() if ours in floats}
    return {
        "general.architecture": "grok",
        **values,
        OURS: json.dumps(model.config_to_dict(c)),
        "tokenizer.ggml.model": "no_vocab",
    }


def names(num_layers: int) -> dict[str, str]:
    """{path of a parameter: name of its tensor}."""
    found = {
        TABLE: "token_embd.weight",
        "language_model/rms_norm/scale": "output_norm.weight",
    }
    for i in range(num_layers):
        ours, theirs = f"transformer/decoder_layer_{i}", f"blk.{i}"
        found |= {f"{ours}/{ours_}/scale": f"{theirs}.{n}.weight" for n, ours_ in NORMS.items()}
        found[f"{ours}/router/w"] = f"{theirs}.ffn_gate_inp.weight"
        found |= {f"{ours}/{ours_}/w": f"{theirs}.{n}.weight" for n, ours_ in MATRICES.items()}
    return found


def tensors_of(
    config: model.LanguageModelConfig,
    leaves: dict[str, Any],
    sources: dict[str, Callable],
    matrices: str,
    table: str,
) -> dict[str, Tensor]:
    """{name: Tensor} of all parameters; ValueError as of `types_of`.

    leaves: {path: real or abstract leaf}; sources: {path: Tensor.experts}, of the leaf as it is
    matrices: of CHOICES; table: of TABLES
    """
    kinds = types_of({p: leaf for p, leaf in leaves.items() if p.endswith(LINEAR)}, matrices)
    found = {}
    for path, name in names(config.num_layers).items():
        *lead, last = leaves[path].shape
        if path == TABLE:
            if table == "Q8_0" and last % BLOCKS[table].inputs:
                raise ValueError(f"embeddings of {last} cannot be Q8_0, in blocks of 32; take F16")
            rounded = table == "Q8_0" and config.embeddings == "int8"
            source = functools.partial(_table_rows, sources[path], rounded)
            found[name] = Tensor(table, (*lead, last), source)
        else:
            shape = (*lead[:-1], last, *lead[-1:])  # one row of a norm's scale
            found[name] = Tensor(kinds.get(path, "F32"), shape, sources[path])
    return found


def _table_rows(source: Callable, rounded: bool) -> Iterator[Callable]:
    """Rows of an embedding table as outputs.

    rounded: to int8 with a scale for each row, as the model keeps it in memory
    """
    (columns,) = source()
    whole = columns(slice(None))

    def read(rows):
        part = whole[rows]
        if not rounded:
            return part.T
        made = jax.tree.map(np.asarray, quantize.quantize_table(part))
        return QuantizedWeight(made.codes.T, made.scales.T)

    yield read


def of_leaf(leaf: Any) -> Callable:
    """`Tensor.experts` of a weight in memory, or mapped."""
    stack = conversion.stacked(as_matrix(leaf))

    def read(expert, outputs):
        here = slice(expert, expert + 1)
        return jax.tree.map(lambda x: x[0], conversion.outputs_of(stack, here, outputs))

    return lambda: (functools.partial(read, e) for e in range(stack.shape[0]))


def as_matrix(leaf: Any):
    """A norm's scale [D] as [D, 1], other weights as they are."""
    return leaf[:, None] if isinstance(leaf, np.ndarray) and leaf.ndim == 1 else leaf


def of_entry(entry: checkpoint.Entry, pool) -> Iterator[Callable]:
    """`Tensor.experts` of a parameter of a checkpoint, in the format that it is to have.

    pool: of conversions, not the one whose threads call
    """
    tensor = entry.read()
    if not isinstance(tensor, np.ndarray):
        conversion.check_scales(tensor.scales, entry.title)
    if entry.format == checkpoint.format_of(tensor):
        experts = of_leaf(tensor)()
    else:
        experts = _converted(entry, tensor, pool)
    for read in experts:
        yield functools.partial(_checked, entry.title, read)
        for array in shards.parts("", tensor).values():
            release(array)


def _converted(entry, tensor, pool) -> Iterator[Callable]:
    make = conversion.converter(tensor, entry.format, entry.title, pool)
    width = entry.restored.packed.shape[-1] if isinstance(entry.restored, PackedWeight) else 0

    def read(expert, outputs):
        made = make((slice(expert, expert + 1), outputs, slice(0, width)))
        return jax.tree.map(lambda x: x[0], made)

    for expert in range(conversion.stacked(tensor).shape[0]):
        yield functools.partial(read, expert)


def _checked(title: str, read: Callable, outputs: slice):
    with files.naming(title):
        w = read(outputs)
    if isinstance(w, np.ndarray):
        conversion.check_finite(w, title)
    return w


def of_params(
    config: model.LanguageModelConfig, params: dict, matrices: str = "TQ2_0", table: str = "F16"
) -> dict[str, Tensor]:
    """The tensors of parameters in memory."""
    leaves = {
        f"{module}/{name}": quantize.in_rows(jax.tree.map(np.asarray, w))
        for module, entries in params.items()
        for name, w in entries.items()
    }
    leaves[TABLE] = quantize.dequantize(leaves[TABLE])
    sources = {path: of_leaf(leaf) for path, leaf in leaves.items()}
    return tensors_of(config, leaves, sources, matrices, table)


# --- The vocabulary -------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # as in SentencePiece
IDS = {"bos": "bos_id", "eos": "eos_id", "unknown": "unk_id", "padding": "pad_id"}


def vocabulary(proto: bytes) -> tuple[dict, list[str]]:
    """The keys of a `tokenizer.model`, and what llama.cpp will do otherwise, in sentences.

    llama.cpp encodes as our `run.py` does: no [BOS] is put before a prompt. A tokenizer of a kind
    that it has no equal for gives no keys.
    """
    spec = _parse_tokenizer(proto)
    trainer, normalizer = spec.trainer_spec, spec.normalizer_spec
    if trainer.model_type != trainer.BPE or not trainer.byte_fallback:
        kind = trainer.ModelType.Name(trainer.model_type)
        return {}, [
            f"no vocabulary: llama.cpp has BPE with bytes for what is no piece, this tokenizer is "
            f"{kind}, with byte_fallback {trainer.byte_fallback}"
        ]
    notes = []
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        notes.append(
            f"llama.cpp does not normalize texts, and this tokenizer does ({normalizer.name!r}, "
            f"remove_extra_whitespaces {normalizer.remove_extra_whitespaces})"
        )
    pieces = [(piece.piece, piece.score, piece.type) for piece in spec.pieces]
    if normalizer.add_dummy_prefix:
        pieces = _without_user_defined(pieces)
        if rest := [text for text, _, kind in pieces if kind == USER_DEFINED]:
            notes.append(
                f"llama.cpp puts a space behind {rest[0]} and {len(rest) - 1} more like it"
            )
    keys = {
        "model": "llama",
        "tokens": [text for text, _, _ in pieces],
        "scores": [score for _, score, _ in pieces],
        "token_type": [kind for _, _, kind in pieces],
        "add_bos_token": False,
        "add_eos_token": False,
        "add_space_prefix": normalizer.add_dummy_prefix,
        "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
    }
    for theirs, ours in IDS.items():
        if getattr(trainer, ours) >= 0:
            keys[f"{theirs}_token_id"] = getattr(trainer, ours)
    found = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    return found | {TOKENIZER: proto}, notes


def _without_user_defined(pieces: list[tuple]) -> list[tuple]:
    """Pieces (text, score, type) in which those of the user are normal ones where that is the same.

    Behind one of the user, llama.cpp puts the space of a text's beginning again: "1 2" of "12".
    Those that grow character by character, as digits and runs of lines do, are found by merging
    just as well, for their score, 0, is above all others. Those with a space are never found by
    SentencePiece, which writes U+2581 for it first; nor are they by llama.cpp, as normal ones.
    """
    normal: set[str] = set()
    for text in sorted((text for text, _, kind in pieces if kind == USER_DEFINED), key=len):
        if len(text) == 1 or text[:-1] in normal or " " in text:
            normal.add(text)
    return [
        (text, score, NORMAL if kind == USER_DEFINED and text in normal else kind)
        for text, score, kind in pieces
    ]


def _parse_tokenizer(proto: bytes):
    from sentencepiece import sentencepiece_model_pb2  # imports protobuf, for nothing else

    return sentencepiece_model_pb2.ModelProto.FromString(proto)


def tokenizer_of(keys: dict) -> bytes | None:
    """The `tokenizer.model` of a file of ours, or that another's vocabulary of the kind "llama"
    makes, which encodes as llama.cpp does; None without one.

    CheckpointError for keys of other types.
    """
    if isinstance(proto := keys.get(TOKENIZER), bytes):
        return proto
    found = {k.removeprefix("tokenizer.ggml."): v for k, v in keys.items()}
    if found.get("model") != "llama":
        return None
    tokens = found.get("tokens")
    lists = [tokens, *(found.get(name) for name in ("scores", "token_type"))]
    kinds = ((str,), (float,), (int,))
    for values, kind in zip(lists, kinds, strict=True):
        fits = isinstance(values, list) and len(values) == len(tokens)
        if not (fits and all(isinstance(value, kind) for value in values)):
            raise CheckpointError(
                "tokenizer.ggml.tokens, scores and token_type are no lists of the same length; "
                "copy or make the file again"
            )
    spec = _parse_tokenizer(b"")
    for text, score, kind in zip(*lists, strict=True):
        spec.pieces.add(piece=text, score=score, type=kind if NORMAL <= kind <= BYTE else NORMAL)
    trainer, normalizer = spec.trainer_spec, spec.normalizer_spec
    trainer.model_type, trainer.byte_fallback = trainer.BPE, True
    trainer.vocab_size, trainer.unk_surface = len(tokens), ""
    for theirs, ours in IDS.items():
        token = found.get(f"{theirs}_token_id", -1)
        if not (type(token) is int and -1 <= token < len(tokens)):
            raise CheckpointError(f"tokenizer.ggml.{theirs}_token_id {files.shown(token)}; {CURE}")
        setattr(trainer, ours, token)
        if token >= 0:
            setattr(trainer, ours.replace("_id", "_piece"), tokens[token])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = bool(found.get("add_space_prefix", True))
    normalizer.remove_extra_whitespaces = False
    return spec.SerializeToString()


# --- Writing --------------------------------------------------------------------------------------


def write_checkpoint(
    path: Path,
    entries: Sequence[checkpoint.Entry],
    config: model.LanguageModelConfig,
    proto: bytes | None,
    matrices: str,
    table: str | None = None,
    room: Callable[[Path, int], None] = lambda path, size: None,
    threads: int | None = None,
    progress: bool = False,
) -> tuple[dict[str, int], float, list[str]]:
    """Writes a checkpoint's parameters as a GGUF file, a piece of a tensor at a time.

    entries: of all parameters, from `checkpoint.check_files`; proto: of its `tokenizer.model`
    matrices: of CHOICES; table: of TABLES (as the model keeps its embeddings, F16 or Q8_0)
    room: is told the size of the file before anything is written, and may raise
    threads, progress: as in `write`

    Gives the number of weights of each type, the error as `write` does, and notes. Raises as
    `write` and `types_of`, and ValueError for a model that is not for llama.cpp.
    """
    table = table or ("Q8_0" if config.embeddings == "int8" else "F16")
    with concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        leaves = {entry.path: entry.restored for entry in entries}
        sources = {entry.path: functools.partial(of_entry, entry, pool) for entry in entries}
        tensors = tensors_of(config, leaves, sources, matrices, table)
        counts: dict[str, int] = {}
        for tensor in tensors.values():
            counts[tensor.kind] = counts.get(tensor.kind, 0) + math.prod(tensor.shape)
        most = max(counts.keys() & gguf_file.FILE_NUMBERS.keys(), key=counts.get)
        keys = grok_keys(config) | {
            "general.file_type": gguf_file.FILE_NUMBERS[most],
            "general.quantization_version": 2,
        }
        added, notes = vocabulary(proto) if proto else ({}, [])
        keys |= added
        room(path, gguf_file.size_of(keys, tensors))
        error = gguf_file.write(path, keys, tensors, threads, progress)
    if error > HALF:
        notes.append("scales below 2^-14 have fewer digits in float16, or become 0")
    return counts, error, notes


# --- Reading --------------------------------------------------------------------------------------


def config_of(file: File) -> model.LanguageModelConfig:
    """The configuration that a file's keys make; what they leave open is as in Grok-1.

    Files of ours say all of it. ValueError where something is missing or cannot be.
    """
    keys = dict(file.keys)
    if "grok.expert_feed_forward_length" in keys:
        keys["grok.feed_forward_length"] = keys["grok.expert_feed_forward_length"]
    with files.naming(file.path):
        values = files.parse_json(str(keys[OURS])) if OURS in keys else _values_of(keys)
        config = model.config_from_dict(values)
        expected = grok_keys(config)
        for name in KEYS:
            found, wanted = keys.get(f"grok.{name}"), expected[f"grok.{name}"]
            if found is not None and np.float32(found) != np.float32(wanted):
                raise CheckpointError(
                    f"grok.{name} is {files.shown(found)}, expected {wanted}, as other keys say; "
                    f"{CURE}"
                )
        if config.num_layers > len(file.tensors):
            raise CheckpointError(f"{config.num_layers} layers in {len(file.tensors)} tensors")
        return config


def _values_of(keys: dict) -> dict:
    """Our configuration, from llama.cpp's keys alone."""
    fields = {field.name: field for field in dataclasses.fields(model.LanguageModelConfig)}
    values = {name: field.default for name, field in fields.items()}
    found = {ours: keys[f"grok.{k}"] for k, ours in KEYS.items() if f"grok.{k}" in keys}
    for name in ("vocab_size", "emb_size", "num_layers", "num_q_heads", "ffn_size"):
        if name == "vocab_size" and isinstance(tokens := keys.get("tokenizer.ggml.tokens"), list):
            found.setdefault(name, len(tokens))
        if type(found.get(name)) is not int or found[name] < 1:
            key = next(k for k, ours in KEYS.items() if ours == name)
            raise CheckpointError(f"grok.{key} is {files.shown(found.get(name))}, expected a size")
    found.setdefault("num_kv_heads", found["num_q_heads"])
    found.setdefault("key_size", found["emb_size"] // found["num_q_heads"])
    values["widening_factor"] = 1.5 * found.pop("ffn_size") / found["emb_size"]
    values["eos_token"] = keys.get("tokenizer.ggml.eos_token_id", values["eos_token"])
    for name, value in found.items():  # the shortest number that rounds to this float32
        is_float = isinstance(value, float)
        values[name] = fields[name].type(float(str(np.float32(value))) if is_float else value)
    return values


class Form(NamedTuple):
    """What a parameter becomes: a name of formats.FORMATS, and the groups of inputs of int8."""

    format: str
    groups: int = 1


class _Look(NamedTuple):
    """What is so in all of some rows.

    trits: no other codes; groups: numbers of groups of inputs in which the scales are the same;
    bfloat16: the scales are such numbers; multiples: within CLOSE, of an integer up to 127
    """

    trits: bool
    groups: frozenset[int]
    lowest: float
    highest: float
    bfloat16: bool
    multiples: bool

    def and_(self, other: "_Look") -> "_Look":
        return _Look(
            self.trits and other.trits,
            self.groups & other.groups,
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
            self.bfloat16 and other.bfloat16,
            self.multiples and other.multiples,
        )


def _look(stored: Stored, rows: slice) -> _Look:
    codes, scales = decode(stored.data[rows], stored.kind, stored.shape[-1])
    blocks = scales.shape[-1]
    groups = {
        count
        for count in range(1, blocks + 1)
        if blocks % count == 0 and not np.ptp(scales.reshape(len(scales), count, -1), -1).any()
    }
    multiples = True
    if blocks > 1:
        with np.errstate(invalid="ignore"):  # of scales that are no numbers
            unit, multipliers = formats.as_multiples(scales.T[None])
        multiples = (np.abs(multipliers[0] * unit - scales.T) <= CLOSE * scales.T).all()
    return _Look(
        not (np.abs(codes) > 1).any(),
        frozenset(groups),
        scales.min(),
        scales.max(),
        (scales.astype(ml_dtypes.bfloat16).astype(np.float32) == scales).all(),
        multiples,
    )


class Parameters:
    """The parameters of a file, as `shards.write` takes them.

    Trits whose scales one of our ternary formats has are of that format, other integers are int8 if
    their scales are bfloat16, as our files have them, and all else is float32. It takes a pass over
    the file to tell.
    """

    def __init__(self, file: File, config: model.LanguageModelConfig, threads=None, progress=False):
        """Raises CheckpointError unless the file has all tensors of the model and no others."""
        self.file, self.threads = file, threads or os.cpu_count()
        self.template = model.abstract_params(config)
        self.stored = self._match(config)
        self.forms: dict[str, Form] = {}
        total = sum(stored.data.nbytes for stored in self.stored.values())
        with (
            concurrent.futures.ThreadPoolExecutor(self.threads) as self.pool,
            tqdm.tqdm(
                total=total, desc="look", unit="B", unit_scale=True, disable=not progress
            ) as bar,
        ):
            for path, stored in self.stored.items():
                self.forms[path] = self._form(path, stored)
                release(stored.data)
                bar.update(stored.data.nbytes)

    @property
    def formats(self) -> dict[str, str]:
        """{path: name of formats.FORMATS}."""
        return {path: form.format for path, form in self.forms.items()}

    def leaves(self, packing: str) -> dict[str, Any]:
        """{path: abstract leaf as it is stored}, with trits in this packing."""
        return {path: self._leaf(path, form, packing) for path, form in self.forms.items()}

    def fill(self, path: str, leaf: Any, progress=lambda count: None) -> None:
        """Sets the arrays of a leaf, mapped, to a parameter."""
        stored = self.stored[path]
        stack = conversion.stacked(as_matrix(leaf)) if path != TABLE else leaf[None]
        axes = conversion.output_axes(stack) if path != TABLE else -2
        count = self._rows(stored)

        def one(rows):
            here = slice(rows.start % count, (rows.stop - 1) % count + 1)
            w = self._read(path, rows)
            arrays = zip(*map(checkpoint.arrays_of, (w, stack)), jax.tree.leaves(axes), strict=True)
            for array, out, axis in arrays:
                index = [slice(None)] * (out.ndim - 1)
                index[axis] = here if out.shape[axis] > 1 else slice(None)
                out[(rows.start // count, *index)] = array

        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            for expert in range(0, len(stored.data), count):
                for rows, _ in self._over(pool, stored, expert, one):
                    progress(stored.data[rows].nbytes)
                release(stored.data)

    def _match(self, config) -> dict[str, Stored]:
        tensors = dict(self.file.tensors)
        for name in self.file.tensors:
            for old, new in ALIASES.items():
                if name.endswith(f".{old}.weight"):
                    tensors[name.replace(old, new)] = tensors.pop(name)
        named = names(config.num_layers)
        missing, extra = named.values() - tensors.keys(), tensors.keys() - named.values()
        if missing or extra:
            wrong = f"lacks {min(missing)}" if missing else f"has {files.shown(min(extra))} besides"
            raise CheckpointError(
                f"{self.file.path}: {len(tensors)} tensors, this model has {len(named)}: it {wrong}"
            )
        found = {}
        for module, name in checkpoint.sorted_keys(self.template):
            path = f"{module}/{name}"
            stored, shape = tensors[named[path]], self.template[module][name].shape
            expected = shape if path == TABLE else (*shape[:-2], *shape[-2:][::-1])
            if stored.shape != expected:
                raise CheckpointError(
                    f"{self.file.path}: {named[path]} is {list(stored.shape)}, expected "
                    f"{list(expected)}; {CURE}"
                )
            found[path] = stored
        return found

    def _form(self, path: str, stored: Stored) -> Form:
        if stored.kind in FLOATS or not path.endswith(LINEAR):
            return Form("float32")
        count, looks = self._rows(stored), []
        for expert in range(0, len(stored.data), count):
            found = self._over(self.pool, stored, expert, functools.partial(_look, stored))
            looks.append(functools.reduce(_Look.and_, (look for _, look in found)))
        all_ = functools.reduce(_Look.and_, looks)
        if not 0 <= all_.lowest <= all_.highest < math.inf:
            return Form("float32")
        if all_.trits:
            if all(look.lowest == look.highest for look in looks):
                return Form("ternary")
            if 1 in all_.groups:
                return Form("ternary-fit")
            for size in sorted(formats.GROUPS, reverse=True):
                groups = formats.number_of_groups(stored.shape[-1], size)
                if all_.multiples and groups in all_.groups:
                    return Form(f"ternary-fit-{size}")
        return Form("int8", min(all_.groups)) if all_.bfloat16 else Form("float32")

    def _leaf(self, path: str, form: Form, packing: str):
        module, name = path.rsplit("/", 1)
        shape = self.template[module][name].shape
        if form.format == "int8":
            scales = (*shape[:-2], form.groups, shape[-1])
            return QuantizedWeight(
                jax.ShapeDtypeStruct(shape, np.int8),
                jax.ShapeDtypeStruct(scales, ml_dtypes.bfloat16),
            )
        if formats.FORMATS[form.format].packed:
            return shards.stored_form(form.format, shape, packing)
        return jax.ShapeDtypeStruct(shape, np.float32)

    def _rows(self, stored: Stored) -> int:
        """Of each matrix."""
        return stored.shape[-2] if len(stored.shape) > 1 else 1

    def _over(self, pool, stored: Stored, start: int, do: Callable) -> Iterator[tuple[slice, Any]]:
        """(rows, what `do` gives of them) of the matrix that begins at a row."""
        size = max(1, gguf_file.TILE // stored.shape[-1])
        pieces = [*conversion.slices(start, start + self._rows(stored), size)]
        return zip(pieces, pool.map(do, pieces), strict=True)

    def _read(self, path: str, rows: slice) -> quantize.Weight:
        """Some outputs of a matrix as a weight [I, o], or rows of the table as they are."""
        stored, form = self.stored[path], self.forms[path]
        data = stored.data[rows]
        if stored.kind in FLOATS:
            w = np.ascontiguousarray(data).view(FLOATS[stored.kind]).astype(np.float32)
            conversion.check_finite(w, f"{self.file.path}: {path}")
            return w if path == TABLE else w.T
        codes, scales = decode(data, stored.kind, stored.shape[-1])
        if form.format == "float32":
            w = codes * scales.repeat(codes.shape[-1] // scales.shape[-1], axis=-1)
            conversion.check_finite(w, f"{self.file.path}: {path}")
            return w if path == TABLE else w.T
        if form.format == "int8":
            scales = scales.reshape(len(scales), form.groups, -1)[..., 0]
            return QuantizedWeight(codes.T, scales.T.astype(ml_dtypes.bfloat16))
        if form.format == "ternary":
            return quantize.pack(codes.T, scales[:1, :1])
        if form.format == "ternary-fit":
            return quantize.pack(codes.T, scales[:, :1].T)
        groups = formats.number_of_groups(codes.shape[-1], int(form.format.rsplit("-")[-1]))
        scales = scales.reshape(len(scales), groups, -1)[..., 0]
        unit, multipliers = formats.as_multiples(scales.T[None])  # [1, O], [1, G, O]
        return quantize.pack(codes.T[None], unit, multipliers.T)
