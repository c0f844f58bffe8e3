"""Serve a checkpoint with OpenAI's HTTP API: completions, with streams and log-probabilities.

    python serve.py --checkpoint checkpoints/demo --port 8000

`engine.py` runs the requests. Here they are read, checked and answered; the flags of the model are
those of `run.py`.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import hmac
import json
import os
import reprlib
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Set
from typing import Any, NamedTuple

import prometheus_client
import uvicorn
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import checkpoint
import engine
import kernels
import run
import runners
import tokenizer

KEY_VARIABLE = "TERNARY_GROK_API_KEY"
MAX_BODY = 4 << 20  # bytes
BODY_SECONDS = 30  # for a body to arrive
GRACE_SECONDS = 10  # for requests to end, once the server is to stop
LOOPBACK = ("127.0.0.1", "::1", "localhost")

# --- Requests -------------------------------------------------------------------------------------


class APIError(Exception):
    """What a caller is told, in OpenAI's format."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def json(self) -> dict:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        return JSONResponse(self.json(), self.status, self.headers)


def of_type(*types: type) -> Callable[[Any], bool]:
    """Whether a value is of one of these types; a bool is no int."""
    return lambda value: type(value) in types


def list_of(fine: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fine, value))


class Field(NamedTuple):
    """A field of a request: what it is when it is missing or null, what it must be, in words, and
    whether a value is that."""

    default: Any
    expected: str
    fine: Callable[[Any], bool]


whole, number, text, flag = of_type(int), of_type(int, float), of_type(str), of_type(bool)
ids = list_of(whole)
FIELDS = {
    "model": Field(None, "a text", text),
    "prompt": Field(
        "",
        "a text, a list of texts, token ids, or a list of these",
        lambda x: text(x) or bool(x) and (ids(x) or list_of(lambda y: text(y) or ids(y))(x)),
    ),
    "max_tokens": Field(16, "a whole number, 0 or more", lambda x: whole(x) and x >= 0),
    "temperature": Field(
        1.0, "a number, 0 or more", lambda x: number(x) and 0 <= x <= runners.FLOAT32_MAX
    ),
    "top_p": Field(1.0, "a number above 0, at most 1", lambda x: number(x) and 0 < x <= 1),
    "n": Field(1, "a whole number, 1 or more", lambda x: whole(x) and x >= 1),
    "seed": Field(None, "a whole number", whole),
    "stop": Field(
        [],
        "a text or a list of up to 4 texts, none of them empty",
        lambda x: (text(x) and x) or (list_of(text)(x) and len(x) <= 4 and all(x)),
    ),
    "logprobs": Field(None, "a whole number from 0 to 5", lambda x: whole(x) and 0 <= x <= 5),
    "echo": Field(False, "true or false", flag),
    "stream": Field(False, "true or false", flag),
    "stream_options": Field(
        {},
        '{"include_usage": true or false}',
        lambda x: (
            isinstance(x, dict) and x.keys() <= {"include_usage"} and all(map(flag, x.values()))
        ),
    ),
    "user": Field(None, "a text", text),  # theirs to tell, nothing that we use
}
UNSUPPORTED = {  # and the values that ask for nothing
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}


@dataclasses.dataclass(frozen=True)
class Completion:
    """A request that is fine, as `read_completion` makes it.

    requests: one for each choice, those of a prompt side by side; prompts are tokens
    prompt_tokens: of each prompt once
    only_prompt: whether no new tokens are wanted
    """

    requests: list[runners.Request]
    prompt_tokens: int
    only_prompt: bool
    stop: list[str]
    echo: bool
    logprobs: int | None
    stream: bool
    include_usage: bool


