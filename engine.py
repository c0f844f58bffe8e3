"""Requests of many callers, served together: one thread owns an `InferenceRunner`.

A `Job` waits, is prefilled chunk by chunk, and then has a slot. Between two steps of those that
have one, one chunk of one prompt is computed: a long prompt delays the others by no more. What
comes of a job is called back from the engine's thread, a `Delta` at a time.
"""

import collections
import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import sentencepiece

import runners
import tokenizer

# --- The text of a job ----------------------------------------------------------------------------


class TokenText(NamedTuple):
    """What log-probabilities say of a token.

    logprob, top: of the token, and {text: logprob} of it and the likeliest; None for a first token,
        which nothing predicts
    offset: where it begins in the text
    """

    text: str
    logprob: float | None
    top: dict[str, float] | None
    offset: int


class Delta(NamedTuple):
    """Text that became certain, with the tokens that begin in it if these are wanted.

    finish: at the end, "stop" for [EOS] or a stop, "length" for enough tokens
    """

    text: str
    tokens: list[TokenText]
    finish: str | None


def token_text(processor: sentencepiece.SentencePieceProcessor, token: int) -> str:
    r"""The text of a token by itself; of a byte, as OpenAI writes it, such as `bytes:\xe2`."""
    piece = processor.id_to_piece(token)
    return rf"bytes:\x{piece[3:5].lower()}" if processor.is_byte(token) else piece.replace("▁", " ")


class Writer:
    """Tokens of a prompt, and of what continues it, to text that is never taken back.

    Text that may be the beginning of a stop is held until it is certain that it is not; a stop and
    what follows it are dropped.
    """

    def __init__(
        self,
        processor: sentencepiece.SentencePieceProcessor,
        eos: int,
        stop: Sequence[str] = (),
        echo: bool = False,
        logprobs: int | None = None,
    ):
        """
        stop: texts that end it, wherever they lie in tokens; none of them empty
        echo: whether the prompt is part of the text
        logprobs: how many of the likeliest tokens come with each; None for no tokens at all
        """
        self.processor = processor
        self.decoder = tokenizer.StreamDecoder(processor)
        self.eos, self.stop, self.echo, self.logprobs = eos, stop, echo, logprobs
        self.held = ""  # text that may be the beginning of a stop
        self.tokens: list[TokenText] = []  # those that begin in it
        self.length = 0  # of the text before it

    def prompt(self, tokens: Sequence[int], scores: runners.LogProbs | None, end: bool) -> Delta:
        """The prompt, empty unless it is echoed.

        scores: of all tokens but the first, if their log-probabilities are wanted
        end: whether nothing will follow
        """
        text = ""
        if not self.echo:
            for token in tokens[-8:]:  # what follows may finish a character, and begins no text
                self.decoder.push(token)
            return Delta("", [], "length" if end else None)
        for i, token in enumerate(map(int, tokens)):
            if i == 0:
                self._note(token, None, (), (), 0)
            elif scores is not None:
                self._note(token, *(x[i - 1] for x in scores), len(text))
            text += self.decoder.push(token)
        text += self.decoder.flush() if end else ""
        self.length = len(text)
        noted, self.tokens = self.tokens, []
        return Delta(text, noted, "length" if end else None)

    def push(self, token: runners.Token) -> Delta:
        """One more token, which has no error."""
        found = token.logprob, token.top_k_token_ids, token.top_k_logprobs
        self._note(token.token_id, *found, self.length + len(self.held))
        ended = token.token_id == self.eos
        self.held += "" if ended else self.decoder.push(token.token_id)
        self.held += self.decoder.flush() if token.done else ""
        ends = [end for stop in self.stop if (end := self.held.find(stop)) >= 0]
        if ends:
            size, finish = min(ends), "stop"
        elif token.done:
            size, finish = len(self.held), "stop" if ended else "length"
        else:
            size, finish = len(self.held) - self._beginning(), None
        text, self.held = self.held[:size], self.held[size:]
        self.length += size
        certain = [t for t in self.tokens if t.offset < self.length or (finish and not ends)]
        self.tokens = self.tokens[len(certain) :]
        return Delta(text, certain, finish)

    def _beginning(self) -> int:
        """How many characters at the end of what is held are the beginning of a stop."""
        held, sizes = self.held, [0]
        for stop in self.stop:
            longest = min(len(stop) - 1, len(held))
            sizes += [n for n in range(1, longest + 1) if held.endswith(stop[:n])]
        return max(sizes)

    def _note(self, token: int, logprob, ids, logprobs, offset: int) -> None:
        """Keeps what is wanted of a token: a NumPy number, and the likeliest ones."""
        if self.logprobs is None:
            return
        text = token_text(self.processor, token)
        if logprob is None:
            self.tokens.append(TokenText(text, None, None, offset))
            return
        likely = list(zip(map(int, ids), map(float, logprobs), strict=True))[: self.logprobs]
        top = {token_text(self.processor, i): p for i, p in likely} | {text: float(logprob)}
        self.tokens.append(TokenText(text, float(logprob), top, offset))


# --- The engine -----------------------------------------------------------------------------------


class Overloaded(Exception):
    """There is no room for more jobs."""


class Failed(Exception):
    """The model could not go on with a job."""


