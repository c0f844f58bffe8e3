"""The `bench` preset beside llama.cpp: the same ternary weights, as a GGUF file in TQ2_0.

Both are greedy, alone, on all cores, in one process; they take turns, and each turn waits until the
other's threads sleep. Of llama.cpp a token is a call of `llama_decode` and NumPy's argmax of the
logits; ours samples, with the probabilities of eight alternatives.
"""

import dataclasses
import functools
import os
import tempfile
import time
from pathlib import Path

import numpy as np

import model
import runners
from benchmarks import gguf, memory, timer
from benchmarks.models import DECODED, PROMPTS, make_runner, timing_of

INSTALL = "llama.cpp is not installed; pip install llama-cpp-python==0.3.36"
TABLES = {"F16": "float", "Q8_0": "int8"}  # llama.cpp's embedding tables, and ours beside them
ROUNDS = 7


def library():
    """llama-cpp-python's bindings, silent; ImportError, with the cure, where it is missing."""
    try:
        import llama_cpp
    except ImportError as error:
        raise ImportError(INSTALL) from error
    llama_cpp.llama_log_set(_ignore_log(llama_cpp), None)
    return llama_cpp


@functools.cache  # C keeps a pointer to it
def _ignore_log(llama_cpp):
    return llama_cpp.llama_log_callback(lambda level, text, data: None)


class LlamaCpp:
    """A model in a GGUF file and one sequence of tokens."""

    def __init__(self, path: Path, context: int, cache: str = "F16", threads: int | None = None):
        """context: most tokens of the sequence; cache: type of its keys and values, F16 or F32;
        threads: by default as many as there are cores"""
        self.lib = library()
        settings = self.lib.llama_model_default_params()
        settings.load_mode = self.lib.LLAMA_LOAD_MODE_NONE  # memory of its own, not a mapped file
        self.model = self.lib.llama_model_load_from_file(os.fsencode(path), settings)
        if not self.model:
            raise ValueError(f"llama.cpp cannot read {path}; run it there for its reasons")
        settings = self.lib.llama_context_default_params()
        settings.n_ctx = context
        settings.n_batch = settings.n_ubatch = min(context, 512)
        settings.n_threads = settings.n_threads_batch = threads or os.cpu_count()
        settings.type_k = settings.type_v = gguf.TYPES[cache]
        self.context = self.lib.llama_init_from_model(self.model, settings)
        if not self.context:
            raise ValueError(f"llama.cpp has no room for {context} tokens of {path}")
        vocab = self.lib.llama_model_get_vocab(self.model)
        self.vocab_size = self.lib.llama_vocab_n_tokens(vocab)

    def close(self) -> None:
        """Frees all memory; nothing else may be called then."""
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def clear(self) -> None:
        """Starts a new sequence."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)

    def feed(self, tokens: list[int]) -> np.ndarray:
        """Appends up to 512 tokens: the logits after the last one, float32 [V], until the next."""
        array = (self.lib.llama_token * len(tokens))(*tokens)
        status = self.lib.llama_decode(
            self.context, self.lib.llama_batch_get_one(array, len(tokens))
        )
        if status:
            raise ValueError(f"llama_decode of {len(tokens)} tokens gave {status}")
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, (self.vocab_size,))

    def timing(self, length: int, new: int) -> runners.Timing:
        """What a prompt of so many tokens and so many greedy ones took; see `models.timing_of`."""
        timing = runners.Timing(prefill_tokens=length, decode_tokens=new - 1)
        self.clear()
        begin = time.perf_counter()
        token = int(np.argmax(self.feed(list(range(5, 5 + length)))))
        timing.prefill_seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        for _ in range(new - 1):
            token = int(np.argmax(self.feed([token])))
        timing.decode_seconds = time.perf_counter() - begin
        return timing


# --- The comparison -------------------------------------------------------------------------------


def exported(runner: runners.ModelRunner, table: str) -> tuple[LlamaCpp, memory.Meter]:
    """The same model in llama.cpp, and a meter from before it was loaded."""
    config = runner.config
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        tensors = gguf.grok_tensors(config, runner.params, table=table)
        gguf.write(path, gguf.grok_keys(config), tensors)
        del tensors
        meter = memory.Meter()
        return LlamaCpp(path, config.sequence_len), meter


def memory_of(timing, meter: memory.Meter) -> dict:
    """Memory of a program that is loaded, over all that will be measured."""
    for _ in range(2):  # the first time compiles
        meter.read()
        for length, new in ((4, 4), *((n, 1) for n in PROMPTS)):
            timing(length, new)
    return meter.read()


def seconds_of(timing, prompt: int | None) -> float:
    """Of a prompt of so many tokens, or, None, of a decoded token; timing: as `LlamaCpp.timing`."""
    if prompt:
        return timing(prompt, 1).prefill_seconds
    spent = timing(4, DECODED)
    return spent.decode_seconds / spent.decode_tokens


def our_name(table: str) -> str:
    return f"ours, {TABLES[table]} table"


def compare(report, limits) -> None:
    """Rows of ours and of llama.cpp with each of TABLES, and how many times as fast ours is."""
    config = dataclasses.replace(model.PRESETS["bench"], fprop_dtype="bfloat16")
    meter = memory.Meter()
    runner = make_runner(config)
    programs, used, loaded = {}, {}, []
    for table, embeddings in TABLES.items():
        ours = runners.ModelRunner(dataclasses.replace(config, embeddings=embeddings))
        ours.params = runners.cast_embeddings(runner.params, ours.config)
        name = our_name(table)
        programs[name] = functools.partial(timing_of, runners.InferenceRunner(ours))
        used[name] = memory_of(programs[name], meter)
        llama, meter = exported(runner, table)
        loaded.append(llama)
        name = f"llama.cpp TQ2_0, {table} table"
        programs[name] = llama.timing
        used[name] = memory_of(llama.timing, meter)
        meter = memory.Meter()
    for prompt in (None, *PROMPTS):
        turns = {name: functools.partial(seconds_of, f, prompt) for name, f in programs.items()}
        for row in rows_of(timer.alternate(turns, ROUNDS), prompt):
            report(**row, **used[row["program"]])
    for llama in loaded:
        llama.close()


def rows_of(found: dict, prompt: int | None):
    """A row of medians for each program; `ours_is_faster` is a median of the rounds' ratios."""
    measure = f"prefill of {prompt}" if prompt else "decode"
    for program, seconds in found.items():
        middle = float(np.median(seconds))
        row = {"case": f"bench, {program}, {measure}", "program": program, "ms": middle * 1e3}
        row["tokens_per_s"] = (prompt or 1) / middle
        for table in TABLES:
            if program.endswith(f"{table} table"):
                row["ours_is_faster"] = float(np.median(seconds / found[our_name(table)]))
        yield row