def read_fields(body: dict) -> dict:
    """The values of FIELDS, each of the kind that it must be; raises APIError."""
    for name in body:
        if name not in FIELDS and name not in UNSUPPORTED and name != "best_of":
            raise APIError(400, f"Unrecognized request argument supplied: {name!r:.100}")
    given = {name: value for name, value in body.items() if value is not None}
    for name, neutral in UNSUPPORTED.items():
        if name in given and given[name] not in neutral:
            raise APIError(400, f"{name} is not supported; leave it out", name)
    for name, field in FIELDS.items():
        if name in given and not field.fine(given[name]):
            found = reprlib.repr(given[name])
            raise APIError(400, f"{name} must be {field.expected}, got {found}", name)
    values = {name: given.get(name, field.default) for name, field in FIELDS.items()}
    if given.get("best_of", values["n"]) != values["n"]:
        raise APIError(400, "best_of is supported only where it is n; leave it out", "best_of")
    return values


def read_completion(body: dict, inference: runners.InferenceRunner, choices: int) -> Completion:
    """Checks a request, and encodes its prompts; raises APIError.

    choices: the most that one request may ask for
    """
    values = read_fields(body)
    prompts, stop, n, new = (values[name] for name in ("prompt", "stop", "n", "max_tokens"))
    prompts = [prompts] if text(prompts) or whole(prompts[0]) else prompts
    stop = [stop] if text(stop) else stop
    if len(prompts) * n > choices:
        raise APIError(
            400, f"{len(prompts)} prompts, n = {n} times, are more than {choices} choices", "n"
        )
    if not new and not values["echo"]:
        raise APIError(
            400, "max_tokens 0 needs echo: there is nothing else to answer", "max_tokens"
        )
    if values["stream_options"] and not values["stream"]:
        raise APIError(400, "stream_options is only allowed with stream", "stream_options")
    seed = secrets.randbits(32) if values["seed"] is None else values["seed"]
    requests, prompt_tokens = [], 0
    for prompt in prompts:
        try:
            tokens = inference.encode(prompt)
        except ValueError as error:
            raise APIError(400, f"prompt: {error}", "prompt") from None
        prompt_tokens += len(tokens)
        if len(tokens) + max(new, 1) > inference.sequence_len:
            raise APIError(
                400,
                f"This model's maximum context length is {inference.sequence_len} tokens; you "
                f"asked for {len(tokens)} of a prompt and {new} new ones (at least 1 must fit). "
                "Please reduce your prompt, or max_tokens.",
                "prompt",
                "context_length_exceeded",
            )
        requests += [
            runners.Request(
                tokens, values["temperature"], values["top_p"], (seed + i) % 2**32, max(new, 1)
            )
            for i in range(n)
        ]
    include_usage = values["stream_options"].get("include_usage", False)
    more = (values[name] for name in ("echo", "logprobs", "stream"))
    return Completion(requests, prompt_tokens, not new, stop, *more, include_usage)


