"""Continue prompts with a checkpoint: the text goes to stdout, everything else to stderr.

    python run.py --prompt "First Citizen:" --max-len 100
    python run.py --checkpoint checkpoints/grok-1 --mesh 1,8 --prompts-file prompts.txt

Without a prompt, on a terminal, it asks for one after the other. It continues texts and does not
chat: no prompt knows of another.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

import checkpoint
import engine
import kernels
import layouts
import model
import quantize
import runners
import sharding
import shards
import tokenizer
from checkpoint import readable_size
from data import read_text

MAX_SLOTS = 8  # unless --slots asks for more
FLAGS = {  # of what errors of requests name
    "max_len": "--max-len",
    "nucleus_p": "--top-p",
    "rng_seed": "--seed",
    "sequence_len": "--sequence-len",
    "temperature": "--temperature",
    "truncate": "--truncate",
}


def add_model_arguments(parser: argparse.ArgumentParser, slots: str):
    """The flags that `prepare` and `load` read; the group of devices, for more of these.

    slots: how many there are by default, in words
    """
    add = parser.add_argument_group("model").add_argument
    add(
        "--checkpoint",
        type=Path,
        default=Path("checkpoints/demo"),
        metavar="FOLDER",
        help="folder with ckpt-0/, and config.json and tokenizer.model if any, or what convert.py "
        "made of it (%(default)s)",
    )
    add("--preset", choices=model.PRESETS, help="configuration (config.json, else grok-1)")
    add("--weights", choices=model.PRECISIONS, help="in memory (as converted, else ternary)")
    add("--dtype", choices=("float32", "bfloat16"), help="of activations and cache (the model's)")
    add("--activations", choices=quantize.ACTIVATIONS, help="in products (the model's)")
    add("--embeddings", choices=model.EMBEDDINGS, help="table of them in memory (the model's)")
    add(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="refuse weights that are no numbers, such as NaN, while they load (yes)",
    )

    devices = parser.add_argument_group("devices")
    add = devices.add_argument
    add("--mesh", metavar="D,M", help="data,model axes (1, as many devices as divide the heads)")
    add("--slots", type=int, help=f"requests that decode together ({slots})")
    add(
        "--sequence-len",
        type=at_least(2),
        help="longest prompt and continuation (the model's context)",
    )
    return devices


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type of flags: a whole number, `least` or more, and at most `most`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            expected = f"{least} or more" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be {expected}, got {value}")
        return value

    parse.__name__ = "int"  # what argparse calls it
    return parse


def some_text(text: str) -> str:
    """A type of flags: any text but none."""
    if not text:
        raise argparse.ArgumentTypeError("must be a text that is not empty")
    return text


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = add_model_arguments(parser, f"the prompts, up to {MAX_SLOTS}").add_argument
    add(
        "--distributed",
        nargs="?",
        const="",
        metavar="HOST:PORT,N,I",
        help="run on several hosts, each with the same other flags: coordinator, number of "
        "processes, index of this one; without a value, as the cluster says",
    )

    add(
        "--plan",
        metavar="DEVICES",
        help="compile for devices that are not here, such as h200x8 or v5e-8, print what it takes "
        "there, and run nothing; with --preset it needs no weights",
    )

    add = parser.add_argument_group("text").add_argument
    add("--prompt", action="append", help="text to continue, - for stdin; may be repeated")
    add("--prompts-file", type=Path, metavar="FILE", help="one prompt on each line")
    add("--max-len", type=int, default=100, help="new tokens for each prompt (%(default)s)")
    add("--temperature", type=float, default=0.7, help="0: the likeliest token (%(default)s)")
    add("--top-p", type=float, default=1.0, help="sample from this much probability (%(default)s)")
    add("--seed", type=int, default=42, help="of the first text, others follow (%(default)s)")
    add("--samples", type=at_least(1), default=1, help="texts for each prompt (%(default)s)")
    add(
        "--stop",
        action="append",
        type=some_text,
        metavar="TEXT",
        help="ends a text, and is not written; may be repeated",
    )
    add(
        "--json",
        action="store_true",
        help="a line of JSON for each text: with its tokens, their "
        "log-probabilities and likeliest alternatives",
    )
    add("--truncate", action="store_true", help="drop the start of prompts that do not fit")
    return parser.parse_args(argv)


def join_hosts(where: str) -> None:
    """Starts the distributed runtime from the value of --distributed."""
    if not where:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                f"JAX finds no cluster around it ({error}); give --distributed HOST:PORT,N,I"
            ) from None
        return
    try:
        address, processes, index = where.split(",")
        processes, index = int(processes), int(index)
    except ValueError:
        raise ValueError(
            f"--distributed is HOST:PORT,N,I as in a:1234,2,0; got {where!r}"
        ) from None
    jax.distributed.initialize(address, processes, index)


MESSAGE = 1000  # bytes of an error that go to other hosts


def on_all_hosts(do: Callable):
    """What `do` gives; if it fails on one host, ValueError on all, which names the first of those.

    The others would wait for that one for ever. A host has its own files: a checkpoint that is
    not on shared storage must be on each.
    """
    result, error = None, ""
    try:
        result = do()
    except (ValueError, OSError) as raised:
        if jax.process_count() == 1:
            raise
        error = f"host {jax.process_index()}, {socket.gethostname()}: {raised}"
    if jax.process_count() > 1:
        content = error.encode(errors="replace")[:MESSAGE]  # a path may be no UTF-8
        message = np.frombuffer(content.ljust(MESSAGE, b"\0"), np.uint8)
        messages = multihost_utils.process_allgather(message).reshape(-1, MESSAGE)
        texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in messages]
        if any(texts):
            raise ValueError(next(filter(None, texts)))
    return result


def utf8(read: Callable[[], str], source: str) -> str:
    """The text that `read` gives; ValueError, which names its source, if it is not UTF-8."""
    try:
        text = read()
        text.encode("utf-8")  # of other bytes in flags Python makes half characters
    except UnicodeError as error:
        raise ValueError(
            f"{source} is not UTF-8 text ({error}); convert it, for example with iconv"
        ) from None
    return text


def read_prompt(prompt: str) -> str:
    """A prompt as --prompt gives it; - is for stdin, without the newline that shells end with."""
    if prompt == "-":
        return utf8(sys.stdin.read, "stdin").removesuffix("\n")
    return utf8(lambda: prompt, "--prompt")


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the flags; none for a conversation on a terminal."""
    prompts = [read_prompt(prompt) for prompt in args.prompt or []]
    if args.prompts_file is not None:
        prompts += [line for line in read_text(args.prompts_file).splitlines() if line]
    if not prompts and (
        args.prompts_file or args.distributed is not None or not sys.stdin.isatty()
    ):
        raise ValueError("no prompt; give --prompt TEXT, --prompt - or --prompts-file FILE")
    return prompts


