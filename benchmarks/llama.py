"""The `bench` preset beside llama.cpp and ik_llama.cpp: the same ternary weights, as GGUF files.

All are greedy and on all cores. They take turns, and each turn waits until the others' threads
sleep. Of a peer a step is `llama_decode` and NumPy's argmax of the logits; ours samples, with the
probabilities of eight alternatives. Peers have processes of their own, with large pages.
"""

import contextlib
import ctypes
import dataclasses
import functools
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from operator import methodcaller
from pathlib import Path

import numpy as np

import gguf_file
import gguf_grok
import model
import runners
from benchmarks import memory, models, timer
from benchmarks.models import DECODED, PROMPTS, make_runner, timing_of
from kernels import building

INSTALL = "llama.cpp is not installed; pip install llama-cpp-python==0.3.36"
IK_SOURCE = Path(__file__).with_name("ik_llama.cc")
IK_LIBRARY = Path("build/src/libllama.so")
IK_HEADERS = ("include", "ggml/include")
TABLES = {"F16": "float", "Q8_0": "int8"}  # peers' embedding tables, and ours beside them
CALL = 512  # most tokens of a call
BATCHES = (8, 32)  # sequences that decode together
START, STEPS = 8, 8  # tokens of their prompts, and decode steps
ROUNDS = 5
CONFIG = dataclasses.replace(model.PRESETS["bench"], fprop_dtype="bfloat16")
# Of peers' processes: large pages for what malloc gives out, and JAX leaves accelerators alone.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "JAX_PLATFORMS": "cpu"}


# --- llama.cpp ------------------------------------------------------------------------------------


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
    """A model in a GGUF file, and one or more sequences of tokens, until the process ends."""

    NAME = "llama.cpp"

    def __init__(self, path: Path, context: int, cache: str = "F16", threads: int | None = None):
        """context: most tokens of all sequences together; cache: type of their keys and values, F16
        or F32; threads: by default as many as there are cores"""
        self.meter = memory.Meter()
        self.room, self.cache, self.threads = context, cache, threads or os.cpu_count()
        self.lib = self._library()
        self.model = self._open(os.fsencode(path))
        if not self.model:
            raise ValueError(f"{self.NAME} cannot read {path}; run it there for its reasons")
        self.vocab_size = self._vocab_size()
        self.contexts = {}
        self.start()

    def start(self, sequences: int = 1) -> None:
        """Starts so many new sequences, in place of all others."""
        if sequences not in self.contexts:
            context = self._new_context(sequences)
            if not context:
                raise ValueError(f"{self.NAME} has no room for {self.room} tokens")
            self.contexts[sequences] = context
        self.context = self.contexts[sequences]
        self._clear()
        self.lengths = np.zeros(sequences, np.int32)

    def feed(self, tokens: list[int], sequence: int = 0) -> np.ndarray:
        """Appends up to 512 tokens: the logits after the last one, float32 [V], until the next."""
        count = len(tokens)
        positions = self.lengths[sequence] + np.arange(count)
        self._append(tokens, positions, np.full(count, sequence), np.arange(count) == count - 1)
        self.lengths[sequence] += count
        return self._row(count - 1)

    def step(self, tokens: list[int]) -> list[int]:
        """Appends one token to each sequence; the likeliest next ones."""
        count = len(self.lengths)
        self._append(tokens, self.lengths, np.arange(count), np.ones(count))
        self.lengths += 1
        return [int(np.argmax(self._row(i))) for i in range(count)]

    def _append(self, tokens, positions, sequences, wanted) -> None:
        """llama_decode; `wanted` says after which tokens there shall be logits."""
        arrays = [np.asarray(array, np.int32) for array in (tokens, positions, sequences)]
        status = self._decode(*arrays, np.asarray(wanted, np.int8))
        if status:
            raise ValueError(f"llama_decode of {len(tokens)} tokens gave {status}")

    def _row(self, i: int) -> np.ndarray:
        """The logits after token i of the last call."""
        return np.ctypeslib.as_array(self._logits(i), (self.vocab_size,))

    # What is measured.

    def timing(self, length: int, new: int) -> runners.Timing:
        """What a prompt of so many tokens and so many greedy ones took; see `models.timing_of`."""
        timing = runners.Timing(prefill_tokens=length, decode_tokens=new - 1)
        self.start()
        begin = time.perf_counter()
        token = int(np.argmax(self.feed(list(range(5, 5 + length)))))
        timing.prefill_seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        for _ in range(new - 1):
            (token,) = self.step([token])
        timing.decode_seconds = time.perf_counter() - begin
        return timing

    def step_seconds(self, sequences: int) -> float:
        """Mean seconds of STEPS steps of so many sequences, after prompts of START tokens."""
        self.start(sequences)
        tokens = [int(np.argmax(self.feed(prompt(i), i))) for i in range(sequences)]
        begin = time.perf_counter()
        for _ in range(STEPS):
            tokens = self.step(tokens)
        return (time.perf_counter() - begin) / STEPS

    def memory(self) -> dict:
        """Its memory over prompts and decoding, with the model; see `memory.Meter`."""
        return memory_of(self.timing, self.meter)

    # The library's functions.

    def _library(self):
        return library()

    def _open(self, path: bytes):
        settings = self.lib.llama_model_default_params()
        settings.load_mode = self.lib.LLAMA_LOAD_MODE_NONE  # memory of its own, not a mapped file
        return self.lib.llama_model_load_from_file(path, settings)

    def _vocab_size(self) -> int:
        return self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))

    def _new_context(self, sequences: int):
        settings = self.lib.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = self.room, sequences
        settings.n_batch = settings.n_ubatch = min(self.room, CALL)
        settings.n_threads = settings.n_threads_batch = self.threads
        settings.type_k = settings.type_v = gguf_file.NUMBERS[self.cache]
        return self.lib.llama_init_from_model(self.model, settings)

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)

    def _decode(self, tokens, positions, sequences, wanted) -> int:
        batch, count = self.lib.llama_batch(), len(tokens)
        arrays = {
            "token": tokens,
            "pos": positions,
            "n_seq_id": np.ones(count, np.int32),
            "seq_id": sequences.ctypes.data + 4 * np.arange(count, dtype=np.uintp),  # pointers
            "logits": wanted,
        }
        batch.n_tokens = count
        for name, array in arrays.items():
            pointer = type(getattr(batch, name))
            setattr(batch, name, ctypes.cast(array.ctypes.data, pointer))
        return self.lib.llama_decode(self.context, batch)

    def _logits(self, i: int):
        return self.lib.llama_get_logits_ith(self.context, i)