async def read_json(request: Request) -> dict:
    """The object in a request's body; raises APIError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a page in a browser cannot send to another server
        raise APIError(415, f"Content-Type must be application/json, got {kind!r}")
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise APIError(413, f"the body is larger than {MAX_BODY} bytes")
    except TimeoutError:
        raise APIError(408, f"the body took longer than {BODY_SECONDS} seconds") from None
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise APIError(400, f"the body is no JSON: {error!s:.200}") from None
    if not isinstance(found, dict):
        raise APIError(400, f"the body must be a JSON object, got {reprlib.repr(found)}")
    return found


# --- Answers --------------------------------------------------------------------------------------


def logprobs_json(tokens: list[engine.TokenText]) -> dict:
    return {
        "tokens": [t.text for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [t.top for t in tokens],
        "text_offset": [t.offset for t in tokens],
    }


def choice_json(index: int, delta: engine.Delta, logprobs: bool) -> dict:
    """A choice, or part of one."""
    return {
        "text": delta.text,
        "index": index,
        "logprobs": logprobs_json(delta.tokens) if logprobs else None,
        "finish_reason": delta.finish,
    }


class Work:
    """The jobs of one request, from when they are submitted to when it is answered, or gives up."""

    def __init__(self, completion: Completion, served: engine.Engine):
        """Raises APIError if there is no room for them; needs a running event loop."""
        self.completion = completion
        self.events: asyncio.Queue = asyncio.Queue()
        self.parts: list[list[engine.Delta]] = [[] for _ in completion.requests]
        config, processor = served.inference.runner.config, served.inference.tokenizer
        settings = completion.stop, completion.echo, completion.logprobs
        self.jobs = [
            engine.Job(
                request,
                engine.Writer(processor, config.eos_token, *settings),
                functools.partial(self._emit, asyncio.get_running_loop(), index),
                completion.only_prompt,
            )
            for index, request in enumerate(completion.requests)
        ]
        try:
            served.submit(self.jobs)
        except engine.Overloaded as error:
            raise APIError(503, str(error), headers={"Retry-After": "1"}) from None

    def _emit(self, loop: asyncio.AbstractEventLoop, index: int, event) -> None:
        """Called by the engine; without a stream, the event loop need not wake for each token."""
        if not self.completion.stream and isinstance(event, engine.Delta):
            self.parts[index].append(event)
            if not event.finish:
                return
            texts, tokens, _ = zip(*self.parts[index], strict=True)
            event = event._replace(text="".join(texts), tokens=[t for part in tokens for t in part])
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

    async def deltas(self) -> AsyncIterator[tuple[int, engine.Delta]]:
        """(number of the choice, what became certain of it), up to the end of all; raises
        APIError."""
        left = len(self.jobs)
        while left:
            index, event = await self.events.get()
            if isinstance(event, TimeoutError):
                raise APIError(504, str(event), code="timeout")
            if isinstance(event, Exception):
                raise APIError(500, str(event))
            yield index, event
            left -= event.finish is not None

    def usage(self) -> dict:
        new, old = sum(job.generated for job in self.jobs), self.completion.prompt_tokens
        return {"prompt_tokens": old, "completion_tokens": new, "total_tokens": old + new}

    def close(self) -> None:
        """Whatever has not ended is to end."""
        for job in self.jobs:
            job.cancel()


class Events(StreamingResponse):
    """Server-sent events, whose work ends with them, also when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[str], work: Work):
        super().__init__(content, headers={"Cache-Control": "no-cache"})
        self.work = work

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.work.close()


