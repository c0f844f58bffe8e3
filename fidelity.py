"""What a model lost when it was converted: a student beside the teacher that it was made from.

Both read the same windows of a text, each with hidden states of its own, one layer after the other,
so that models are compared which do not fit: on the device are one layer of each and what a batch
of windows needs, on the host the hidden states of the text, [W, T, D] twice.

Shape letters as in `model.py`; W windows of T tokens. Of two things, the teacher's comes first.
"""

import dataclasses
import functools
import math
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import lax

import calibration
import checkpoint
import conversion
import data
import learning
import model
import quantize
import runners
import sharding
import tokenizer

BATCH = 8  # windows computed together, or fewer:
LOGITS = 1 << 28  # of a batch at most, 1 GiB of each model
# Bins of histograms of weights: ninths of a trit, so that half a trit is an edge, and 0 is not.
BINS = 73
REACH = BINS / 18  # from -REACH to REACH; the outer bins hold the rest, too
COUNTED = 1 << 20  # weights of a matrix that its histogram counts, if there are more
SAMPLE = 1000  # tokens that are reported one by one
LIKELIEST = 3  # predictions that are told of each
SAME = ("vocab_size", "num_layers", "emb_size", "num_q_heads", "num_kv_heads", "key_size")
SAME += ("ffn_size", "num_experts", "num_selected_experts")
NAMES = ("teacher", "student")

_pairs = functools.partial(zip, strict=True)

# --- A model, a layer at a time -------------------------------------------------------------------


class Walker:
    """A checkpoint, the parameters of which are on the mesh a layer at a time.

    embed: (outer parameters, int32 [B, T]) -> [B, T, D]
    layer: (a layer's parameters, [B, T, D]) -> model.LayerOutput
    head: (outer parameters, [B, T, D]) -> logits float32 [B, T, V]
    """

    def __init__(self, folder: Path, config: model.LanguageModelConfig, precision, mesh):
        """Reads headers only; config and precision as `checkpoint.check_files` takes them."""
        self.folder, self.config, self.mesh = folder, config, mesh
        self.entries = checkpoint.check_files(folder, model.abstract_params(config), precision)
        shardings = functools.partial(sharding.parameter_shardings, mesh)
        self.placement = checkpoint.placement_of(self.entries, shardings)

        def head(h):
            with hk.name_scope("language_model"):
                h = model.RMSNorm(config.rms_norm_eps)(h)
                return model.InOutEmbed(config).decode(h)

        self.embed = functools.partial(calibration.embed, config=config)
        self.layer = functools.partial(calibration.run_layer, config=config)
        self.head = jax.jit(hk.without_apply_rng(hk.transform(head)).apply)

    def params(self, prefix: str = "") -> dict:
        """All at once, or those of modules with this prefix, the embedding table among them."""
        return runners.cast_embeddings(self._restore(prefix), self.config)

    def outer_params(self) -> dict:
        """The embedding table and the last norm."""
        return self.params("language_model/")

    def layer_params(self, i: int) -> dict:
        """Layer i, under the name of layer 0: all have one program."""
        prefix = f"transformer/decoder_layer_{i}/"
        params = self._restore(prefix)
        return {f"{runners.LAYER}/{name.removeprefix(prefix)}": params[name] for name in params}

    def _restore(self, prefix: str) -> dict:
        entries = [entry for entry in self.entries if entry.module.startswith(prefix)]
        return checkpoint.restore_entries(entries, self.placement)


def open_teacher(folder: Path, mesh) -> Walker:
    """A checkpoint as it is stored, with `calibration.teacher_activations`."""
    checkpoint.check_folder(folder)
    config = model.config_from_dict(checkpoint.read_config(folder))
    precision = checkpoint.stored_precision(folder)
    if precision is None:  # int8, or floats
        template = model.abstract_params(config)
        entries = checkpoint.check_files(folder, template, model.PRECISIONS["int8"])
        precision = {entry.path: checkpoint.format_of(entry.read()) for entry in entries}
    activations = calibration.teacher_activations(config.activations, precision.values())
    return Walker(folder, dataclasses.replace(config, activations=activations), precision, mesh)