@dataclasses.dataclass(eq=False)
class Job:
    """A request, and what becomes of it.

    request: as `InferenceRunner.insert` takes it, with a prompt of tokens
    emit: is called with each Delta that has anything, the last of which has a `finish`; or at last
        with an exception, Failed or TimeoutError. After `cancel` only with what is on its way
    only_prompt: whether nothing is to follow the prompt; its `max_len` is then not read
    generated: tokens sampled so far
    """

    request: runners.Request
    writer: Writer
    emit: Callable[[Delta | Exception], None]
    only_prompt: bool = False
    generated: int = 0
    cancelled: bool = False
    deadline: float = math.inf
    started: runners.Prefill | None = None
    slot: int | None = None

    @property
    def scored(self) -> bool:
        """Whether log-probabilities of the prompt are wanted."""
        return self.writer.echo and self.writer.logprobs is not None

    def cancel(self) -> None:
        """Ends it when the engine next looks, wherever it is; nothing happens to an ended one."""
        self.cancelled = True


class Engine:
    """Serves jobs, first come first served, in a thread of its own, from `start` to `close`.

    generated: tokens of all jobs so far, but for those sampled after a stop
    errors: how often the model failed
    error: of its last call, if that failed; then no job can be expected to succeed
    """

    def __init__(
        self,
        inference: runners.InferenceRunner,
        queue: int = 64,
        timeout: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        queue: jobs that may wait while all slots are taken
        timeout: seconds that a job may take, waiting included; no call of the model is cut short
        """
        self.inference, self.queue, self.timeout, self.clock = inference, queue, timeout, clock
        self.generated, self.errors, self.error = 0, 0, None
        self._changed = threading.Condition()  # of what follows
        self._waiting: collections.deque[Job] = collections.deque()  # the first may have begun
        self._running: dict[int, Job] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

    @property
    def waiting(self) -> int:
        """Jobs that have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that have one."""
        return len(self._running)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Fails all jobs, once the call of the model that is in progress is over."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        for job in [*self._waiting, *self._running.values()]:
            self._end(job, Failed("the server is being stopped"))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Takes all of them, or raises Overloaded."""
        with self._changed:
            limit, taken = self.inference.num_slots + self.queue, self.waiting + self.running
            if taken + len(jobs) > limit or self._closed:
                raise Overloaded(
                    f"{taken} of {limit} places are taken, and this request needs {len(jobs)}; "
                    "try again later"
                )
            for job in jobs:
                job.deadline = self.clock() + self.timeout
            self._waiting.extend(jobs)
            self._changed.notify()

    # The rest is of the engine's thread.

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._closed)
                if self._closed:
                    return
            self._attempt([], self._drop_jobs)
            if job := self._prompt():
                self._attempt([job], lambda job=job: self._compute_chunk(job))
            if self._running:
                self._attempt([*self._running.values()], self._step)

    def _attempt(self, jobs: Sequence[Job], call: Callable[[], None]) -> None:
        """Calls the model; an error ends the jobs that this was for, and those that it took."""
        try:
            call()
            if jobs:
                self.error = None
        except Exception as error:
            logging.getLogger("engine").exception("the model failed")
            self.errors, self.error = self.errors + 1, f"{type(error).__name__}: {error}"
            lost = [job for slot, job in self._running.items() if slot not in self.inference.busy]
            for job in [*jobs, *lost]:
                self._end(job, Failed(f"the model failed: {self.error}"))
            if not self._running:
                self._test()

    def _test(self) -> None:
        """Finds out whether the model still works; all slots are free."""
        try:
            self.inference.warm_up([1])
            self.error = None
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"

    def _drop_jobs(self) -> None:
        """Those whose callers have gone, and those that took too long."""
        with self._changed:
            jobs, now = [*self._waiting, *self._running.values()], self.clock()
        for job in jobs:
            if job.cancelled:
                self._end(job)
            elif now > job.deadline:
                self._end(job, TimeoutError(f"it took longer than {self.timeout:g} seconds"))

    def _prompt(self) -> Job | None:
        """The job of which a chunk can be computed."""
        job = self._waiting[0] if self._waiting else None
        fits = job and (job.only_prompt or self.running < self.inference.num_slots)
        return job if fits else None

    def _compute_chunk(self, job: Job) -> None:
        """One chunk of its prompt; after the last one, it takes a slot."""
        if job.started is None:
            job.started = self.inference.start(job.request, job.scored)
        self.inference.prefill(job.started)
        if job.started.left:
            return
        scores = job.started.log_probs() if job.scored else None
        if scores and not np.isfinite(scores.logprob).all():
            self._end(job, Failed(runners.NOT_FINITE))
            return
        delta = job.writer.prompt(job.started.request.prompt, scores, end=job.only_prompt)
        if job.only_prompt:
            self._end(job, delta)
            return
        token = self.inference.insert_row(job.started)
        with self._changed:
            self._waiting.popleft()
            self._running[token.slot] = job
        job.started, job.slot = None, token.slot
        if delta.text or delta.tokens:
            job.emit(delta)
        self._give(job, token)

    def _step(self) -> None:
        """The next tokens; those of one step only, if a chunk of a prompt is to follow."""
        for token in self.inference.step(0 if self._prompt() else runners.GROUP_SECONDS):
            if job := self._running.get(token.slot):  # a text to stop at may have ended it
                self._give(job, token)

    def _give(self, job: Job, token: runners.Token) -> None:
        if token.error:
            self._end(job, Failed(str(token.error)))
            return
        self.generated += 1
        job.generated += 1
        delta = job.writer.push(token)
        if delta.finish:
            self._end(job, delta)
        elif delta.text or delta.tokens:
            job.emit(delta)

    def _end(self, job: Job, last: Delta | Exception | None = None) -> None:
        """Frees what a job has, and then emits what is the last of it; unless it has ended."""
        with self._changed:
            if self._running.get(job.slot) is job:
                del self._running[job.slot]
            elif job in self._waiting:
                self._waiting.remove(job)
            else:
                return
        job.started = None
        if job.slot is not None:
            with contextlib.suppress(Exception):  # of the device; the slot is free all the same
                self.inference.remove(job.slot)
        if last is not None:
            job.emit(last)