# --- ik_llama.cpp ---------------------------------------------------------------------------------


def check_ik_llama(folder: Path) -> None:
    """FileNotFoundError, with the cure, unless ik_llama.cpp was built in a folder."""
    if not (folder / IK_LIBRARY).exists():
        raise FileNotFoundError(
            f"{folder} has no {IK_LIBRARY}; build ik_llama.cpp in a clone of it, as README.md says"
        )


class IkLlama(LlamaCpp):
    """The same in ik_llama.cpp, which arranges matrices for its own products as it loads them.

    Its libraries have the names of llama.cpp's: one process can use only one of the two. For Grok
    it takes no cache but F16.
    """

    NAME = "ik_llama.cpp"

    def __init__(self, folder: Path, *args, **options):
        """folder: a clone in which it was built; the rest as of LlamaCpp"""
        check_ik_llama(folder)
        self.folder = folder.resolve()
        super().__init__(*args, **options)

    def _library(self):
        folder = (self.folder / IK_LIBRARY).parent
        links = [f"-L{folder}", "-lllama", f"-Wl,-rpath,{folder}"]
        headers = [f"-I{self.folder / name}" for name in IK_HEADERS]
        with tempfile.TemporaryDirectory() as target:
            path = f"{target}/ik_llama.so"
            command = [*building.compiler(), *building.FLAGS, *headers, "-shared", str(IK_SOURCE)]
            done = subprocess.run([*command, "-o", path, *links], capture_output=True, text=True)
            if done.returncode:
                raise OSError(f"{IK_SOURCE.name} does not fit {self.folder}: {done.stderr}")
            lib = ctypes.CDLL(path)
        number, pointer = ctypes.c_int32, ctypes.c_void_p
        lib.Open.restype = lib.NewContext.restype = pointer
        lib.Logits.restype = ctypes.POINTER(ctypes.c_float)
        lib.Open.argtypes = [ctypes.c_char_p]
        lib.NewContext.argtypes = [pointer, *[number] * 5]
        lib.Decode.argtypes = [pointer, number, *[pointer] * 4]
        lib.Logits.argtypes = [pointer, number]
        for name in ("VocabularySize", "Clear"):
            getattr(lib, name).argtypes = [pointer]
        return lib

    def _open(self, path: bytes):
        return self.lib.Open(path)

    def _vocab_size(self) -> int:
        return self.lib.VocabularySize(self.model)

    def _new_context(self, sequences: int):
        call, cache = min(self.room, CALL), gguf_file.NUMBERS[self.cache]
        return self.lib.NewContext(self.model, self.room, call, sequences, self.threads, cache)

    def _clear(self) -> None:
        self.lib.Clear(self.context)

    def _decode(self, *arrays) -> int:
        pointers = (array.ctypes.data for array in arrays)
        return self.lib.Decode(self.context, len(arrays[0]), *pointers)

    def _logits(self, i: int):
        return self.lib.Logits(self.context, i)