def resolve_config(args: argparse.Namespace) -> model.LanguageModelConfig:
    """The preset, or the checkpoint's own configuration, with what the flags change."""
    if args.preset:
        config = model.PRESETS[args.preset]
    else:
        config = model.config_from_dict(checkpoint.read_config(args.checkpoint))
    if (args.sequence_len or 0) > config.sequence_len:
        report(
            note=f"--sequence-len {args.sequence_len} is more than the {config.sequence_len} tokens"
            " of the model: expect worse text beyond them"
        )
    chosen = {"fprop_dtype": args.dtype, "activations": args.activations}
    chosen |= {"embeddings": args.embeddings, "sequence_len": args.sequence_len}
    return dataclasses.replace(config, **{k: v for k, v in chosen.items() if v is not None})


def resolve_mesh(text: str | None, kv_heads: int) -> jax.sharding.Mesh:
    """The mesh asked for; by default heads over the devices, and "data" over the other hosts."""
    if text is not None:
        mesh = sharding.parse_mesh(text)
    else:
        devices = jax.device_count()
        by_model = math.gcd(devices, kv_heads)
        by_data = devices // by_model if jax.process_count() > 1 else 1
        mesh = sharding.make_mesh(by_data, by_model)
    if not mesh.local_devices:
        raise ValueError(
            f"process {jax.process_index()} has no device in mesh {text}; choose a mesh of all "
            f"{jax.device_count()} devices, or start fewer processes"
        )
    return mesh