def check_alike(teacher: Walker, student: Walker) -> None:
    """ValueError for two models that have other layers, or read a text as other tokens."""
    values = [[getattr(w.config, name) for name in SAME] for w in (teacher, student)]
    differing = [f"{name} {b} instead of {a}" for name, a, b in _pairs(SAME, *values) if a != b]
    if not differing:
        pieces = [tokenizer.load(w.folder, w.config.vocab_size) for w in (teacher, student)]
        first, second = (processor.serialized_model_proto() for processor in pieces)
        differing = ["another tokenizer"] * (first != second)
    if differing:
        raise ValueError(
            f"{student.folder} cannot be compared with {teacher.folder}, it was not made from it: "
            f"it has {', '.join(differing)}; give the folder that convert.py read"
        )


# --- What is compared -----------------------------------------------------------------------------


@jax.jit
def _layer_sums(before, after, mask) -> dict:
    """Sums over the tokens of a mask [B, T], of what a layer made of [B, T, D], LayerOutputs."""

    def summed(x):  # [B, T, ...]
        return jnp.sum(jnp.where(jnp.expand_dims(mask, tuple(range(2, x.ndim))), x, 0), (0, 1))

    def cosine(a, b):
        product = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        return jnp.sum(a * b, axis=-1) / jnp.maximum(product, 1e-30)

    x, h = jax.tree.map(lambda a: a.astype(jnp.float32), (before, [y.hidden for y in after]))
    sums = {"cosine": cosine(*h), "delta_cosine": cosine(h[0] - x[0], h[1] - x[1])}
    probs, index = after[0].router_probs, [output.expert_index for output in after]
    if probs is not None:
        chosen = index[0].shape[-1]
        ordered = -jnp.sort(-jnp.pad(probs, [(0, 0), (0, 0), (0, 1)]), axis=-1)  # E = A: p is 0
        first = index[0][..., 0] == index[1][..., 0]
        those = jnp.all(jnp.sort(index[0]) == jnp.sort(index[1]), axis=-1)
        for name, same, place in (("top1", first, 1), ("set", those, chosen)):
            margin = ordered[..., place - 1] - ordered[..., place]
            sums |= {name: same, f"{name}_weighted": same * margin, f"{name}_margin": margin}
        experts = jnp.arange(probs.shape[-1])
        sums["load"] = jnp.stack([(i[..., None] == experts).sum(2) for i in index], axis=2)
    return jax.tree.map(summed, sums)


@jax.jit
def _token_measures(teacher, student, targets):
    """Of logits [B, T, V]: both losses, KL(teacher || student) and whether their argmax is one."""
    p, q = (jax.nn.log_softmax(logits) for logits in (teacher, student))
    return {
        "losses": jnp.stack([learning.cross_entropy(x, targets) for x in (teacher, student)]),
        "kl": jnp.sum(jnp.exp(p) * (p - q), axis=-1),
        "agreement": jnp.argmax(teacher, axis=-1) == jnp.argmax(student, axis=-1),
    }