# --- Processes ------------------------------------------------------------------------------------


class Process:
    """A LlamaCpp or IkLlama in a process of its own."""

    def __init__(self, kind: type[LlamaCpp], *args, **options):
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            with _environment(ENVIRONMENT):
                self._pool.submit(_make, kind, args, options).result()
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *args):
        """What a method gives there, or its error."""
        return self._pool.submit(_call, method, args).result()

    def close(self) -> None:
        """Ends the process."""
        self._pool.shutdown()


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _make(kind, args, options) -> None:
    global _mine
    _mine = kind(*args, **options)


def _call(method: str, args):
    return getattr(_mine, method)(*args)


# --- Those that take turns ------------------------------------------------------------------------


@dataclasses.dataclass
class Program:
    """One of those that take turns.

    name, table: of TABLES; timing, step_seconds, memory: as of LlamaCpp; read: bytes of weights
    that a step of so many tokens needs; close: ends it
    """

    name: str
    table: str
    timing: Callable[[int, int], runners.Timing]
    step_seconds: Callable[[int], float]
    memory: Callable[[], dict]
    read: Callable[[int], float]
    close: Callable[[], None] = lambda: None

    def seconds(self, length: int | None) -> float:
        """Of a prompt of so many tokens, or, None, of a decoded token."""
        if length:
            return self.timing(length, 1).prefill_seconds
        spent = self.timing(4, DECODED)
        return spent.decode_seconds / spent.decode_tokens


def our_name(table: str) -> str:
    return f"ours, {TABLES[table]} table"


def prompt(seed: int) -> list[int]:
    """START tokens, so that sequences take different experts."""
    return np.random.default_rng(seed).integers(5, 1000, START).tolist()


def memory_of(timing: Callable[[int, int], runners.Timing], meter: memory.Meter) -> dict:
    """Memory of a program that is loaded, over prompts and decoding."""
    for _ in range(2):  # the first time compiles
        meter.read()
        for length, new in ((4, 4), *((n, 1) for n in PROMPTS)):
            timing(length, new)
    return meter.read()


def our_program(table: str) -> tuple[Program, dict]:
    """Ours with one of TABLES, and its parameters."""
    meter = memory.Meter()
    runner = make_runner(dataclasses.replace(CONFIG, embeddings=TABLES[table]))
    timing = functools.partial(timing_of, runners.InferenceRunner(runner))

    @functools.cache
    def batch(sequences: int) -> runners.InferenceRunner:
        return runners.InferenceRunner(runner, None, sequences, 2 * (START + STEPS))

    return Program(
        our_name(table),
        table,
        timing,
        lambda sequences: our_step_seconds(batch(sequences)),
        functools.partial(memory_of, timing, meter),
        functools.partial(models.step_bytes, runner),
    ), runner.params


def our_step_seconds(inference: runners.InferenceRunner) -> float:
    """As LlamaCpp.step_seconds, of as many requests as there are slots."""
    for i in range(inference.num_slots):
        inference.insert(runners.Request(prompt(i), 0.0, max_len=STEPS + 1))
    inference.timing = runners.Timing()
    while inference.busy:
        inference.step(runners.GROUP_SECONDS)
    return inference.timing.decode_seconds * inference.num_slots / inference.timing.decode_tokens


