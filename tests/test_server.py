"""The server: what it answers, whom it refuses, and that requests do not disturb one another.

Most run a toy with few slots behind a real socket; what happens when is told by counting calls of
the model and by holding them, never by the clock.
"""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import importlib.util
import itertools
import json
import math
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from factories import ODD, random_params

import checkpoint
import engine
import evaluate
import runners
import serve
import tokenizer

ROOT = Path(__file__).parent.parent
CONFIG = dataclasses.replace(ODD, num_layers=1, vocab_size=1024, sequence_len=96)
CHUNK, SLOTS = 8, 3


@pytest.fixture(scope="module")
def processor():
    return tokenizer.load(None, CONFIG.vocab_size)


@pytest.fixture(scope="module")
def runner():
    runner = runners.ModelRunner(CONFIG)
    runner.params = random_params(CONFIG)
    return runner


@pytest.fixture(scope="module")
def inference(runner, processor):
    inference = runners.InferenceRunner(runner, processor, SLOTS, pad_sizes=(CHUNK,))
    inference.warm_up([CHUNK], scored=True)
    return inference


@pytest.fixture(scope="module")
def alone(runner, processor):
    """A request -> its text, and why it ended, through runners alone."""
    inference = runners.InferenceRunner(runner, processor, 1, pad_sizes=(CHUNK,))

    def text(request, stop=()):
        decoder, found = tokenizer.StreamDecoder(processor), ""
        for token in inference.prompt_tokens(request):
            decoder.push(token)
        with contextlib.closing(inference.generate([request])) as generated:
            for _, token in generated:
                ended = token.token_id == CONFIG.eos_token
                found += "" if ended else decoder.push(token.token_id)
                found += decoder.flush() if token.done else ""
                if cuts := [found.find(one) for one in stop if one in found]:
                    return found[: min(cuts)], "stop"
        return found, "stop" if ended else "length"

    return text


# --- A client -------------------------------------------------------------------------------------


class Client:
    """Talks to a server, a connection for each request."""

    def __init__(self, served: engine.Engine, port: int):
        self.engine, self.port = served, port

    @contextlib.contextmanager
    def open(self, path, body=None, headers=()):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        method = "GET" if body is None else "POST"
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | dict(headers)
        connection.request(method, path, data, headers)
        try:
            yield connection
        finally:
            connection.close()

    def ask(self, path, body=None, **headers):
        """Status, headers and JSON (or text) of an answer."""
        with self.open(path, body, headers) as connection:
            answer = connection.getresponse()
            text = answer.read().decode()
            kind = answer.headers["Content-Type"]
            return answer.status, answer.headers, json.loads(text) if "json" in kind else text

    def complete(self, **fields):
        status, _, found = self.ask("/v1/completions", {"model": "toy"} | fields)
        assert status == 200, found
        return found

    def stream(self, **fields):
        """The events of a stream, [DONE] included as a text."""
        fields = {"model": "toy", "stream": True} | fields
        status, headers, text = self.ask("/v1/completions", fields)
        assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
        events = text.split("\n\n")
        assert events.pop() == "" and all(event.startswith("data: ") for event in events)
        return [json.loads(e[6:]) if e != "data: [DONE]" else "[DONE]" for e in events]