def event(value: dict) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def unless_gone(request: Request, coroutine: Coroutine) -> Any:
    """Awaits a coroutine; ClientDisconnect, and it is cancelled, if the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(coroutine), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


# --- The server -----------------------------------------------------------------------------------


class Metrics:
    """What /metrics says: of requests as they are answered, of the engine as it is asked."""

    def __init__(self, served: engine.Engine):
        self.engine = served
        self.registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "ternary_grok_requests", "Answers, by path and status", ("path", "status"),
            registry=self.registry,
        )  # fmt: skip
        self.prompt_tokens = prometheus_client.Counter(
            "ternary_grok_prompt_tokens", "Tokens of prompts", registry=self.registry
        )
        times = 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000
        self.first, self.whole = (
            prometheus_client.Histogram(name, text, buckets=times, registry=self.registry)
            for name, text in (
                ("ternary_grok_first_text_seconds", "From a request to what is first sent of it"),
                ("ternary_grok_completion_seconds", "From a request to the end of its answer"),
            )
        )
        self.registry.register(self)

    def collect(self):
        gauge, counter, e = GaugeMetricFamily, CounterMetricFamily, self.engine
        yield gauge(
            "ternary_grok_slots", "Requests that can decode together", e.inference.num_slots
        )
        yield gauge("ternary_grok_running", "Choices that have a slot", e.running)
        yield gauge("ternary_grok_waiting", "Choices that wait, or are prefilled", e.waiting)
        yield counter("ternary_grok_generated_tokens", "Tokens sampled", e.generated)
        yield counter("ternary_grok_errors", "How often the model failed", e.errors)


class Guard:
    """An ASGI app around another: asks for the key, but for /health, and counts the answers."""

    def __init__(self, app, metrics: Metrics, paths: Set[str], api_key: str | None):
        self.app, self.metrics, self.paths, self.api_key = app, metrics, paths, api_key

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def counted(message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        given = dict(scope["headers"]).get(b"authorization", b"")
        app = self.app
        if self.api_key is not None and path != "/health":
            expected = b"Bearer " + self.api_key.encode()
            if not hmac.compare_digest(given, expected):
                app = APIError(
                    401,
                    "Incorrect or no API key provided: send it as 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                ).response()
        await app(scope, receive, counted)


class API:
    """The endpoints of an engine, whose model callers know by a name."""

    def __init__(self, served: engine.Engine, name: str):
        self.engine, self.name, self.created = served, name, int(time.time())
        self.inference = served.inference
        self.metrics = Metrics(served)

    async def completions(self, request: Request) -> Response:
        begin = time.perf_counter()
        body = await read_json(request)
        self._check_model(body.get("model"))
        completion = await asyncio.to_thread(
            read_completion, body, self.inference, max(1, self.engine.queue)
        )
        work = Work(completion, self.engine)
        self.metrics.prompt_tokens.inc(completion.prompt_tokens)
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.name,
        }
        deltas = self._timed(work.deltas(), begin)
        if completion.stream:
            return Events(self._stream(head, work, deltas), work)
        try:
            return await unless_gone(request, self._whole(head, work, deltas))
        finally:
            work.close()

    async def _timed(self, deltas: AsyncIterator, begin: float) -> AsyncIterator:
        first = True
        async for item in deltas:
            if first:
                self.metrics.first.observe(time.perf_counter() - begin)
            first = False
            yield item
        self.metrics.whole.observe(time.perf_counter() - begin)

    async def _whole(self, head: dict, work: Work, deltas: AsyncIterator) -> Response:
        wanted = work.completion.logprobs is not None
        found = [choice_json(index, delta, wanted) async for index, delta in deltas]
        choices = sorted(found, key=lambda choice: choice["index"])
        return JSONResponse(head | {"choices": choices, "usage": work.usage()})

    async def _stream(self, head: dict, work: Work, deltas: AsyncIterator) -> AsyncIterator[str]:
        usage = {"usage": None} if work.completion.include_usage else {}
        wanted = work.completion.logprobs is not None
        try:
            async for index, delta in deltas:
                yield event(head | {"choices": [choice_json(index, delta, wanted)]} | usage)
        except APIError as error:
            yield event(error.json())
            return
        if usage:
            yield event(head | {"choices": [], "usage": work.usage()})
        yield "data: [DONE]\n\n"

    def _check_model(self, name: Any) -> None:
        if name is None:
            raise APIError(400, "you must provide a model parameter", "model")
        if name != self.name:
            raise APIError(
                404,
                f"The model {reprlib.repr(name)} does not exist; this server has {self.name!r}",
                "model",
                "model_not_found",
            )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict:
        about = {"object": "model", "created": self.created, "owned_by": "ternary-grok"}
        return {"id": self.name} | about

    async def tokenize(self, request: Request) -> Response:
        """As in vLLM; [BOS] and the like are a token if they are all of the text."""
        prompt = (await read_json(request)).get("prompt")
        if not text(prompt):
            raise APIError(400, f"prompt must be a text, got {reprlib.repr(prompt)}", "prompt")
        try:
            encoded = await asyncio.to_thread(self.inference.encode, prompt)
        except ValueError as error:
            raise APIError(400, str(error), "prompt") from None
        processor = self.inference.tokenizer
        token = processor.piece_to_id(prompt)
        tokens = [token] if processor.is_control(token) else encoded.tolist() if prompt else []
        found = {"count": len(tokens), "max_model_len": self.inference.sequence_len}
        return JSONResponse(found | {"tokens": tokens})

    async def tokenizer_info(self, request: Request) -> Response:
        pieces = map(self.inference.tokenizer.id_to_piece, (tokenizer.BOS, tokenizer.EOS))
        return JSONResponse(dict(zip(("bos_token", "eos_token"), pieces, strict=True)))

    async def health(self, request: Request) -> Response:
        e = self.engine
        state = {"status": "failing" if e.error else "ok", "error": e.error, "errors": e.errors}
        return JSONResponse(
            state | {"running": e.running, "waiting": e.waiting}, 503 if e.error else 200
        )

    async def metrics_text(self, request: Request) -> Response:
        text = prometheus_client.generate_latest(self.metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)


def make_app(served: engine.Engine, name: str, api_key: str | None = None) -> Guard:
    """The ASGI app of an engine that was started."""
    api = API(served, name)
    routes = [
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{name}", api.model),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/tokenizer_info", api.tokenizer_info),
        Route("/health", api.health),
        Route("/metrics", api.metrics_text),
    ]

    async def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            return Response(status_code=499)  # which nobody reads
        if isinstance(error, HTTPException):
            message = f"{request.method} {request.url.path}: {error.detail}"
            error = APIError(error.status_code, message, headers=error.headers)
        if not isinstance(error, APIError):
            error = APIError(500, "an error of the server, whose log has more of it")
        return error.response()

    handlers = dict.fromkeys((APIError, HTTPException, ClientDisconnect, Exception), refused)
    app = Starlette(routes=routes, exception_handlers=handlers)
    return Guard(app, api.metrics, {route.path for route in routes}, api_key)


# --- The command ----------------------------------------------------------------------------------


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    run.add_model_arguments(parser, str(run.MAX_SLOTS))
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add(
        "--port",
        type=run.at_least(0, 65535),
        default=8000,
        help="0 for any that is free (%(default)s)",
    )
    add("--model-name", help="what requests call the model (the checkpoint folder's name)")
    add(
        "--api-key",
        default=os.environ.get(KEY_VARIABLE),
        help=f"what requests must give (the variable {KEY_VARIABLE}, which no other user sees)",
    )
    add(
        "--queue",
        type=run.at_least(1),
        default=64,
        help="choices that may wait for a slot, and that one request may ask for (%(default)s)",
    )
    add(
        "--timeout",
        type=run.at_least(1),
        default=600,
        help="seconds that a request may take, waiting included (%(default)s)",
    )
    return parser.parse_args(argv)


def bind(host: str, port: int) -> socket.socket:
    """A socket that nobody can connect to yet; ValueError if the address is not to be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port} ({error}); choose another") from None
    return bound