def step_bytes(
    config: model.LanguageModelConfig, tensors: dict[str, gguf_file.Tensor], tokens: int = 1
) -> float:
    """Bytes of weights that a step of so many tokens reads; see `models.expert_share`."""
    share = models.expert_share(config, tokens)
    return sum(
        tensor.bytes * (share if "_exps." in name else 1) for name, tensor in tensors.items()
    )


def peer_program(kind, matrices: str, table: str, params: dict, *options) -> Program:
    """A model of a peer, with matrices and a table of these types, in its process."""
    tensors = gguf_grok.of_params(CONFIG, params, matrices, table)
    steps = {n: step_bytes(CONFIG, tensors, n) for n in (1, *BATCHES)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        gguf_file.write(path, gguf_grok.grok_keys(CONFIG), tensors)
        del tensors
        process = Process(kind, *options, path, CONFIG.sequence_len)
    return Program(
        f"{kind.NAME} {matrices}, {table} table",
        table,
        *(functools.partial(process.call, name) for name in ("timing", "step_seconds", "memory")),
        steps.__getitem__,
        process.close,
    )


@contextlib.contextmanager
def loaded(ik_llama: Path | None, tables: Iterable[str]) -> Iterator[list[Program]]:
    """Ours and all peers with each of these TABLES; ik_llama: the folder of IkLlama, or None."""
    peers = [(LlamaCpp, "TQ2_0"), (LlamaCpp, "Q4_0")]
    peers += [(IkLlama, "IQ2_BN", ik_llama)] if ik_llama else []
    programs = []
    with contextlib.ExitStack() as stack:
        for table in tables:
            ours, params = our_program(table)
            programs.append(ours)
            for kind, matrices, *options in peers:
                made = peer_program(kind, matrices, table, params, *options)
                stack.callback(made.close)
                programs.append(made)
        yield programs


# --- The comparison -------------------------------------------------------------------------------


def versions(ik_llama: Path | None = None) -> dict[str, str]:
    """Those of the peers; ImportError or FileNotFoundError, with the cure, where one is missing."""
    found = {"llama-cpp-python": library().__version__}
    if ik_llama:
        check_ik_llama(ik_llama)
        command = ["git", "-C", str(ik_llama), "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True)
        found["ik_llama.cpp"] = done.stdout.strip() or "of an unknown commit"
    return found


def turns(programs: list[Program], measure) -> Iterator[tuple[Program, float, dict]]:
    """(program, its median seconds, beside ours) of programs that are measured in turns.

    `ours_is_faster` is the median of the rounds' ratios to ours with the same table.
    """
    found = timer.alternate({p.name: functools.partial(measure, p) for p in programs}, ROUNDS)
    for program in programs:
        seconds, ours = found[program.name], found[our_name(program.table)]
        ratio = {} if seconds is ours else {"ours_is_faster": float(np.median(seconds / ours))}
        yield program, float(np.median(seconds)), ratio


def compare(report, limits, ik_llama: Path | None = None, tables=TABLES) -> None:
    """Rows of a decoded token and of PROMPTS."""
    with loaded(ik_llama, tables) as programs:
        used = {program.name: program.memory() for program in programs}
        for length in (None, *PROMPTS):
            measure = f"prefill of {length}" if length else "decode"
            for program, seconds, ratio in turns(programs, methodcaller("seconds", length)):
                if length:
                    row = models.prefill_row(CONFIG, length, seconds, limits)
                else:
                    row = models.decode_row(program.read(1), seconds, limits)
                case = f"bench, {program.name}, {measure}"
                report(case=case, program=program.name, **row, **ratio, **used[program.name])


def compare_batches(report, limits, ik_llama: Path | None = None, tables=TABLES) -> None:
    """Rows of a step of each of BATCHES."""
    with loaded(ik_llama, tables) as programs:
        for count in BATCHES:
            for program, seconds, ratio in turns(programs, methodcaller("step_seconds", count)):
                row = models.prefill_row(CONFIG, count, seconds, limits, program.read(count))
                case = f"bench, {program.name}, batch of {count}"
                report(case=case, program=program.name, **row, **ratio)


PARTS = {"llama-cpp": compare, "llama-cpp-batches": compare_batches}
