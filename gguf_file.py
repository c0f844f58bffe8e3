"""GGUF: Grok's parameters and vocabulary in one file, for llama.cpp, and such a file read.

A file is, little-endian: "GGUF", its version, the numbers of tensors and of keys; each key, its
type and its value; each tensor's name, sizes (inputs first), type and place; then the data of the
tensors, each at a multiple of 32 bytes. Matrices are [outputs, inputs], transposes of Grok-1's.

    F32, F16, BF16   numbers
    Q8_0     for each 32 inputs: a scale in float16 and 32 int8
    TQ2_0    for each 256 inputs: 64 bytes of four trits each, then a scale in float16. Byte j of
             each 32 has the weights j, j + 32, j + 64 and j + 96 of its 128, the first lowest
    TQ1_0    for each 256 inputs: 52 bytes of five trits each, the last four of four, and a scale.
             A byte is the fraction 0.abcde in base 3, times 256 and rounded up. Of the first 32
             the weights lie 32 apart, of the next 16 by 16, of the last four by four
    Q2_0     for each 64 inputs: a scale in float16, then 16 bytes of four trits that are neighbours
    Q4_0     for each 32 inputs: a scale in float16, then 16 bytes of two trits each: j and j + 16
    IQ2_BN   for each output: a scale in float32, then all its inputs, four trits to a byte: of each
             64 the weights j, j + 16, j + 32 and j + 48. ik_llama.cpp's, which alone reads it

Integers and trits carry over as they are, and a scale of more inputs than a block is repeated; it
is rounded to the type's float, and nothing else is.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import mmap
import os
import struct
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
import model
import quantize
import shards
from files import CheckpointError
from quantize import PackedWeight, QuantizedWeight
from tensor_file import release

ALIGNMENT = 32
CURE = "copy or download the file again"
TILE = 1 << 22  # weights that a thread encodes at a time
FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
TABLE = "language_model/in_out_embed/embeddings"


class Blocks(NamedTuple):
    """How a type holds integers and their scales.

    block: inputs that share a scale, or None for all of an output; bits: of a code, which is stored
    with `zero` added; apart: how many inputs lie between those of one byte; scale: its type;
    before: whether it comes before the codes. TQ1_0 has its own way with codes
    """

    block: int | None
    bits: int
    zero: int
    apart: int
    scale: np.dtype = FLOATS["F16"]
    before: bool = True

    @property
    def inputs(self) -> int:
        """What the number of inputs must be a multiple of."""
        return self.block or self.apart * 8 // self.bits

    def bytes(self, inputs: int) -> int:
        """Of the codes of so many inputs."""
        return inputs * self.bits // 8 if self.bits else inputs // 256 * 52


TERNARY = {
    "TQ2_0": Blocks(256, 2, 1, 32, before=False),
    "TQ1_0": Blocks(256, 0, 1, 0, before=False),
    "Q2_0": Blocks(64, 2, 1, 1),
    "Q4_0": Blocks(32, 4, 8, 16),
    "IQ2_BN": Blocks(None, 2, 1, 16, FLOATS["F32"]),
}
BLOCKS = TERNARY | {"Q8_0": Blocks(32, 8, 0, 1)}
BASE_3 = ((0, 5, 32), (160, 5, 16), (240, 4, 4))  # of TQ1_0: first input, digits, inputs between

# The numbers of types, of tensors and of whole files.
NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "BF16": 30, "TQ1_0": 34, "TQ2_0": 35}
NUMBERS |= {"Q2_0": 42, "IQ2_BN": 135}
FILE_NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "TQ1_0": 36, "TQ2_0": 37, "Q2_0": 41}

AUTO = ("TQ2_0", "Q2_0", "Q8_0")  # the first that holds a matrix
CHOICES = ("auto", *TERNARY, "Q8_0", "F16", "F32")  # for the matrices
TABLES = ("F16", "F32", "BF16", "Q8_0")  # for the embeddings


def row_bytes(kind: str, inputs: int) -> int:
    """Bytes of so many inputs of one output."""
    if kind in FLOATS:
        return FLOATS[kind].itemsize * inputs
    form = BLOCKS[kind]
    return form.bytes(inputs) + inputs // (form.block or inputs) * form.scale.itemsize


# --- Weights to bytes -----------------------------------------------------------------------------


def encode(w: quantize.Weight, kind: str) -> tuple[np.ndarray, float]:
    """The bytes of a matrix [I, O] in NumPy, uint8 [O, bytes], and the largest relative error that
    rounding made in a scale.

    Floats as Q8_0 are rounded to it. Raises ValueError for numbers that the type cannot hold.
    """
    if kind in FLOATS:
        with np.errstate(over="ignore"):
            floats = quantize.dequantize(w).T.astype(FLOATS[kind], order="C")
        if not np.isfinite(floats).all():
            raise ValueError(f"it has numbers that are too large for {kind}; take F32")
        return floats.view(np.uint8), 0.0
    form = BLOCKS[kind]
    codes, scales = integers(w, kind)
    blocks = codes.shape[-1] // (form.block or codes.shape[-1])
    scales = scales.repeat(blocks // scales.shape[-1], axis=-1)
    rounded, error = _round_scales(scales, form.scale)
    data = _to_bytes(codes.reshape(-1, codes.shape[-1] // blocks), form)
    data = data.reshape(len(codes), blocks, -1)
    rounded = rounded[..., None].view(np.uint8)
    parts = (rounded, data) if form.before else (data, rounded)
    return np.concatenate(parts, axis=-1).reshape(len(codes), -1), error


def integers(w: quantize.Weight, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A matrix [I, O] as codes, int8 [O, I], and the scales of groups of inputs, float32 [O, G]."""
    if not isinstance(w, PackedWeight | QuantizedWeight):
        blocks = np.ascontiguousarray(w.T, np.float32).reshape(w.shape[1], -1, BLOCKS[kind].block)
        scales = np.abs(blocks).max(axis=-1) / np.float32(127)
        codes = np.round(blocks / np.maximum(scales, 1e-30)[..., None]).astype(np.int8)
        return codes.reshape(w.shape[::-1]), scales
    scales = w.scales.T.astype(np.float32)  # [1 or O, G]
    if kind == "Q8_0" or w.multipliers is None:
        codes = quantize.codes_of(w)
    else:
        codes, scales = quantize.trits_of(w)[0], scales * w.multipliers[..., 0]
    return np.ascontiguousarray(codes.T), np.broadcast_to(scales, (w.shape[1], scales.shape[1]))