# --- What it takes --------------------------------------------------------------------------------


def report(**lines: str) -> None:
    """Aligned lines on stderr, from one process only."""
    if jax.process_index() == 0:
        for name, value in lines.items():
            print(f"{name:<12}{value}", file=sys.stderr)


def plan(
    args: argparse.Namespace,
    runner: runners.ModelRunner,
    weights: str,
    precision: dict[str, str],
    slots: int,
    scored: bool = False,
) -> None:
    """Reports the resolved configuration; ValueError if a device has too little memory for it.

    Weights that are mapped may be more than there is.

    scored: whether log-probabilities of prompts will be wanted
    """
    c = runner.config
    params = runners.abstract_weights(c, precision)
    needed = runners.device_memory(runner, params, slots, c.sequence_len, scored)
    total, limit = sum(needed.values()), sharding.memory_limit(runner.mesh)
    report(
        **described(runner, params, weights, slots),
        memory=" + ".join(f"{name} {readable_size(count)}" for name, count in needed.items()),
        total=f"{readable_size(total)} of {readable_size(limit)} on each device",
    )
    if total > limit and not runs_from_disk(args, runner, params, total, limit):
        more = []
        if runner.mesh.devices.flat[0].platform == "gpu":  # JAX takes three quarters by default
            more += ["XLA_PYTHON_CLIENT_MEM_FRACTION=0.97 in the environment"]
        if sharding.is_one_cpu(runner.mesh) and needed["cache"] + needed["activations"] < limit:
            more += layout_cures(args.checkpoint)
        raise too_large(runner, needed, limit, weights, slots, more)


def described(runner: runners.ModelRunner, params: dict, weights: str, slots: int) -> dict:
    """Lines that say what serves, and on what; params: as from `runners.abstract_weights`."""
    c, mesh = runner.config, runner.mesh
    parameters = quantize.count(model.abstract_params(c))
    experts = (
        f"{c.num_selected_experts} of {c.num_experts} experts" if c.num_experts > 1 else "dense"
    )
    return {
        "model": f"{c.num_layers} layers of {c.emb_size}, {c.num_q_heads} query and "
        f"{c.num_kv_heads} key/value heads of {c.key_size}, {experts} of {c.ffn_size}",
        "parameters": f"{parameters:,}",
        "weights": f"{weights}, {c.activations} activations in {c.fprop_dtype}",
        "products": products(runner, params),
        "mesh": f"{mesh.shape['data']} data x {mesh.shape['model']} model, "
        f"{mesh.devices.flat[0].device_kind}",
        "slots": f"{slots} of {c.sequence_len} tokens, vocabulary {c.vocab_size}",
    }


def too_large(
    runner: runners.ModelRunner,
    needed: dict[str, int],
    limit: int,
    weights: str,
    slots: int,
    more: list[str],
) -> ValueError:
    """The error of a device that has `limit` bytes, with cures, these last; needed: by purpose."""
    mesh, cures = runner.mesh, []
    if mesh.shape["model"] < runner.config.num_kv_heads:
        cures += ["a larger model axis in --mesh"]
    cures += ["--weights ternary"] if weights != "ternary" else []
    if needed["weights"] + needed["embeddings"] < limit:
        cures += ["fewer --slots"] if slots > mesh.shape["data"] else []
        cures += ["a shorter --sequence-len"]
    cures += more
    return ValueError(
        f"this needs {readable_size(sum(needed.values()))} on each device, which has "
        f"{readable_size(limit)}; try {', '.join(cures or ['devices with more memory'])}"
    )


