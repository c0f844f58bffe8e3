"""Grok's parameters as a GGUF file: the same model, trit for trit, for llama.cpp and ik_llama.cpp.

A file is, little-endian: "GGUF", its version, the numbers of tensors and of keys; each key, its
type and its value; each tensor's name, sizes (inputs first), type and place; then the data of the
tensors, each at a multiple of 32 bytes. Matrices are [outputs, inputs], transposes of Grok-1's.

    F32, F16   numbers
    Q8_0       for each 32 inputs: a float16 scale and 32 int8
    TQ2_0      for each 256 inputs: 64 bytes of four trits each, then gamma in float16. Byte j of
               each 32 has the weights j, j + 32, j + 64 and j + 96 of its 128, the first lowest
    Q4_0       for each 32 inputs: gamma in float16, then 16 bytes of two trits each: j and j + 16
    IQ2_BN     for each output: gamma in float32, then all its inputs, four trits to a byte: of each
               64 the weights j, j + 16, j + 32 and j + 48. ik_llama.cpp's
"""

import struct
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import quantize
from benchmarks import models
from model import LanguageModelConfig
from quantize import PackedWeight

ALIGNMENT = 32
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "TQ2_0": 35, "IQ2_BN": 135}
FLOATS = {"F32": "<f4", "F16": "<f2"}


class Ternary(NamedTuple):
    """How a type holds trits.

    block: inputs that share a gamma, or None for a whole row; bits: of a trit, which is stored with
    `zero` added; apart: how many inputs lie between those of one byte; gamma: type of the scale;
    before: whether it comes before its trits
    """

    block: int | None
    bits: int
    zero: int
    apart: int
    gamma: str
    before: bool

    @property
    def inputs(self) -> int:
        """What the number of inputs must be a multiple of."""
        return self.block or self.apart * 8 // self.bits


TERNARY = {
    "TQ2_0": Ternary(256, 2, 1, 32, "<f2", before=False),
    "Q4_0": Ternary(32, 4, 8, 16, "<f2", before=True),
    "IQ2_BN": Ternary(None, 2, 1, 16, "<f4", before=True),
}


class Tensor(NamedTuple):
    """An encoded tensor of logical shape [..., O, I]; type is one of TYPES."""

    shape: tuple[int, ...]
    type: str
    data: np.ndarray


# --- Encodings ------------------------------------------------------------------------------------


def encode(w: np.ndarray, kind: str) -> Tensor:
    """Floats [..., I] as "F32", "F16" or "Q8_0"."""
    if kind not in (*FLOATS, "Q8_0"):
        raise ValueError(f"floats are written as F32, F16 or Q8_0, got {kind!r}")
    data = w.astype(FLOATS[kind]) if kind in FLOATS else encode_q8_0(w.astype(np.float32))
    return Tensor(w.shape, kind, data)


def encode_q8_0(w: np.ndarray) -> np.ndarray:  # float32 [..., I] -> uint8 [..., I / 32, 34]
    blocks = w.reshape(*w.shape[:-1], -1, 32)
    step = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    integers = np.round(blocks / np.maximum(step, 1e-30)).astype(np.int8)
    return np.concatenate([step.astype("<f2").view(np.uint8), integers.view(np.uint8)], axis=-1)


def encode_ternary(w: PackedWeight, kind: str = "TQ2_0") -> Tensor:
    """Packed [..., I, O], of one gamma for each matrix, as a type of TERNARY, [..., O, I].

    The trits are exact; gamma is rounded to the type's float.
    """
    *lead, inputs, outputs = w.shape
    form = TERNARY[kind]
    if inputs % form.inputs:
        raise ValueError(
            f"{kind} takes inputs in blocks of {form.inputs}, got a matrix of {inputs} inputs; "
            "write it as F32"
        )
    codes = (quantize.unpack(w).swapaxes(-1, -2) + np.int8(form.zero)).view(np.uint8)
    block = form.block or inputs
    data = _bytes_of(codes, form).reshape(*lead, outputs, inputs // block, -1)
    gamma = w.scales[..., None].astype(form.gamma).view(np.uint8)  # [..., 1, 1, 2 or 4]
    gamma = np.broadcast_to(gamma, (*data.shape[:-1], gamma.shape[-1]))
    parts = (gamma, data) if form.before else (data, gamma)
    return Tensor((*lead, outputs, inputs), kind, np.concatenate(parts, axis=-1))


def _bytes_of(codes: np.ndarray, form: Ternary) -> np.ndarray:  # uint8 [..., I] -> [bytes]
    each = 8 // form.bits  # codes in a byte
    codes = codes.reshape(-1, each, form.apart)
    found = codes[:, 0].copy()
    for i in range(1, each):
        found |= codes[:, i] << np.uint8(i * form.bits)
    return found


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
    "ffn_gate_inp": "router",
    "ffn_gate_exps": "moe/linear",
    "ffn_up_exps": "moe/linear_v",
    "ffn_down_exps": "moe/linear_1",
}