@jax.jit
def _weight_sums(teacher, student):
    """Sums of |W - W'|^2 and of |W|^2, [E, O], and a histogram of W."""
    *lead, inputs, outputs = teacher.shape
    step = min(max(1, inputs * outputs * (lead or [1])[0] // COUNTED), outputs)

    def one(pair):
        w, other = map(quantize.dequantize, pair)
        unit = trit_size(pair[1]) if is_trits(pair[1]) else jnp.sqrt(jnp.mean(w * w))
        x = (w / jnp.maximum(unit, 1e-30))[:, ::step]
        places = jnp.clip((x / REACH + 1) / 2 * BINS, 0, BINS - 1).astype(jnp.int32)
        counts = jnp.bincount(places.reshape(-1), length=BINS)
        return jnp.sum(jnp.square(w - other), axis=0), jnp.sum(w * w, axis=0), counts

    error, energy, counts = lax.map(one, tuple(map(conversion.stacked, (teacher, student))))
    return error, energy, counts.sum(axis=0)


def weight_errors(params: dict, others: dict) -> dict[str, float]:
    """{"module/name": |W - W'|^2 / |W|^2} of two trees of parameters, in any formats."""

    @jax.jit
    def error(w, other):
        w, other = map(quantize.dequantize, (w, other))
        return jnp.sum(jnp.square(w - other)) / jnp.maximum(jnp.sum(w * w), 1e-30)

    return {
        f"{module}/{name}": float(error(w, others[module][name]))
        for module, entries in params.items()
        for name, w in entries.items()
    }


def is_trits(w: quantize.Weight) -> bool:
    """Whether each weight is one trit times a size."""
    return isinstance(w, quantize.PackedWeight) and w.planes == 1


def trit_size(w: quantize.PackedWeight):
    """What a trit of w [I, O] stands for: [1 or I, 1 or O]."""
    if w.multipliers is None:
        return w.scales
    sizes = w.multipliers[..., 0].T * w.scales  # [G, O]
    inputs = w.shape[-2]
    return jnp.repeat(sizes, (inputs + w.padding) // len(sizes), axis=0)[:inputs]


# --- The comparison -------------------------------------------------------------------------------


def compare(
    teacher: Walker, student: Walker, text: str, length: int, progress: bool = False
) -> dict:
    """Both models on a text, in windows of T = `length` tokens as in `evaluate.text_loss`.

    Both are on one mesh; there, a matrix of one expert is in float32 besides.

    Returns what can be written as JSON:

    teacher, student: folder, activations, loss_per_token, loss_per_character, perplexity (per
      token); nats
    tokens, characters: of the text
    kl: mean KL(teacher || student) of the predictions, in nats per token
    agreement: share of tokens for which both find the same one likeliest
    layers: of each, by its number in "layer"
      cosine, delta_cosine: of the two outputs, and of what the layer added to its input; means over
        tokens
      top1, set: share of tokens that are sent to the same first expert, and to the same A experts;
        top1_weighted, set_weighted: each token counts by how sure the teacher is of it, that is by
        p1 - p2, and by pA - p(A + 1). Without experts there are none of these, and no load
      load: {"teacher", "student"}: share of the choices that fell on each expert
      error: {family: |W - W'|^2 / |W|^2}
      histograms: {family: {"counts": [BINS], "trits": whether the student's weights are single
        trits; then W is counted in multiples of their sizes, else of its root mean square}}, from
        -reach to reach
    families: {family: {"weights": their number, "error": as above}}
    reach: of the histograms
    sample: the first tokens: text, kl, and of both models the likeliest, [[text, probability]]

    Raises ValueError for models that `check_alike` refuses, and for logits that are not finite.
    """
    check_alike(teacher, student)
    both = teacher, student
    processor = tokenizer.load(student.folder, student.config.vocab_size)
    windows = data.windows(tokenizer.encode(processor, text), length)
    tokens = int(windows.mask.sum())
    rows = min(BATCH, len(windows.inputs), LOGITS // (length * student.config.vocab_size)) or 1
    batches = data.batches(windows, rows)
    layers, families = [], {}
    steps = tqdm.tqdm(range(student.config.num_layers), unit="layer", disable=not progress)
    with jax.set_mesh(student.mesh):
        params = [w.outer_params() for w in both]
        streams = [
            [np.asarray(w.embed(p, b.inputs)) for b in batches] for w, p in _pairs(both, params)
        ]
        for i in steps:
            del params
            params = [w.layer_params(i) for w in both]
            found = _run_layer(both, params, streams, batches, tokens)
            layers.append({"layer": i} | found | _compare_weights(params, families))
        del params
        params = [w.outer_params() for w in both]
        measures, sample = _run_head(both, params, streams, batches, processor)
    return {
        **{
            name: {"folder": str(w.folder), "activations": w.config.activations}
            | _loss(measures["losses"][i].sum(), tokens, len(text))
            for i, (name, w) in enumerate(_pairs(NAMES, both))
        },
        "tokens": tokens,
        "characters": len(text),
        "kl": float(measures["kl"].mean()),
        "agreement": float(measures["agreement"].mean()),
        "layers": layers,
        "families": {
            name: {"weights": int(count), "error": _ratio(error, energy)}
            for name, (count, error, energy) in families.items()
        },
        "reach": REACH,
        "sample": sample,
    }


def _ratio(part, whole) -> float:
    return float(part / max(whole, 1e-30))


def _loss(nats: float, tokens: int, characters: int) -> dict:
    found = {"loss_per_token": nats / tokens, "loss_per_character": nats / characters}
    return {name: float(x) for name, x in found.items()} | {
        "perplexity": float(np.exp(nats / tokens))
    }


def _run_layer(both, params, streams, batches, tokens: int) -> dict:
    """Moves both streams on by a layer; what `compare` tells of it, but for weights."""
    total = {}
    for j, batch in enumerate(batches):
        before = tuple(stream[j] for stream in streams)
        after = tuple(w.layer(p, h) for w, p, h in _pairs(both, params, before))
        sums = jax.device_get(_layer_sums(before, after, batch.mask))
        total = {name: total.get(name, np.float64(0)) + x for name, x in sums.items()}
        for stream, output in _pairs(streams, after):
            stream[j] = np.asarray(output.hidden)
    found = {name: _ratio(total[name], tokens) for name in ("cosine", "delta_cosine")}
    if "load" not in total:
        return found
    for name in ("top1", "set"):
        found[name] = _ratio(total[name], tokens)
        found[f"{name}_weighted"] = _ratio(total[f"{name}_weighted"], total[f"{name}_margin"])
    load = total["load"] / total["load"].sum(axis=-1, keepdims=True)
    return found | {"load": dict(_pairs(NAMES, load.tolist()))}


def _compare_weights(params, families: dict) -> dict:
    """What `compare` tells of the matrices of a layer; adds to {family: its sums}."""
    here: dict[str, list] = {}
    for module, entries in params[0].items():
        family = checkpoint.family_of(f"{module}/")
        if family in ("attention", "experts", "feed-forward"):
            pair = entries["w"], params[1][module]["w"]
            error, energy, counts = map(np.asarray, _weight_sums(*pair))
            sums = math.prod(pair[0].shape), error.sum(dtype=float), energy.sum(dtype=float)
            here.setdefault(family, []).append((np.array(sums), counts, is_trits(pair[1])))
    found = {"error": {}, "histograms": {}}
    for family, matrices in here.items():
        sums, counts, trits = zip(*matrices, strict=True)
        families[family] = families.get(family, 0) + sum(sums)
        found["error"][family] = _ratio(*sum(sums)[1:])
        found["histograms"][family] = {"counts": sum(counts).tolist(), "trits": all(trits)}
    return found


def _run_head(both, params, streams, batches, processor):
    """`_token_measures` of all tokens of the text, and the first ones in detail."""
    measures, sample = [], []
    for j, batch in enumerate(batches):
        logits = [w.head(p, stream[j]) for w, p, stream in _pairs(both, params, streams)]
        found = jax.tree.map(np.asarray, _token_measures(*logits, batch.targets))
        measures.append({name: x[..., batch.mask].astype(float) for name, x in found.items()})
        if len(sample) < SAMPLE:
            likeliest = [[np.asarray(x)[batch.mask] for x in _likeliest(x)] for x in logits]
            sample += _described(
                batch.targets[batch.mask], measures[-1]["kl"], likeliest, processor
            )
    joined = {name: np.concatenate([m[name] for m in measures], axis=-1) for name in measures[0]}
    for w, losses in _pairs(both, joined["losses"]):
        if not np.isfinite(losses).all():
            raise ValueError(
                f"{w.folder}: logits that are not finite: its weights are damaged, or too large; "
                "verify the checkpoint"
            )
    return joined, sample[:SAMPLE]


@jax.jit
def _likeliest(logits):
    return lax.top_k(jax.nn.softmax(logits), LIKELIEST)


def _described(targets, kl, likeliest, processor) -> list[dict]:
    """Tokens [N] for `compare`'s sample; likeliest: of both, probabilities and indices [N, 3]."""

    def piece(token):
        byte = processor.decode([token]) if processor.is_byte(token) else "\ufffd"
        whole = processor.id_to_piece(token).replace("\u2581", " ")
        return whole if byte == "\ufffd" else byte

    def predicted(probs, index):
        return [[piece(int(i)), float(p)] for p, i in _pairs(probs, index)]

    return [
        {"text": piece(int(target)), "kl": float(kl[n])}
        | {name: predicted(*(x[n] for x in found)) for name, found in _pairs(NAMES, likeliest)}
        for n, target in enumerate(targets)
    ]