class Server(uvicorn.Server):
    """Runs an ASGI app, and says where it listens once it does."""

    def __init__(self, app):
        grace = {"timeout_graceful_shutdown": GRACE_SECONDS}
        kind = {"http": "h11", "loop": "asyncio", "ws": "none", "lifespan": "off"}
        super().__init__(uvicorn.Config(app, log_level="warning", **kind, **grace))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        run.report(url=f"http://{f'[{host}]' if ':' in host else host}:{port}/v1")


def serve(args: argparse.Namespace) -> None:
    if args.api_key == "":
        raise ValueError(f"the API key is empty; give another one, or none: unset {KEY_VARIABLE}")
    bound = bind(args.host, args.port)  # before what takes minutes
    checkpoint.check_folder(args.checkpoint)
    inference = run.prepare(args, run.MAX_SLOTS, scored=True)
    if args.host not in LOOPBACK and not args.api_key:
        run.report(note=f"anybody who reaches {args.host} can use this: set {KEY_VARIABLE}")
    run.load(args, inference.runner)
    run.report(compile=f"prompts of up to {inference.sequence_len} tokens, before it listens")
    begin = time.perf_counter()
    inference.warm_up(inference.pad_sizes, scored=True)
    run.report(compile=f"{time.perf_counter() - begin:.1f} s")

    served = engine.Engine(inference, args.queue, args.timeout)
    served.start()
    name = args.model_name or args.checkpoint.resolve().name
    try:
        Server(make_app(served, name, args.api_key)).run([bound])
    except KeyboardInterrupt:
        run.report(stop="all requests have ended")
    finally:
        served.close()


def main(argv=None) -> None:
    args = parse_arguments(argv)
    kernels.keep_compilations()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")


if __name__ == "__main__":
    main()