def grok_keys(config: LanguageModelConfig) -> dict:
    """What llama.cpp must know of a model; token ids stand for themselves, without a vocabulary."""
    c = config
    if c.num_experts == 1 or c.num_q_heads * c.key_size != c.emb_size:
        raise ValueError(
            "llama.cpp's grok has experts, and as many query heads as fill emb_size; got "
            f"{c.num_experts} experts and {c.num_q_heads} x {c.key_size} for {c.emb_size}"
        )
    grok = {
        "vocab_size": c.vocab_size,
        "context_length": c.sequence_len,
        "embedding_length": c.emb_size,
        "block_count": c.num_layers,
        "feed_forward_length": c.ffn_size,
        "expert_count": c.num_experts,
        "expert_used_count": c.num_selected_experts,
        "embedding_scale": float(c.embedding_multiplier_scale),
        "logit_scale": float(c.output_multiplier_scale),
        "attention.head_count": c.num_q_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.key_size,
        "attention.value_length": c.key_size,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "attention.output_scale": float(c.attn_output_multiplier),
        "attn_logit_softcapping": float(c.attn_logit_cap),
        "rope.dimension_count": c.key_size,
        "rope.freq_base": float(c.rope_base),
    }
    return {"general.architecture": "grok", "tokenizer.ggml.model": "no_vocab"} | {
        f"grok.{name}": value for name, value in grok.items()
    }


def grok_tensors(
    config: LanguageModelConfig, params: dict, matrices: str = "TQ2_0", table: str = "F16"
) -> dict[str, Tensor]:
    """The tensors of ternary parameters, under llama.cpp's names.

    matrices: type of the ternary ones, of TERNARY or a float one; table: type of the embeddings
    """
    params = jax.tree.map(np.asarray, params)

    def matrix(w):
        if not isinstance(w, PackedWeight):  # the router
            return encode(w.swapaxes(-1, -2), "F32")
        if matrices in TERNARY:
            return encode_ternary(w, matrices)
        return encode(quantize.dequantize(w).swapaxes(-1, -2), matrices)

    def scale(module):
        return encode(params[module]["scale"], "F32")

    embeddings = params["language_model/in_out_embed"]["embeddings"]
    tensors = {
        "token_embd.weight": encode(quantize.dequantize(embeddings), table),
        "output_norm.weight": scale("language_model/rms_norm"),
    }
    for i in range(config.num_layers):
        ours, theirs = f"transformer/decoder_layer_{i}", f"blk.{i}"
        for name, module in NORMS.items():
            tensors[f"{theirs}.{name}.weight"] = scale(f"{ours}/{module}")
        for name, module in MATRICES.items():
            tensors[f"{theirs}.{name}.weight"] = matrix(params[f"{ours}/{module}"]["w"])
    return tensors


def step_bytes(config: LanguageModelConfig, tensors: dict[str, Tensor], tokens: int = 1) -> float:
    """Bytes of weights that a step of so many tokens reads; see `models.expert_share`."""
    share = models.expert_share(config, tokens)
    return sum(
        tensor.data.nbytes * (share if "_exps." in name else 1) for name, tensor in tensors.items()
    )


# --- The file -------------------------------------------------------------------------------------


def write(path: Path, keys: dict, tensors: dict[str, Tensor]) -> None:
    """A GGUF file of keys, each a str, an int or a float, and tensors."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    header += b"".join(_string(key) + _value(value) for key, value in keys.items())
    place = 0
    for name, tensor in tensors.items():
        sizes = tensor.shape[::-1]
        header += _string(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        header += struct.pack("<IQ", TYPES[tensor.type], place)
        place += _aligned(tensor.data.nbytes)
    with open(path, "wb") as file:
        file.write(header.ljust(_aligned(len(header)), b"\0"))
        for tensor in tensors.values():
            np.ascontiguousarray(tensor.data).tofile(file)
            file.write(bytes(_aligned(tensor.data.nbytes) - tensor.data.nbytes))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: str | int | float) -> bytes:
    """The number of the type, string, uint32 or float32, and the value."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    return struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value)