def plan_elsewhere(args: argparse.Namespace) -> None:
    """Prints what --plan asks for; ValueError if the devices have too little memory for it."""
    import aot  # nothing else needs the compilers of other devices

    jax.config.update("jax_platforms", "cpu")  # what else is installed need not be here
    name, count = aot.parse_devices(args.plan)
    config = resolve_config(args)
    template = model.abstract_params(config)
    if args.preset:
        weights = args.weights or "ternary"
        formats = model.formats_of(template, model.precision_table(weights))
    else:
        checkpoint.check_folder(args.checkpoint)
        weights = args.weights or checkpoint.default_weights(args.checkpoint)
        formats = runners.precision_of(args.checkpoint, template, args.weights)
    heads = math.gcd(count, config.num_kv_heads)
    shape = sharding.parse_shape(args.mesh) if args.mesh else (count // heads, heads)
    if min(shape) < 1 or math.prod(shape) > count:
        raise ValueError(
            f"--mesh {args.mesh} is no mesh of the {count} devices of --plan {args.plan}; give "
            "sizes of 1 or more whose product is no larger"
        )
    runner = runners.ModelRunner(config, aot.described_mesh(name, *shape))
    slots = args.slots or runner.mesh.shape["data"]
    runners.check_slots(slots, runner.mesh)
    with kernels.compiling_for(aot.DEVICES[name].platform):
        params = runners.abstract_weights(config, formats)
        lines = described(runner, params, weights, slots)
    found = aot.make_plan(runner, formats, name, slots, progress=True)
    lines["compiled"] = f"with jax {jax.__version__}, for devices that are not here: nothing ran"
    for title, text in (lines | found.lines()).items():
        print(f"{title:<16}{text}")
    if sum(found.memory.values()) > found.limit:
        raise too_large(runner, found.memory, found.limit, weights, slots, [])


def runs_from_disk(
    args: argparse.Namespace, runner: runners.ModelRunner, params: dict, total: int, limit: int
) -> bool:
    """Whether all but what is mapped fits into `limit` bytes; then reports what a token reads."""
    mapped = runner.plan_loading(args.checkpoint, args.weights).mapped_bytes
    room = limit - (total - mapped)  # for what is mapped
    if not mapped or room < 0:
        return False
    read, missing = runners.token_bytes(runner.config, params, room)
    report(
        disk=f"it runs from there, slowly, for the weights are more than memory: a token reads "
        f"{readable_size(read)} of them, about {readable_size(missing)} from the disk"
    )
    return True


def layout_cures(folder: Path) -> list[str]:
    """What lets a model run that memory is too small for."""
    if not shards.exists(folder):
        first = f"convert.py {folder} OUTPUT and then convert.py OUTPUT"
    elif not layouts.path_of(folder).exists():
        first = f"convert.py {folder}"
    else:
        return []
    return [f"{first} --layout cpu (a CPU then runs it from the disk, slowly)"]


def products(runner: runners.ModelRunner, params: dict) -> str:
    """What multiplies the quantized matrices, such as "kernel: moe/linear; plain JAX: ..."."""

    def of(activations):
        config = dataclasses.replace(runner.config, activations=activations)
        found = runners.products_by_path(runners.ModelRunner(config, runner.mesh), params)
        return {path: names for path, names in found.items() if names}

    found = of(runner.config.activations)
    if len(found) == 1:
        text = f"{next(iter(found))}: all quantized matrices"
    else:
        text = "; ".join(f"{path}: {', '.join(names)}" for path, names in found.items())
    if runner.config.activations == "float" and "kernel" in of("int15"):
        text += "; --activations int15 or int8 have kernels"
    return text or "plain JAX: float matrices"


# --- Text -----------------------------------------------------------------------------------------


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def write(text: str) -> None:
    """Text to stdout; on a terminal, which would obey control characters, these are escaped."""
    if sys.stdout.isatty():
        text = CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
    if jax.process_index() == 0:
        print(text, end="", flush=True)


def prompt_tokens(inference: runners.InferenceRunner, request: runners.Request) -> np.ndarray:
    """`InferenceRunner.prompt_tokens`; its errors name the flags."""
    try:
        return inference.prompt_tokens(request)
    except ValueError as error:
        names = "|".join(FLAGS)
        text = re.sub(rf"(?<![\w-])({names})\b", lambda name: FLAGS[name[0]], str(error))
        raise ValueError(text) from None


@dataclasses.dataclass(frozen=True)
class Style:
    """How answers are written.

    stop: texts that end one, wherever they lie in tokens; they are not written
    json: a line of JSON for each answer, once it is complete
    """

    stop: tuple[str, ...] = ()
    json: bool = False


class Answer:
    """What becomes of a request: its text so far, and with `style.json` all that is known of it."""

    def __init__(self, inference: runners.InferenceRunner, request: runners.Request, style: Style):
        self.request, self.error, self.reason = request, None, None
        self.tokens: list[runners.Token] = []
        self.begin, self.seconds = time.perf_counter(), 0.0
        eos = inference.runner.config.eos_token
        self._writer = engine.Writer(inference.tokenizer, eos, style.stop, echo=not style.json)
        # Through the decoder too: it is then the prompt as the model sees it, spaces included.
        self.text = self._writer.prompt(request.prompt, None, end=False).text

    def push(self, token: runners.Token) -> str:
        """The text that one more token makes certain."""
        self.seconds = time.perf_counter() - self.begin
        if token.error:
            self.error, self.reason = token.error, "error"
            return ""
        self.tokens.append(token)
        delta = self._writer.push(token)
        self.text, self.reason = self.text + delta.text, delta.finish
        return delta.text

    def fields(self, prompt: str) -> dict:
        """For JSON; prompt: its text."""
        found = {
            "prompt": prompt,
            "text": self.text,
            "seed": self.request.rng_seed,
            "reason": self.reason,
            "tokens": [token.token_id for token in self.tokens],
            "logprobs": [token.logprob for token in self.tokens],
            "alternatives": [
                dict(zip(map(int, t.top_k_token_ids), map(float, t.top_k_logprobs), strict=True))
                for t in self.tokens
            ],
            "seconds": round(self.seconds, 6),
        }
        return found | ({"error": str(self.error)} if self.error else {})


def answer(
    inference: runners.InferenceRunner, requests: list[runners.Request], style: Style
) -> None:
    """Writes prompts and continuations: one as it comes, several each when it is complete.

    requests: with prompts as tokens

    ValueError, when all are, if one of them failed.
    """
    answers = [Answer(inference, request, style) for request in requests]
    alone = len(requests) == 1 and not style.json
    if alone:
        write(answers[0].text)
    with contextlib.closing(inference.generate(requests)) as generated:
        for number, token in generated:
            found = answers[number]
            piece = found.push(token)
            if alone:
                write(piece + "\n" * bool(found.reason))
            elif found.reason and style.json:
                prompt = inference.tokenizer.decode(list(map(int, found.request.prompt)))
                write(json.dumps(found.fields(prompt), ensure_ascii=False) + "\n")
            elif found.reason:
                write(f"[{number + 1}] {found.text}\n\n")
            if found.reason and not token.done:
                inference.remove(token.slot)
    errors = [f"prompt {i + 1}: {found.error}" for i, found in enumerate(answers) if found.error]
    if errors:
        raise ValueError("\n".join(errors))


def sampled(request: runners.Request, prompts: list, samples: int) -> list[runners.Request]:
    """So many requests for each prompt, each with a seed of its own: that of the first, and on."""
    return [
        dataclasses.replace(request, prompt=prompt, rng_seed=(request.rng_seed + i) % 2**32)
        for i, prompt in enumerate(prompt for prompt in prompts for _ in range(samples))
    ]


def converse(
    inference: runners.InferenceRunner, request: runners.Request, samples: int, style: Style
) -> None:
    """Asks for prompts until the end of the input; each stands alone."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys edit, and bring back what was asked before
    report(
        note="the model continues a text, each prompt by itself, and does not chat;"
        " Ctrl-C ends an answer, Ctrl-D leaves"
    )
    while True:
        try:
            prompt = utf8(lambda: input("\n> "), "the prompt")
            tokens = prompt_tokens(inference, dataclasses.replace(request, prompt=prompt))
        except EOFError:
            print()
            return
        except ValueError as error:
            report(error=str(error))
            continue
        try:
            answer(inference, sampled(request, [tokens], samples), style)
        except KeyboardInterrupt:
            write("\n")
        except ValueError as error:
            report(error=str(error))


def report_speed(timing: runners.Timing) -> None:
    def speed(tokens, seconds):
        return f"{tokens} tokens, {tokens / seconds:.1f} tokens/s" if tokens else "none"

    report(
        prefill=speed(timing.prefill_tokens, timing.prefill_seconds),
        decode=speed(timing.decode_tokens, timing.decode_seconds),
    )


# --- The command ----------------------------------------------------------------------------------


def prepare(
    args: argparse.Namespace, requests: int, scored: bool = False
) -> runners.InferenceRunner:
    """What the flags ask for, with slots for so many requests if they do not say; reports it.

    Loads nothing. Raises ValueError, or checkpoint.CheckpointError. scored: as `plan` takes it
    """
    config = resolve_config(args)
    runner = runners.ModelRunner(config, resolve_mesh(args.mesh, config.num_kv_heads))
    data = runner.mesh.shape["data"]
    slots = args.slots
    if slots is None:
        slots = -(-min(max(requests, 1), MAX_SLOTS) // data) * data
    runners.check_slots(slots, runner.mesh)
    processor = tokenizer.load(args.checkpoint, config.vocab_size)
    weights = args.weights or checkpoint.default_weights(args.checkpoint)
    precision = runners.precision_of(args.checkpoint, model.abstract_params(config), args.weights)
    plan(args, runner, weights, precision, slots, scored)
    return runners.InferenceRunner(runner, processor, slots)


def load(args: argparse.Namespace, runner: runners.ModelRunner) -> None:
    """Loads the weights, and reports it."""
    begin = time.perf_counter()
    options = {"progress": sys.stderr.isatty(), "check": args.check}
    on_all_hosts(lambda: runner.load(args.checkpoint, args.weights, **options))
    loaded = sum(leaf.nbytes for leaf in jax.tree.leaves(runner.params))
    mapped = f", {readable_size(runner.mapped_bytes)} of it mapped" if runner.mapped_bytes else ""
    report(load=f"{readable_size(loaded)} in {time.perf_counter() - begin:.1f} s{mapped}")


def read_requests(
    args: argparse.Namespace,
) -> tuple[runners.InferenceRunner, runners.Request, list[runners.Request]]:
    """What the flags ask for: the request of any prompt, and those of the prompts, as tokens.

    Loads nothing; ValueError for what cannot run.
    """
    checkpoint.check_folder(args.checkpoint)
    prompts = read_prompts(args)
    inference = prepare(args, max(len(prompts), 1) * args.samples)
    request = runners.Request(
        "", args.temperature, args.top_p, args.seed, args.max_len, args.truncate
    )
    requests = [dataclasses.replace(request, prompt=prompt) for prompt in prompts]
    tokens = [prompt_tokens(inference, request) for request in requests]
    return inference, request, sampled(request, tokens, args.samples)


def run(args: argparse.Namespace) -> None:
    if args.plan:
        plan_elsewhere(args)
        return
    if args.distributed is not None:
        join_hosts(args.distributed)
    inference, request, requests = on_all_hosts(lambda: read_requests(args))
    load(args, inference.runner)
    style = Style(tuple(args.stop or ()), args.json)
    if not requests:
        converse(inference, request, args.samples, style)
        return
    begin = time.perf_counter()
    if sys.stderr.isatty() and jax.process_index() == 0:  # it takes seconds, and is overwritten
        print(f"{'compile':<12}...", end="\r", file=sys.stderr, flush=True)
    inference.warm_up(len(request.prompt) for request in requests)
    report(compile=f"{time.perf_counter() - begin:.1f} s")
    answer(inference, requests, style)
    report_speed(inference.timing)


def main(argv=None) -> None:
    args = parse_arguments(argv)
    kernels.keep_compilations()
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
    except jax.errors.JaxRuntimeError as error:
        if args.distributed is None:
            raise
        text = str(error).splitlines()[0]
        full = "RESOURCE_EXHAUSTED" in text
        why = "no memory is left" if full else "another host ended, or cannot be reached"
        print(f"error: {why}: {text:.300}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # what JAX does at the end of a process waits for all others


if __name__ == "__main__":
    main()