def _round_scales(scales: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, float]:
    with np.errstate(over="ignore"):
        rounded = scales.astype(dtype)
    wrong = ~np.isfinite(rounded) | ((rounded == 0) & (scales != 0))
    if wrong.any():
        raise ValueError(f"it has the scale {scales[wrong][0]:.3g}, no float16; write it as F32")
    error = np.abs(rounded.astype(np.float32) - scales) / np.maximum(scales, 1e-30)
    return rounded, float(error.max(initial=0))


def _to_bytes(codes: np.ndarray, form: Blocks) -> np.ndarray:  # int8 [blocks, n] -> uint8 [bytes]
    codes = (codes + np.int8(form.zero)).view(np.uint8)
    if form.bits:
        each = 8 // form.bits  # codes in a byte
        codes = codes.reshape(-1, each, form.apart)
        found = codes[:, 0].copy()
        for i in range(1, each):
            found |= codes[:, i] << np.uint8(i * form.bits)
        return found
    parts = []
    for start, count, apart in BASE_3:
        digits = codes[:, start : start + count * apart].reshape(len(codes), count, apart)
        number = np.zeros((len(codes), apart), np.uint16)
        for i in range(5):
            number *= np.uint16(3)
            number += digits[:, i] if i < count else 0
        parts.append((number * np.uint16(256) + np.uint16(242)) // np.uint16(243))
    return np.concatenate(parts, axis=-1).astype(np.uint8)


def decode(data: np.ndarray, kind: str, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """What `encode` made of codes: uint8 [O, bytes] as int8 [O, I], and scales float32 [O, G]."""
    form = BLOCKS[kind]
    blocks = inputs // (form.block or inputs)
    data = data.reshape(len(data), blocks, -1)
    at = [form.scale.itemsize] if form.before else [data.shape[-1] - form.scale.itemsize]
    parts = np.split(data, at, axis=-1)
    scales, stored = parts if form.before else parts[::-1]
    scales = np.ascontiguousarray(scales).view(form.scale)[..., 0].astype(np.float32)
    codes = _from_bytes(stored.reshape(len(data) * blocks, -1), form)
    return codes.reshape(len(data), inputs), scales


def _from_bytes(data: np.ndarray, form: Blocks) -> np.ndarray:  # uint8 [blocks, bytes] -> int8
    if form.bits:
        shift = np.arange(0, 8, form.bits, dtype=np.uint8)[:, None]
        codes = data.reshape(-1, 1, form.apart) >> shift
        codes &= np.uint8((1 << form.bits) - 1)
    else:
        parts, at = [], 0
        for _, count, apart in BASE_3:
            byte = data[:, None, at : at + apart]
            rest = byte * np.uint8(3) ** np.arange(count, dtype=np.uint8)[:, None]  # fractions
            parts.append((rest.astype(np.uint16) * 3 >> 8).reshape(len(data), -1))
            at += apart
        codes = np.concatenate(parts, axis=-1).astype(np.uint8)
    return codes.view(np.int8) - np.int8(form.zero)


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
OURS = "ternary_grok.config"  # the configuration as in config.json; llama.cpp passes over it


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


class Tensor(NamedTuple):
    """A tensor to write: its type, its shape as in the file, rows first, and where it comes from.

    experts: gives, for each matrix of the tensor, a function of a slice of outputs, whose result is
    that part of the matrix in memory, [I, o]; threads call it
    """

    kind: str
    shape: tuple[int, ...]
    experts: Callable[[], Iterator[Callable[[slice], quantize.Weight]]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape[:-1]) * row_bytes(self.kind, self.shape[-1])


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
SPACE = "\u2581"  # which SentencePiece writes for a space
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
        notes.append("llama.cpp encodes a text that begins with two or more spaces otherwise")
        pieces = _without_user_defined(pieces)
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
    return {f"tokenizer.ggml.{name}": value for name, value in keys.items()}, notes


def _without_user_defined(pieces: list[tuple]) -> list[tuple]:
    """Pieces (text, score, type) in which those of the user that merging finds are normal ones.

    After one of the user, llama.cpp puts the space of a text's beginning again: " 1 2" of "12".
    Those that grow character by character, as digits and runs of spaces and lines do, are found by
    merging just as well, for their score is 0, above all others.
    """
    grown = {SPACE}
    for text in sorted((text for text, _, kind in pieces if kind == USER_DEFINED), key=len):
        text = text.replace(" ", SPACE)
        if len(text) == 1 or text[:-1] in grown:
            grown.add(text)
    return [
        (text.replace(" ", SPACE), score, NORMAL)
        if kind == USER_DEFINED and text.replace(" ", SPACE) in grown
        else (text, score, kind)
        for text, score, kind in pieces
    ]


def _parse_tokenizer(proto: bytes):
    from sentencepiece import sentencepiece_model_pb2  # with protobuf, which nothing else needs

    return sentencepiece_model_pb2.ModelProto.FromString(proto)


def tokenizer_of(keys: dict) -> bytes | None:
    """The `tokenizer.model` that a file's vocabulary makes, None without one of the kind "llama".

    It encodes as llama.cpp does, without normalizing. CheckpointError for keys of other types.
    """
    from sentencepiece import sentencepiece_model_pb2

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
    spec = sentencepiece_model_pb2.ModelProto()
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

TEXT, BOOL, LIST, INTEGER, FLOAT, SIGNED = 8, 7, 9, 4, 6, 5  # numbers of the types of values


def header_of(keys: dict, tensors: dict[str, Tensor]) -> bytes:
    """All that comes before the data."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    header += b"".join(_string(key) + _value(value) for key, value in keys.items())
    place = 0
    for name, tensor in tensors.items():
        sizes = tensor.shape[::-1]
        header += _string(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        header += struct.pack("<IQ", NUMBERS[tensor.kind], place)
        place += _aligned(tensor.bytes)
    return header.ljust(_aligned(len(header)), b"\0")


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: str | bool | int | float | list) -> bytes:
    """The number of the type, string, bool, uint32, float32 or an array, and the value."""
    if isinstance(value, list):
        if isinstance(value[0], str):
            content = struct.pack("<IQ", TEXT, len(value)) + b"".join(map(_string, value))
        else:
            kind, dtype = (FLOAT, "<f4") if isinstance(value[0], float) else (SIGNED, "<i4")
            content = struct.pack("<IQ", kind, len(value)) + np.array(value, dtype).tobytes()
        return struct.pack("<I", LIST) + content
    if isinstance(value, str):
        return struct.pack("<I", TEXT) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", INTEGER, value)
    return struct.pack("<If", FLOAT, value)


def size_of(keys: dict, tensors: dict[str, Tensor]) -> int:
    """Bytes of the file."""
    return len(header_of(keys, tensors)) + sum(_aligned(t.bytes) for t in tensors.values())


def write(
    path: Path,
    keys: dict,
    tensors: dict[str, Tensor],
    threads: int | None = None,
    progress: bool = False,
) -> float:
    """A new GGUF file of keys, each a str, bool, int, float or a list of one of these, and tensors.

    It is written under another name, each tensor in pieces, and gets its own at the end; after an
    error there is none. Gives the largest relative error that rounding made in a scale. Raises
    FileExistsError where there is one, OSError without room, CheckpointError for a tensor whose
    numbers its type cannot hold.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; remove it, or choose another name")
    header, errors = header_of(keys, tensors), [0.0]
    total = sum(tensor.bytes for tensor in tensors.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        files.replacing(path) as part,
        open(part, "wb") as file,
        concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count()) as pool,
        tqdm.tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        with files.filling(path):
            os.posix_fallocate(file.fileno(), 0, size_of(keys, tensors))
            os.pwrite(file.fileno(), header, 0)
        place = len(header)
        for i, (name, tensor) in enumerate(tensors.items()):
            bar.set_description(f"tensor {i + 1}/{len(tensors)}", refresh=False)
            for piece, error in _fill(file.fileno(), place, path, name, tensor, pool):
                errors.append(error)
                bar.update(piece)
            place += _aligned(tensor.bytes)
    return max(errors)


def _fill(descriptor, place, path, name, tensor, pool) -> Iterator[tuple[int, float]]:
    """Writes a tensor; gives the bytes of each piece, and the error of its scales."""
    inputs = tensor.shape[-1]
    outputs = tensor.shape[-2] if len(tensor.shape) > 1 else 1
    row = row_bytes(tensor.kind, inputs)

    def one(piece, read, place):
        w = read(piece)
        with files.naming(name):
            data, error = encode(w, tensor.kind)
        with files.filling(path):
            _write_all(descriptor, data, place + piece.start * row)
        return data.nbytes, error

    for read in tensor.experts():
        pieces = conversion.slices(0, outputs, max(1, TILE // inputs))
        yield from pool.map(functools.partial(one, read=read, place=place), pieces)
        place += outputs * row


def _write_all(descriptor: int, data: np.ndarray, place: int) -> None:
    view = memoryview(data).cast("B")
    while len(view):  # a call writes 2 GB at most
        count = os.pwrite(descriptor, view, place)
        view, place = view[count:], place + count


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
        most = max(counts.keys() & FILE_NUMBERS.keys(), key=counts.get)
        keys = grok_keys(config) | {
            "general.file_type": FILE_NUMBERS[most],
            "general.quantization_version": 2,
        }
        added, notes = vocabulary(proto) if proto else ({}, [])
        keys |= added
        room(path, size_of(keys, tensors))
        error = write(path, keys, tensors, threads, progress)
    return counts, error, notes


# --- Reading --------------------------------------------------------------------------------------

ARCHITECTURE = "general.architecture"
NUMBERED = {number: kind for kind, number in NUMBERS.items()}
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"}
SCALARS |= {10: "<Q", 11: "<q", 12: "<d"}
MAX_AXES = 4
CLOSE = 2**-10  # relative: two roundings to float16


class Stored(NamedTuple):
    """A tensor of a file: its type, its shape, rows first, and its bytes, mapped: [rows, bytes]."""

    kind: str
    shape: tuple[int, ...]
    data: np.ndarray


class File(NamedTuple):
    """A GGUF file: its keys, and its tensors by name."""

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, Stored]


class _Reader:
    """Values of the header, one after another; CheckpointError beyond the end of the file."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise CheckpointError(
                f"truncated: {size} bytes should follow byte {self.at} of {len(self.data)}; {CURE}"
            )
        self.at += size
        return memoryview(self.data)[self.at - size : self.at]

    def number(self, form: str):
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return str(self.take(self.number("<Q")), "utf-8", "replace")

    def value(self):
        kind = self.number("<I")
        if kind != LIST:
            return self.scalar(kind)
        kind, count = self.number("<I"), self.number("<Q")
        if kind in SCALARS:
            size = struct.calcsize(SCALARS[kind])
            return np.frombuffer(self.take(count * size), SCALARS[kind]).tolist()
        return [self.scalar(kind) for _ in range(count)]

    def scalar(self, kind: int):
        if kind == TEXT:
            return self.text()
        if kind not in SCALARS:
            raise CheckpointError(f"a value of the unknown type {kind}; {CURE}")
        return self.number(SCALARS[kind])

    def entry(self) -> tuple[str, list[int], int, int]:
        """Name, sizes with rows first, type and place of a tensor."""
        name, axes = self.text(), self.number("<I")
        if axes > MAX_AXES:
            raise CheckpointError(
                f"{files.shown(name)} has {axes} axes, {MAX_AXES} at most; {CURE}"
            )
        sizes = [self.number("<Q") for _ in range(axes)][::-1]
        return name, sizes, self.number("<I"), self.number("<Q")


def open_file(path: Path) -> File:
    """A GGUF file of Grok, mapped; CheckpointError if it is none, cut short, or one of several.

    As of any mapped file, cutting it short meanwhile ends the process.
    """
    with files.open_file(path) as file, files.naming(path):
        if file.read(4) != b"GGUF":
            raise CheckpointError("no GGUF file; give one, or the folder of a checkpoint")
        reader = _Reader(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        reader.take(4)
        version, tensors, count = (reader.number(form) for form in ("<I", "<Q", "<Q"))
        if version not in (2, 3):
            raise CheckpointError(f"GGUF version {version}, read are 2 and 3, little-endian")
        keys = dict((reader.text(), reader.value()) for _ in range(count))
        _check_keys(keys)
        entries = [reader.entry() for _ in range(tensors)]
        step = keys.get("general.alignment", ALIGNMENT)
        if type(step) is not int or step < 1:
            raise CheckpointError(f"general.alignment {files.shown(step)}; {CURE}")
        begin = -(-reader.at // step) * step
        return File(path, keys, dict(_stored(reader.data, begin, *entry) for entry in entries))


def _check_keys(keys: dict) -> None:
    if keys.get(ARCHITECTURE) != "grok":
        raise CheckpointError(
            f"a model of the architecture {files.shown(keys.get(ARCHITECTURE))}, only grok is read"
        )
    if keys.get("split.count", 0) not in (0, 1):
        raise CheckpointError(
            f"one of {keys['split.count']} files; make them one with llama-gguf-split --merge"
        )


def _stored(data, begin: int, name: str, sizes: list[int], number: int, place: int):
    with files.naming(files.shown(name)):
        if number not in NUMBERED:
            raise CheckpointError(
                f"its type has the number {number} in llama.cpp, read are {[*NUMBERS]}; take a "
                "file of one of these"
            )
        kind, inputs = NUMBERED[number], sizes[-1] if sizes else 0
        if not inputs or (kind in BLOCKS and inputs % BLOCKS[kind].inputs):
            raise CheckpointError(f"{kind} {sizes}, which cannot be; {CURE}")
        rows, row = math.prod(sizes[:-1]), row_bytes(kind, inputs)
        start = begin + place
        if start + rows * row > len(data):
            raise CheckpointError(
                f"truncated: it ends at byte {start + rows * row}, the file at {len(data)}; {CURE}"
            )
        array = np.frombuffer(data, np.uint8, rows * row, start).reshape(rows, row)
        return name, Stored(kind, tuple(sizes), array)


def config_of(file: File) -> model.LanguageModelConfig:
    """The configuration that a file's keys make; what they leave open is as in Grok-1.

    Files of ours say all of it. ValueError where something is missing or cannot be.
    """
    keys = file.keys | {
        f"grok.{name}": file.keys[f"grok.{old}"]
        for name, old in (("feed_forward_length", "expert_feed_forward_length"),)
        if f"grok.{old}" in file.keys
    }
    with files.naming(file.path):
        values = files.parse_json(str(keys[OURS])) if OURS in keys else _values_of(keys)
        config = model.config_from_dict(values)
        expected = grok_keys(config)
        for name in KEYS:
            found, wanted = keys.get(f"grok.{name}"), expected[f"grok.{name}"]
            if found is not None and np.float32(found) != np.float32(wanted):
                raise CheckpointError(f"grok.{name} is {files.shown(found)}, expected {wanted}")
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


# --- A file as a checkpoint -----------------------------------------------------------------------


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
    unit, multipliers = _as_multiples(scales)
    return _Look(
        not (np.abs(codes) > 1).any(),
        frozenset(groups),
        scales.min(),
        scales.max(),
        (scales.astype(ml_dtypes.bfloat16).astype(np.float32) == scales).all(),
        (np.abs(multipliers * unit - scales) <= CLOSE * scales).all(),
    )


def _as_multiples(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales [O, G] as multiples, int8 [O, G], of [O, 1], as `formats.as_multiples` makes them."""
    unit = scales.max(axis=-1, keepdims=True) / np.float32(quantize.LEVELS)
    return unit, np.rint(scales / np.maximum(unit, 1e-37)).astype(np.int8)


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
        size = max(1, TILE // stored.shape[-1])
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
        unit, multipliers = _as_multiples(scales.reshape(len(scales), groups, -1)[..., 0])
        return quantize.pack(codes.T[None], unit.T, multipliers[..., None])