@contextlib.contextmanager
def serving(inference, api_key=None, **settings):
    """A server in a thread, and a client of it."""
    served = engine.Engine(inference, **settings)
    bound = serve.bind("127.0.0.1", 0)
    server = serve.Server(serve.make_app(served, "toy", api_key))
    thread = threading.Thread(target=server.run, args=([bound],))
    served.start()
    thread.start()
    until(lambda: server.started)
    try:
        yield Client(served, bound.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
        served.close()
    assert not inference.busy and not served.running and not served.waiting


def until(true):
    """Waits until something is true, which it must be soon."""
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(scope="module")
def client(inference):
    with serving(inference) as client:
        yield client


class Gate:
    """Holds a method of `inference` before it does anything, until `open`, or the end of a block;
    keeps the jobs of a client's server."""

    def __init__(self, monkeypatch, inference, name, client):
        self.reached, self.opened, self.jobs = threading.Event(), threading.Event(), []
        function, submit = getattr(inference, name), client.engine.submit

        def held(*args):
            self.reached.set()
            assert self.opened.wait(30)
            return function(*args)

        def kept(jobs):
            submit(jobs)
            self.jobs += jobs

        monkeypatch.setattr(inference, name, held)
        monkeypatch.setattr(client.engine, "submit", kept)

    def open(self):
        self.opened.set()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.open()


# --- Text and stops, without a model --------------------------------------------------------------


def tokens_of(processor, text, last=None):
    """The tokens of a text as a model would give them, each with probability 1/2; and [EOS]."""
    ids = [*processor.encode(text), *([CONFIG.eos_token] if last is None else [])]
    top = np.array([5, 6]), np.log(np.array([0.25, 0.125], np.float32))
    half = float(np.log(0.5))
    return [
        runners.Token(0, i, 0.5, top[0], top[1], half, top[1], number == len(ids) - 1)
        for number, i in enumerate(ids)
    ]


def written(writer, tokens):
    deltas = []
    for token in tokens:
        deltas.append(writer.push(token))
        if deltas[-1].finish:
            break
    return deltas


@pytest.mark.parametrize(
    "text, stop, expected, finish",
    [
        ("To be, or not to be", ["not"], "To be, or ", "stop"),
        ("To be, or not to be", [", or not to"], "To be", "stop"),  # over several tokens
        ("To be, or not to be", ["be.", "x"], "To be, or not to be", "stop"),  # [EOS]
        ("aaab", ["aab"], "a", "stop"),
        ("To be, or not", ["or", "be"], "To ", "stop"),
        ("To be", ["To be"], "", "stop"),
        ("To be", ["o", "T"], "", "stop"),  # both in one token
        ("To be, or", ["e,"], "To b", "stop"),
        ("naïve café €", ["€"], "naïve café ", "stop"),  # within bytes
    ],
)
def test_stops(processor, text, stop, expected, finish):
    deltas = written(engine.Writer(processor, CONFIG.eos_token, stop), tokens_of(processor, text))
    assert "".join(delta.text for delta in deltas) == expected
    assert [d.finish for d in deltas] == [None] * (len(deltas) - 1) + [finish]


def test_text_that_may_begin_a_stop_waits(processor):
    tokens = tokens_of(processor, "a b c b d", last=True)
    texts = [d.text for d in written(engine.Writer(processor, 2, ["b d"]), tokens)]
    pieces = [processor.id_to_piece(token.token_id).replace("▁", " ") for token in tokens]
    assert pieces == ["a", " b", " c", " b", " d"]
    assert texts == ["a", " ", "b c", " ", ""]
    texts = [d.text for d in written(engine.Writer(processor, 2, ["d b"]), tokens)]
    assert texts == ["a", " b", " c", " b", " d"]  # it ends: nothing is held


def test_tokens_come_with_the_text_that_they_begin_in(processor):
    writer = engine.Writer(processor, 2, ["b d"], logprobs=1)
    deltas = written(writer, tokens_of(processor, "a b c b d", last=True))
    assert [[t.text for t in d.tokens] for d in deltas] == [["a"], [" b"], [" c"], [" b"], []]
    assert [t.offset for d in deltas for t in d.tokens] == [0, 1, 3, 5]
    (first,) = deltas[0].tokens
    assert first.logprob == math.log(0.5)
    assert first.top == pytest.approx({"a": math.log(0.5), "bytes:\\x00": math.log(0.25)})


def test_bytes_of_a_character_come_with_it(processor):
    writer = engine.Writer(processor, 2, logprobs=0)
    deltas = written(writer, tokens_of(processor, "€"))
    assert [d.text for d in deltas] == ["", "", "€", ""]
    assert [[t.text for t in d.tokens] for d in deltas] == [
        [],
        [],
        ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"],
        ["[EOS]"],
    ]


# --- Completions ----------------------------------------------------------------------------------


def test_a_completion(client, alone):
    text, finish = alone(runners.Request("ROMEO:", 0.7, 0.9, 5, 12))
    found = client.complete(prompt="ROMEO:", max_tokens=12, temperature=0.7, top_p=0.9, seed=5)
    assert found.pop("id").startswith("cmpl-") and isinstance(found.pop("created"), int)
    assert found == {
        "object": "text_completion",
        "model": "toy",
        "choices": [{"text": text, "index": 0, "logprobs": None, "finish_reason": finish}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14},
    }


def test_every_form_of_prompt(client, processor, alone):
    texts = ["ROMEO:", "", "JULIET:\n"]
    ids = [processor.encode(text) or [tokenizer.BOS] for text in texts]
    expected = [alone(runners.Request(text, 0, max_len=16))[0] for text in texts]

    def found(prompt):
        choices = client.complete(prompt=prompt, temperature=0)["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        return [choice["text"] for choice in choices]

    assert found(texts) == found(ids) == expected
    assert [*found(texts[0]), *found(ids[1]), *found(texts[2:])] == expected
    assert [client.complete(temperature=0)["choices"][0]["text"]] == expected[1:2]


def test_n_choices_have_seeds_in_a_row(client, alone):
    found = client.complete(prompt=["A", "B"], n=2, max_tokens=9, seed=2**32 - 1)
    expected = [
        alone(runners.Request(prompt, 1, 1, seed, 9))[0]
        for prompt in "AB"
        for seed in (2**32 - 1, 0)
    ]
    assert [choice["text"] for choice in found["choices"]] == expected
    assert found["usage"] == {"prompt_tokens": 2, "completion_tokens": 36, "total_tokens": 38}


def test_without_a_seed_texts_differ(client):
    texts = {client.complete(prompt="A")["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 3


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3, "max_tokens": 20},
        {"echo": True, "logprobs": 3},
        {"echo": True, "logprobs": 0, "max_tokens": 0},
        {"echo": True, "max_tokens": 1},
        {"logprobs": 2, "stop": ["e", "a"], "max_tokens": 30, "n": 2},
        {"prompt": list(range(2, 70)), "echo": True, "logprobs": 1},
    ],
)
def test_a_stream_is_the_answer_in_parts(client, fields):
    fields = {"prompt": "The naïve €", "seed": 7} | fields
    whole = client.complete(**fields)
    *events, usage, done = client.stream(stream_options={"include_usage": True}, **fields)
    assert done == "[DONE]"
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert {event["id"] for event in events} == {usage["id"]}
    for choice in whole["choices"]:
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        reasons = [part["finish_reason"] for part in mine]
        assert reasons == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        for name in choice["logprobs"] or {}:
            joined = sum((part["logprobs"][name] for part in mine), [])
            assert joined == choice["logprobs"][name]
    assert all(event["usage"] is None for event in events)
    assert all("usage" not in event for event in client.stream(**fields)[:-1])


def test_log_probabilities_are_those_of_a_plain_pass(client, runner, processor):
    prompt = processor.encode("To be, or not to be: that is the question")
    found = client.complete(prompt=prompt, echo=True, logprobs=2, max_tokens=1, temperature=0.5)
    (choice,) = found["choices"]
    given = choice["logprobs"]
    texts = [processor.id_to_piece(token).replace("▁", " ") for token in prompt]
    assert given["tokens"][:-1] == texts and choice["text"].startswith("".join(texts))
    assert given["text_offset"] == [len("".join(texts[:i])) for i in range(len(texts) + 1)]
    logprobs = np.asarray(jax.nn.log_softmax(runner.logits([prompt])[0]))
    assert given["token_logprobs"][0] is None and given["top_logprobs"][0] is None
    np.testing.assert_allclose(
        given["token_logprobs"][1:-1], logprobs[np.arange(len(prompt) - 1), prompt[1:]], rtol=1e-4
    )
    for text, own, top, row in zip(
        *(given[name][1:] for name in ("tokens", "token_logprobs", "top_logprobs")),
        logprobs,
        strict=True,
    ):
        likely = np.argsort(-row)[:2]
        expected = {engine.token_text(processor, int(i)): row[i] for i in likely}
        assert top.keys() == expected.keys() | {text} and top[text] == own
        assert all(abs(top[key] - p) < 1e-4 for key, p in expected.items())


def test_log_likelihoods_are_those_of_evaluate(client, runner, processor):
    text = "But soft, what light through yonder window breaks?"
    loss = evaluate.text_loss(runner.logits, text, processor, length=60)
    prompt = [tokenizer.BOS, *processor.encode(text)]
    found = client.complete(prompt=prompt, echo=True, logprobs=0, max_tokens=0)
    (choice,) = found["choices"]
    assert choice["text"] == text and choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"][0] == "[BOS]"
    np.testing.assert_allclose(-sum(choice["logprobs"]["token_logprobs"][1:]), loss.nats, rtol=1e-5)
    assert found["usage"]["completion_tokens"] == 0


def test_half_a_character_at_the_end_of_a_prompt_is_finished_by_what_follows(client, processor):
    ids = processor.encode("€")
    found = client.complete(prompt=ids[:2], echo=True, max_tokens=0)
    assert found["choices"][0]["text"] == "\ufffd\ufffd"
    writer = engine.Writer(processor, 2, echo=True)
    first = writer.prompt(ids[:2], None, end=False)
    (last,) = written(writer, tokens_of(processor, "€", last=True)[2:])
    assert first.text + last.text == "€"


# --- Everything else ------------------------------------------------------------------------------


def test_models(client):
    status, _, found = client.ask("/v1/models")
    (one,) = found["data"]
    assert status == 200 and (found["object"], one["id"], one["object"]) == ("list", "toy", "model")
    assert client.ask("/v1/models/toy")[2] == one
    assert client.ask("/v1/models/other")[0] == 404


def test_health_and_metrics(inference):
    with serving(inference) as client:
        assert client.ask("/health")[::2] == (
            200,
            {"status": "ok", "error": None, "errors": 0, "running": 0, "waiting": 0},
        )
        client.complete(prompt="ROMEO:", max_tokens=7, seed=0)  # else [EOS] may come before
        client.ask("/v1/completions", b"{")
        client.ask("/nothing")
        status, headers, text = client.ask("/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=")
    for line in (
        'ternary_grok_requests_total{path="/v1/completions",status="200"} 1.0',
        'ternary_grok_requests_total{path="/v1/completions",status="400"} 1.0',
        'ternary_grok_requests_total{path="other",status="404"} 1.0',
        "ternary_grok_prompt_tokens_total 2.0",
        "ternary_grok_generated_tokens_total 7.0",
        "ternary_grok_completion_seconds_count 1.0",
        "ternary_grok_first_text_seconds_count 1.0",
        f"ternary_grok_slots {SLOTS}.0",
        "ternary_grok_running 0.0",
        "ternary_grok_waiting 0.0",
        "ternary_grok_errors_total 0.0",
    ):
        assert line in text.splitlines()


def test_the_tokenizer_as_vllm_offers_it(client, processor):
    assert client.ask("/tokenizer_info")[2] == {"bos_token": "[BOS]", "eos_token": "[EOS]"}

    def tokens(prompt):
        return client.ask("/tokenize", {"prompt": prompt, "add_special_tokens": False})[2]["tokens"]

    ids = processor.encode("To be")
    assert tokens("To be") == ids and tokens("[EOS]") == [2] and tokens("") == []
    assert refusal(client, {"prompt": 5}, "/tokenize")["message"] == "prompt must be a text, got 5"
    assert refusal(client, {"prompt": "\ud800"}, "/tokenize")["status"] == 400


# --- What is refused ------------------------------------------------------------------------------


def refusal(client, body, path="/v1/completions", **headers):
    """The error of an answer, and its status."""
    status, _, found = client.ask(path, body, **headers)
    assert found.keys() == {"error"}
    assert found["error"].keys() == {"message", "type", "param", "code"}
    return found["error"] | {"status": status}


@pytest.mark.parametrize(
    "fields, param, message",
    [
        ({"model": 3}, "model", "The model 3 does not exist"),
        ({"prompt": 3}, "prompt", "prompt must be a text, a list of texts, token ids, .* got 3"),
        ({"prompt": []}, "prompt", "prompt must be"),
        ({"prompt": ["a", 3]}, "prompt", "prompt must be"),
        ({"prompt": [True]}, "prompt", "prompt must be"),
        ({"prompt": [[5], "a", [6.0]]}, "prompt", "prompt must be"),
        ({"prompt": [1024]}, "prompt", "token id 1024 is not in the vocabulary, 0 to 1023"),
        ({"prompt": [-1]}, "prompt", "token id -1 is not in the vocabulary"),
        ({"prompt": [10**30]}, "prompt", "token ids are integers"),
        ({"prompt": "\ud800"}, "prompt", "half of a character"),
        ({"prompt": [5] * 81}, "prompt", "maximum context length is 96 .* 81 of a prompt and 16"),
        ({"prompt": [5] * 96, "echo": True, "max_tokens": 0}, "prompt", "at least 1 must fit"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens must be a whole number, 0 or more, got -1"),
        ({"max_tokens": 1.0}, "max_tokens", "whole number"),
        ({"max_tokens": True}, "max_tokens", "whole number"),
        ({"max_tokens": 10**30}, "prompt", "maximum context length is 96"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens 0 needs echo"),
        ({"temperature": -0.1}, "temperature", "a number, 0 or more, got -0.1"),
        ({"temperature": "1"}, "temperature", "a number, 0 or more, got '1'"),
        ({"temperature": float("nan")}, "temperature", "got nan"),
        ({"temperature": float("inf")}, "temperature", "got inf"),
        ({"top_p": 0}, "top_p", "above 0, at most 1, got 0"),
        ({"top_p": 1.1}, "top_p", "above 0, at most 1, got 1.1"),
        ({"n": 0}, "n", "a whole number, 1 or more, got 0"),
        ({"n": 65}, "n", "1 prompts, n = 65 times, are more than 64 choices"),
        ({"prompt": ["a"] * 33, "n": 2}, "n", "33 prompts, n = 2 times, are more than 64"),
        ({"stream": 1}, "stream", "true or false, got 1"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed with stream"),
        ({"stream": True, "stream_options": []}, "stream_options", "include_usage.*got"),
        ({"stream": True, "stream_options": {"a": True}}, "stream_options", "include_usage.*got"),
        ({"logprobs": 6}, "logprobs", "from 0 to 5, got 6"),
        ({"logprobs": True}, "logprobs", "from 0 to 5, got True"),
        ({"echo": "yes"}, "echo", "true or false, got 'yes'"),
        ({"stop": ""}, "stop", "none of them empty, got ''"),
        ({"stop": ["a", ""]}, "stop", "none of them empty"),
        ({"stop": list("abcde")}, "stop", "a text or a list of up to 4 texts"),
        ({"stop": [5]}, "stop", "a text or a list of up to 4 texts"),
        ({"seed": 0.5}, "seed", "a whole number, got 0.5"),
        ({"user": 5}, "user", "user must be a text"),
        ({"best_of": 2}, "best_of", "best_of is supported only where it is n"),
        ({"suffix": "x"}, "suffix", "suffix is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty is not supported"),
        ({"frequency_penalty": 1}, "frequency_penalty", "frequency_penalty is not supported"),
        ({"top_k": 5}, None, "Unrecognized request argument supplied: 'top_k'"),
        ({"\ud800": 5}, None, r"Unrecognized request argument supplied: '\\ud800'"),
    ],
)  # fmt: skip
def test_fields_that_are_refused(client, fields, param, message):
    error = refusal(client, {"model": "toy", "prompt": "x"} | fields)
    assert error["status"] == (404 if param == "model" else 400)
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert re.search(message, error["message"]), error["message"]


def test_fields_that_ask_for_nothing(client):
    neutral = {"suffix": None, "logit_bias": {}, "presence_penalty": 0, "best_of": 1, "user": "me"}
    nulls = dict.fromkeys(("max_tokens", "stop", "n", "seed", "stream", "logprobs", "echo"))
    found = client.complete(prompt="x", **neutral, **nulls)
    assert found["usage"]["completion_tokens"] == 16


def test_models_that_do_not_exist(client):
    error = refusal(client, {"model": "gpt", "prompt": "x"})
    assert (error["status"], error["code"]) == (404, "model_not_found")
    assert error["message"] == "The model 'gpt' does not exist; this server has 'toy'"
    error = refusal(client, {"prompt": "x"})
    assert (error["status"], error["message"]) == (400, "you must provide a model parameter")
    assert refusal(client, {"model": "\ud800"})["status"] == 404


@pytest.mark.parametrize(
    "body, status, message",
    [
        (b"{", 400, "the body is no JSON"),
        (b"[" * 100000, 400, "the body is no JSON"),
        (b"\xff", 400, "the body is no JSON"),
        (b'"text"', 400, "the body must be a JSON object, got 'text'"),
        (b" " * (serve.MAX_BODY + 1), 413, f"the body is larger than {serve.MAX_BODY} bytes"),
    ],
)
def test_bodies_that_are_refused(client, body, status, message):
    error = refusal(client, body)
    assert error["status"] == status and message in error["message"]


def test_other_kinds_of_bodies_and_paths(client):
    error = refusal(client, b"{}", **{"Content-Type": "text/plain"})
    assert error["status"] == 415
    assert error["message"] == "Content-Type must be application/json, got 'text/plain'"
    assert refusal(client, None)["status"] == 405
    assert refusal(client, None, "/v2")["status"] == 404


def test_a_body_that_does_not_arrive(client, monkeypatch):
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.01)
    with client.open("/v1/completions", b"{", {"Content-Length": "5"}) as connection:
        assert connection.getresponse().status == 408


def test_a_key(inference):
    with serving(inference, api_key="sesame") as client:
        for given in ({}, {"Authorization": "Bearer other"}, {"Authorization": "sesame"}):
            for path, body in (("/v1/completions", {}), ("/v1/models", None), ("/metrics", None)):
                error = refusal(client, body, path, **given)
                assert (error["status"], error["code"]) == (401, "invalid_api_key")
        assert client.ask("/v1/models", Authorization="Bearer sesame")[0] == 200
        assert client.ask("/health")[0] == 200


# --- Many at once ---------------------------------------------------------------------------------


def random_fields(random, processor, alone):
    """A request, and the texts that it is to get."""
    size = int(random.integers(1, 30))
    ids = random.integers(3, CONFIG.vocab_size, size).tolist()
    fields = {
        "prompt": processor.decode(ids) if random.random() < 0.5 else ids,
        "max_tokens": int(random.integers(1, 25)),
        "temperature": float(random.choice([0, 0.5, 1])),
        "top_p": float(random.choice([1, 0.8])),
        "seed": int(random.integers(2**32)),
        "n": int(random.choice([1, 1, 2])),
        "echo": bool(random.random() < 0.2),
    }
    if fields["echo"]:
        fields["logprobs"] = 1
    sampling = fields["temperature"], fields["top_p"]
    requests = [
        runners.Request(fields["prompt"], *sampling, seed % 2**32, fields["max_tokens"])
        for seed in range(fields["seed"], fields["seed"] + fields["n"])
    ]
    if len(processor.encode(fields["prompt"]) if isinstance(fields["prompt"], str) else ids) > 70:
        return random_fields(random, processor, alone)
    if random.random() < 0.4:
        text, _ = alone(requests[0])
        start = int(random.integers(len(text) + 1))
        if part := text[start : start + int(random.integers(1, 4))]:
            fields["stop"] = ["never", part]
    expected = [alone(request, fields.get("stop", ())) for request in requests]
    if fields["echo"]:
        encoded = processor.encode(fields["prompt"]) if isinstance(fields["prompt"], str) else ids
        decoder = tokenizer.StreamDecoder(processor)
        start = "".join(map(decoder.push, encoded))
        expected = [(start + text, finish) for text, finish in expected]
    return fields, expected


def test_soak(inference, processor, alone):
    """What each gets is what it gets alone, whoever comes, goes or hangs up beside it."""
    random = np.random.default_rng(0)
    cases = [random_fields(random, processor, alone) for _ in range(200)]
    ways = random.choice(
        ["whole", "stream", "leave", "leave at once"], 200, p=[0.4, 0.3, 0.15, 0.15]
    )

    def one(client, fields, expected, way):
        if way == "whole":
            choices = client.complete(**fields)["choices"]
            assert [(c["text"], c["finish_reason"]) for c in choices] == expected, fields
        elif way == "stream":
            found = [["", None] for _ in expected]
            for event in client.stream(**fields)[:-1]:
                (choice,) = event["choices"]
                found[choice["index"]][0] += choice["text"]
                found[choice["index"]][1] = choice["finish_reason"]
            assert list(map(tuple, found)) == expected, fields
        else:
            body = {"model": "toy", "stream": way == "leave"} | fields
            with client.open("/v1/completions", body) as connection:
                if way == "leave":
                    connection.getresponse().read(40)

    with (
        serving(inference, queue=64) as client,
        concurrent.futures.ThreadPoolExecutor(16) as threads,
    ):
        jobs = [
            threads.submit(one, client, *case, way) for case, way in zip(cases, ways, strict=True)
        ]
        for job in jobs:
            job.result()
        until(lambda: not client.engine.running and not client.engine.waiting)
        assert client.ask("/health")[2]["errors"] == 0


def job(processor, prompt, found, **settings):
    request = runners.Request(prompt, 0, **settings)
    return engine.Job(request, engine.Writer(processor, CONFIG.eos_token), found.append)


def test_a_long_prompt_delays_others_by_a_chunk_at_a_time(inference, processor, monkeypatch):
    calls = []
    for name in ("prefill", "step"):
        function = getattr(inference, name)

        def noted(*args, name=name, function=function):
            found = function(*args)
            calls.append(f"step of {len(found)}" if name == "step" else name)
            return found

        monkeypatch.setattr(inference, name, noted)
    short, long, last = [], [], queue.Queue()
    served = engine.Engine(inference)
    jobs = [
        job(processor, [5], short, max_len=40),
        job(processor, [6] * (8 * CHUNK), long, max_len=2),
        job(processor, [7], long, max_len=2),
    ]
    jobs[0].emit = lambda event: (short.append(event), event.finish and last.put(event))
    served.submit(jobs)
    served.start()
    last.get(timeout=120)
    served.close()
    assert calls[:18] == ["prefill", "step of 1"] * 9  # of the first, and the eight chunks
    assert calls.count("prefill") == 10 and jobs[0].generated == 40


def test_a_text_to_stop_at_within_tokens_that_come_together(
    inference, processor, alone, monkeypatch
):
    """What the model had sampled after it is dropped, and its slot is free."""
    monkeypatch.setattr(runners, "GROUP_SECONDS", math.inf)
    request = runners.Request([5], 0, max_len=40)
    stop = alone(request)[0][3:6]
    expected, found, last = alone(request, [stop])[0], [], queue.Queue()
    step, steps = inference.step, []
    monkeypatch.setattr(inference, "step", lambda *x: steps.append(found := step(*x)) or found)
    served = engine.Engine(inference)
    writer = engine.Writer(processor, CONFIG.eos_token, [stop])
    jobs = [engine.Job(request, writer, found.append), job(processor, [6], [], max_len=40)]
    jobs[1].emit = lambda event: event.finish and last.put(event)
    served.submit(jobs)
    served.start()
    last.get(timeout=120)
    served.close()
    assert ("".join(delta.text for delta in found), found[-1].finish) == (expected, "stop")
    assert jobs[0].generated < 40 == jobs[1].generated and served.errors == 0
    assert len(steps) < 10 and max(map(len, steps)) > 2  # of either more than one


def test_a_prompt_alone_needs_no_slot(inference, processor):
    served, ended = engine.Engine(inference), queue.Queue()
    jobs = [job(processor, [5 + i], [], max_len=80) for i in range(SLOTS)]
    jobs.append(job(processor, [9], [], max_len=1))
    jobs[-1].only_prompt = jobs[-1].writer.echo = True
    for number, one in enumerate(jobs):
        one.emit = lambda event, number=number: event.finish and ended.put(number)
    served.submit(jobs)
    served.start()
    assert [ended.get(timeout=120) for _ in jobs][0] == SLOTS
    served.close()


def test_a_full_queue(inference, monkeypatch):
    with (
        serving(inference, queue=2) as client,
        concurrent.futures.ThreadPoolExecutor(SLOTS) as threads,
        Gate(monkeypatch, inference, "step", client) as gate,
    ):
        waiting = [threads.submit(client.complete, prompt="A") for _ in range(SLOTS)]
        until(lambda: len(gate.jobs) == SLOTS)
        with client.open("/v1/completions", {"model": "toy", "prompt": "A", "n": 2}) as fits:
            until(lambda: len(gate.jobs) == SLOTS + 2)
            status, headers, found = client.ask("/v1/completions", {"model": "toy"})
            assert (status, headers["Retry-After"]) == (503, "1")
            assert found["error"]["type"] == "server_error"
            assert found["error"]["message"].startswith("5 of 5 places are taken, and this request")
            error = refusal(client, {"model": "toy", "n": 3})
            assert (error["status"], error["param"]) == (400, "n")  # never to be had
            gate.open()
            assert len(json.loads(fits.getresponse().read())["choices"]) == 2
        assert all(len(w.result()["choices"]) == 1 for w in waiting)


@pytest.mark.parametrize("held", ["prefill", "step"])
@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_leaves_its_place(inference, monkeypatch, held, stream):
    """One that decodes, or is prefilled, and those that wait."""
    body = {
        "model": "toy",
        "prompt": "A" * 20,
        "max_tokens": 70,
        "stream": stream,
        "temperature": 0,
    }
    with serving(inference) as client, Gate(monkeypatch, inference, held, client) as gate:
        with contextlib.ExitStack() as stack:
            for _ in range(SLOTS + 2):
                stack.enter_context(client.open("/v1/completions", body))
            until(lambda: len(gate.jobs) == SLOTS + 2 and gate.reached.is_set())
            assert not any(job.cancelled for job in gate.jobs)
        until(lambda: all(job.cancelled for job in gate.jobs))
        gate.open()
        until(lambda: not client.engine.running and not client.engine.waiting)
        assert not inference.busy and client.engine.generated <= 2
        assert client.complete(prompt="A", max_tokens=2, seed=0)["usage"]["completion_tokens"] == 2


def test_requests_that_take_too_long(inference, monkeypatch):
    """Those that wait and those that run; in a stream it is the last event."""
    now = [0.0]
    body = {"model": "toy", "prompt": "A", "max_tokens": 70, "seed": 0}
    monkeypatch.setattr(runners, "GROUP_SECONDS", 0)  # no text ends before the clock is looked at
    with (
        serving(inference, timeout=5, clock=lambda: now[0]) as client,
        Gate(monkeypatch, inference, "step", client) as gate,
    ):
        with contextlib.ExitStack() as stack:
            runs = stack.enter_context(client.open("/v1/completions", body))
            until(gate.reached.is_set)
            streams = client.open("/v1/completions", body | {"stream": True})
            streams = stack.enter_context(streams)
            waits = stack.enter_context(client.open("/v1/completions", body))
            until(lambda: len(gate.jobs) == 3)
            assert (client.engine.running, client.engine.waiting) == (1, 2)
            now[0] = 5.1
            gate.open()
            for connection in (runs, waits):
                answer = connection.getresponse()
                error = json.loads(answer.read())["error"]
                assert (answer.status, error["code"]) == (504, "timeout")
                assert error["message"] == "it took longer than 5 seconds"
            events = streams.getresponse().read().decode().split("\n\n")
            assert json.loads(events[-2][6:])["error"]["code"] == "timeout"
        assert gate.jobs[0].generated and not any(job.generated for job in gate.jobs[1:])
        until(lambda: not client.engine.running and not client.engine.waiting)
        assert client.complete(prompt="A", max_tokens=2, seed=0)["usage"]["completion_tokens"] == 2


# --- Errors of the model --------------------------------------------------------------------------


def fail(monkeypatch, inference, name, times, when="after", first=1):
    """A part of `inference` that raises a few times that it is called, from the first on."""
    function, calls = getattr(inference, name), itertools.count(1)

    def failing(*args):
        fails = first <= next(calls) < first + times
        result = None if fails and when == "before" else function(*args)
        if fails:
            raise RuntimeError("out of memory")
        return result

    monkeypatch.setattr(inference, name, failing)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["_prefill", "_insert", "_decode"])
def test_an_error_ends_requests_and_not_the_server(inference, alone, monkeypatch, name, when):
    expected = alone(runners.Request("A", 0, max_len=9))[0]
    with serving(inference) as client:
        fail(monkeypatch, inference, name, 1, when)
        for stream in (False, True):
            body = {"model": "toy", "prompt": "A", "max_tokens": 9, "temperature": 0}
            status, _, found = client.ask("/v1/completions", body | {"stream": stream})
            if not stream:
                assert (status, found["error"]["type"]) == (500, "server_error")
                assert found["error"]["message"] == "the model failed: RuntimeError: out of memory"
                until(lambda: client.ask("/health")[0] == 200)  # it has tried by itself
        assert (
            client.complete(prompt="A", max_tokens=9, temperature=0)["choices"][0]["text"]
            == expected
        )
        status, _, found = client.ask("/health")
        assert (status, found["status"], found["errors"]) == (200, "ok", 1)


@pytest.mark.parametrize("name, lost", [("_prefill", 1), ("_insert", 3)])
def test_an_error_of_a_third_request(inference, processor, monkeypatch, name, lost):
    """It ends two that have slots only if it took their cache."""
    found, served = [queue.Queue() for _ in range(3)], engine.Engine(inference)
    fail(monkeypatch, inference, name, 1, first=3)
    jobs = [job(processor, [5 + i], [], max_len=20) for i in range(3)]
    for one, events in zip(jobs, found, strict=True):
        one.emit = events.put
    served.submit(jobs)
    served.start()
    ends = []
    for events in found:
        while not isinstance(event := events.get(timeout=120), Exception) and not event.finish:
            pass
        ends.append(event)
    served.close()
    assert [isinstance(end, engine.Failed) for end in ends] == [i >= 3 - lost for i in range(3)]
    assert (served.errors, served.error) == (1, None)


def test_health_tells_of_a_model_that_keeps_failing(inference, monkeypatch):
    with serving(inference) as client:
        fail(monkeypatch, inference, "_decode", 2)
        assert client.ask("/v1/completions", {"model": "toy"})[0] == 500
        until(lambda: client.engine.error)
        status, _, found = client.ask("/health")
        assert (status, found["status"]) == (503, "failing")
        assert found["error"] == "RuntimeError: out of memory"
        client.complete(prompt="A")
        assert client.ask("/health")[0] == 200


def test_logits_that_are_not_finite(inference, runner, monkeypatch):
    module, name = next(
        (m, n) for m, entries in runner.params.items() for n in entries if "norm" in m
    )
    good = runner.params
    with serving(inference) as client:
        runner.params = good | {module: good[module] | {name: good[module][name] * np.nan}}
        try:
            for more in ({}, {"echo": True, "logprobs": 1, "max_tokens": 0, "prompt": "A B C"}):
                error = refusal(client, {"model": "toy"} | more)
                assert error["status"] == 500
                assert error["message"].startswith("the logits of this request are not finite")
        finally:
            runner.params = good
        client.complete(prompt="A")
        assert client.engine.errors == 0


def test_closing_fails_what_is_left(inference, processor):
    found, served = [], engine.Engine(inference)
    served.submit([job(processor, [5], found, max_len=3)])
    served._closed = True  # before it looks
    served.start()
    served.close()
    assert [str(error) for error in found] == ["the server is being stopped"]
    with pytest.raises(engine.Overloaded):
        served.submit([job(processor, [5], found, max_len=3)])


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    config = dataclasses.replace(CONFIG, sequence_len=32)
    checkpoint.save(folder, random_params(config, "int8"))
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return folder


@contextlib.contextmanager
def command(folder, *flags, **environment):
    """The server as a process: its lines so far, and its URL's port."""
    process = subprocess.Popen(
        [
            sys.executable,
            "serve.py",
            "--checkpoint",
            folder,
            "--port",
            "0",
            "--mesh",
            "1,1",
            *flags,
        ],
        cwd=ROOT,
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = {}
    try:
        for line in process.stderr:
            name, _, value = line.partition(" ")
            lines[name] = value.strip()
            if name == "url":
                break
        yield process, lines, int(lines["url"].removesuffix("/v1").rpartition(":")[2])
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize(
    "number, host, key", [(signal.SIGTERM, "127.0.0.1", "sesame"), (signal.SIGINT, "0.0.0.0", "")]
)
def test_the_command(folder, number, host, key):
    environment = {serve.KEY_VARIABLE: key} if key else {}
    flags = ["--slots", "2", "--host", host]
    with command(folder, *flags, **environment) as (process, lines, port):
        assert lines["slots"].startswith("2 of 32 tokens") and lines["compile"].endswith(" s")
        assert lines["url"] == f"http://{host}:{port}/v1"
        assert lines.get("note", "").startswith("anybody who reaches 0.0.0.0 can") == (not key)
        client = Client(None, port)
        assert client.ask("/v1/models")[0] == (401 if key else 200)
        key = {"Authorization": f"Bearer {key}"}
        assert client.ask("/v1/models", **key)[2]["data"][0]["id"] == folder.name
        body = {"model": folder.name, "prompt": "A", "max_tokens": 20, "stream": True}
        with client.open("/v1/completions", body, key) as connection:
            answer = connection.getresponse()
            process.send_signal(number)
            assert answer.read().decode().endswith("data: [DONE]\n\n")  # what runs may end
        assert process.wait(30) == 0
        assert process.stderr.read().split() == ["stop", "all", "requests", "have", "ended"]


@pytest.fixture
def handlers():
    """Those of signals are afterwards what they were."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_commands_that_are_refused(folder, capsys, handlers):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit, match=f"error: cannot listen on 127.0.0.1:{port}"):
            serve.main(["--checkpoint", str(folder), "--port", port])
    for flags, message in (
        (["--host", "nowhere.invalid"], "cannot listen on nowhere.invalid:8000"),
        (["--checkpoint", "nowhere", "--port", "0"], "nowhere"),
        (["--api-key", ""], f"the API key is empty; .* unset {serve.KEY_VARIABLE}"),
    ):
        with pytest.raises(SystemExit, match=message):
            serve.main(flags)
    for flags, message in (
        (["--port", "70000"], "--port: must be from 0 to 65535, got 70000"),
        (["--queue", "0"], "--queue: must be 1 or more, got 0"),
        (["--timeout", "0"], "--timeout: must be 1 or more, got 0"),
        (["--sequence-len", "1"], "--sequence-len: must be 2 or more, got 1"),
    ):
        with pytest.raises(SystemExit):
            serve.main(flags)
        assert message in capsys.readouterr().err


# --- Others' clients ------------------------------------------------------------------------------


def test_the_openai_client(client):
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    theirs = openai.OpenAI(
        base_url=f"http://127.0.0.1:{client.port}/v1", api_key="-", max_retries=0
    )
    assert [one.id for one in theirs.models.list()] == ["toy"]
    settings = {"model": "toy", "prompt": "ROMEO:", "seed": 3, "max_tokens": 12}
    whole = theirs.completions.create(**settings, logprobs=2, echo=True)
    assert whole.choices[0].text.startswith("ROMEO:") and whole.usage.total_tokens == 14
    assert whole.choices[0].logprobs.tokens[:2] == ["ROMEO", ":"]
    parts = theirs.completions.create(
        **settings, echo=True, stream=True, stream_options={"include_usage": True}
    )
    *texts, usage = parts
    assert "".join(part.choices[0].text for part in texts) == whole.choices[0].text
    assert usage.usage == whole.usage
    with pytest.raises(openai.NotFoundError, match="The model 'gpt' does not exist"):
        theirs.completions.create(model="gpt", prompt="")
    with pytest.raises(openai.BadRequestError, match="suffix is not supported"):
        theirs.completions.create(**settings, suffix="x")


TASK = """
task: lines
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def test_lm_evaluation_harness(client, runner, processor, tmp_path):
    """Its log-likelihoods are those of a plain pass, as `evaluate.py` scores texts."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed")
    docs = [
        {"text": "But soft, what light", "choices": [" through yonder window", " is there?"]},
        {"text": "To be, or not to be:", "choices": [" that is the question", " hm\n"]},
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "lines.yaml").write_text(TASK.format(file=tmp_path / "docs.jsonl"))
    url = f"base_url=http://127.0.0.1:{client.port}/v1/completions,model=toy,max_length=96"
    subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
        + ["--model_args", url, "--tasks", "lines", "--include_path", tmp_path]
        + ["--output_path", tmp_path / "out", "--log_samples"],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        check=True,
    )
    (samples,) = (tmp_path / "out").rglob("samples_lines_*.jsonl")
    samples = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(samples) == len(docs)
    for sample in samples:
        doc = sample["doc"]
        for choice, ((given, greedy),) in zip(doc["choices"], sample["resps"], strict=True):
            context, tokens = processor.encode(doc["text"]), processor.encode(doc["text"] + choice)
            logprobs = np.asarray(jax.nn.log_softmax(runner.logits([tokens])[0]))
            own = range(len(context), len(tokens))
            expected = sum(logprobs[i - 1, tokens[i]] for i in own)
            np.testing.assert_allclose(float(given), expected, rtol=1e-4)
            assert str(greedy) == str(all(logprobs[i - 1].argmax() == tokens[i] for i in own))
