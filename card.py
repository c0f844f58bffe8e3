"""The model card of a converted checkpoint: a README.md that the Hugging Face Hub reads.

Its head, in YAML, names the base model and how the weights came about, so that a folder can be
uploaded as it is: `hf upload USER/NAME FOLDER`.
"""

import math
from pathlib import Path

import model
import report
import shards
from checkpoint import readable_size

NAME = "README.md"
GROK_1 = "xai-org/grok-1"  # Apache 2.0, the weights too

HEAD = """---
{base}pipeline_tag: text-generation
tags:
- ternary
- bitnet
- mixture-of-experts
- jax
---
"""

COMPARED = "## Beside the model that it was made from\n"

METHODS = {  # by the beginning of a format's name; the longest that fits
    "ternary": "absmean of each matrix, as in BitNet b1.58 (arXiv 2402.17764)",
    "ternary-fit": "scales fitted by least squares",
    "ternary2": "sums of two ternary matrices, fitted by alternating least squares",
    "int8": "rounded to int8",
    "float32": "as they were",
}


def model_card(config: dict, leaves: dict) -> bytes:
    """The card of a checkpoint.

    config: of its config.json, with "quantization_config"
    leaves: {path: leaf}, abstract, of what is stored
    """
    about = config["quantization_config"]
    parameters = sum(math.prod(leaf.shape) for leaf in leaves.values())
    stored = sum(map(shards.stored_bytes, leaves.values()))
    quantized = [w for w in leaves.values() if not hasattr(w, "dtype")]
    bits = 8 * sum(map(shards.stored_bytes, quantized))
    of_quantized = sum(math.prod(w.shape) for w in quantized)
    is_grok = config.get("preset") == "grok-1"
    base = (
        f"license: apache-2.0\nbase_model: {GROK_1}\nbase_model_relation: quantized\nlanguage: en\n"
    )
    rows = {
        "parameters": f"{parameters:,}, in {config['num_layers']} layers",
        "weights": f"`{about['weights']}`: {method(about['weights'])}",
        "activations": f"{config['activations']}, in {config['fprop_dtype']}",
        "bits a quantized weight, stored": f"{bits / max(1, of_quantized):.2f}",
        "size": f"{readable_size(stored)} in safetensors, `{about['packing']}`",
        "context": f"{config['sequence_len']} tokens",
    }
    if calibrated := about.get("calibration"):
        rows["calibrated"] = f"on {calibrated['tokens']:,} tokens of a text, layer by layer (GPTQ)"
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    title = "Grok-1, ternary" if is_grok else "A ternary mixture-of-experts model"
    return (
        HEAD.format(base=base if is_grok else "")
        + f"\n# {title}\n\n| | |\n|---|---|\n{table}\n"
        + "Converted by Ternary Grok-1's `convert.py`, and run by its `run.py`:\n\n"
        + '```\npython run.py --checkpoint FOLDER --prompt "The answer is"\n```\n\n'
        + "`config.json` says which format each matrix has, `checksums.json` what every file's\n"
        + f"SHA-256 is.\n\n{COMPARED}\n"
        + "Not measured: `evaluate.py FOLDER --against SOURCE --data TEXT --card` does that.\n"
    ).encode()


def check_card(folder: Path) -> None:
    """ValueError unless a checkpoint has a model card."""
    if not (folder / NAME).exists():
        raise ValueError(
            f"{folder} has no model card, {NAME}; convert.py writes one, train.py none"
        )


def add_comparison(folder: Path, found: dict, source: str, text: str) -> None:
    """Writes what `fidelity.compare` found into a card, in place of what it said before.

    source: the model compared with; text: what both read
    """
    before, mark, after = (folder / NAME).read_text().partition(COMPARED)
    _, heading, others = after.partition("\n## ")  # the user's own
    section = (
        f"{COMPARED}\nThat is {source}, and both read {text}. Of each layer: cosines of its output "
        "and of\nwhat it added, tokens that go to the same experts, and |W - W'|^2 / |W|^2.\n\n"
        f"```\n{report.table(found)}\n```\n"
    )
    content = f"{before if mark else before + chr(10)}{section}{heading}{others}"
    shards.rewrite(folder, NAME, content.encode())


def method(weights: str) -> str:
    """How weights of this name came about; "mixed" for a table of one's own."""
    if weights not in model.PRECISIONS:
        return "mixed, by a table in `config.json`"
    name = weights.replace("-experts", "")
    found = METHODS[max((m for m in METHODS if name.startswith(m)), key=len)]
    groups = name.rsplit("-", 1)[-1]
    found += f", one for each output and {groups} inputs" if groups.isdigit() else ""
    return found + ("; attention in int8" if "-experts" in weights else "")
