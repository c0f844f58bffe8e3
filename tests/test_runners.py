"""Prompts to tokens: sampling by hand, requests alone and together, the reference's texts."""

import concurrent.futures
import dataclasses
import functools
import math
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import EVEN, GOLDEN, ODD, equations, golden_arrays, golden_config, random_params
from jax.extend.core import Literal

import attention
import checkpoint
import kernels
import model
import quantize
import runners
import sharding
from runners import Request, SampleSettings

CONFIG = dataclasses.replace(ODD, num_layers=1, activations="int8")
SLOTS = 4


class Letters:
    """A tokenizer of one token for each character."""

    def encode(self, text):
        return [ord(letter) - 40 for letter in text]

    def decode(self, tokens):
        return "".join(chr(int(token) + 40) for token in tokens)


def abstract_weights(config, weights):
    return runners.abstract_weights(config, model.PRECISIONS[weights])


def device_memory(runner, weights, *sizes, **named):
    return runners.device_memory(runner, abstract_weights(runner.config, weights), *sizes, **named)


@pytest.fixture(scope="module")
def inference():
    runner = runners.ModelRunner(CONFIG)
    runner.params = random_params(CONFIG, "ternary")
    return runners.InferenceRunner(runner, Letters(), SLOTS, pad_sizes=(4, 16))


def complete(inference, request):
    return [token for _, token in inference.generate([request])]


def ids(tokens):
    return [token.token_id for token in tokens]


def exact(tokens):
    """Everything about tokens but their slot, to be compared bit by bit."""
    return [
        (t.token_id, t.prob, t.top_k_token_ids.tolist(), t.top_k_probs.tolist(), t.logprob, t.done)
        for t in tokens
    ]


def random_requests(count, seed=0):
    random = np.random.default_rng(seed)
    return [
        Request(
            random.integers(0, CONFIG.vocab_size, random.integers(1, 21)).tolist(),
            temperature=(0.0, 1.0, 0.7)[i % 3],
            nucleus_p=(1.0, 0.9)[i % 2],
            rng_seed=i,
            max_len=int(random.integers(1, 16)),
        )
        for i in range(count)
    ]


# Sampling


def settings(rows, temperature=1.0, nucleus_p=1.0, rng_seed=0, max_len=1):
    return SampleSettings(
        jnp.full(rows, temperature, jnp.float32),
        jnp.full(rows, nucleus_p, jnp.float32),
        jnp.full(rows, rng_seed, jnp.uint32),
        jnp.full(rows, max_len, jnp.int32),
    )


sample = jax.jit(runners.sample_token)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    probs = np.array([0.05, 0.5, 0.15, 0.3], np.float32)
    top_p = jnp.array([0.01, 0.49, 0.6, 0.9, 0.96, 1 - 2**-24, 1])
    kept = runners.top_p_filter(jnp.tile(jnp.log(probs), (7, 1)), top_p) > -jnp.inf
    expected = ["0100", "0100", "0101", "0111", "1111", "1111", "1111"]
    assert ["".join("01"[int(k)] for k in row) for row in kept] == expected


def test_top_p_keeps_all_equals_of_the_last_token():
    logits = jnp.log(jnp.array([[0.1, 0.25, 0.4, 0.25]]))
    kept = runners.top_p_filter(logits, jnp.array([0.5])) > -jnp.inf
    assert kept.tolist() == [[False, True, True, True]]


def test_top_p_of_1_keeps_a_row_beside_a_filtered_one():
    logits = jnp.log(jnp.tile(jnp.array([0.5, 0.3, 0.2]), (2, 1)))
    filtered = runners.top_p_filter(logits, jnp.array([1.0, 0.5]))
    np.testing.assert_array_equal(filtered[0], logits[0])
    assert filtered[1].tolist()[1:] == [-np.inf, -np.inf]


def test_temperature_0_takes_the_likeliest_token_and_tells_its_own_probability():
    logits = jnp.log(jnp.array([[0.2, 0.3, 0.1, 0.3, 0.1]]))
    output = sample(logits, settings(1, temperature=0), jnp.zeros(1, jnp.int32))
    assert output.token_id.tolist() == [1]
    np.testing.assert_allclose(output.prob, [0.3], rtol=1e-6)
    assert output.top_k_token_ids.tolist() == [[1, 3, 0, 2, 4]]
    np.testing.assert_allclose(output.top_k_probs, [[0.3, 0.3, 0.2, 0.1, 0.1]], rtol=1e-6)


@pytest.mark.parametrize("top_p", [1, 0.9999999])
@pytest.mark.parametrize("largest", [0, 200, -3e4, 1e6])
def test_probabilities_do_not_lose_digits_to_the_size_of_logits(largest, top_p):
    logits = jnp.array([[largest, largest - 1, largest, -1e9]], jnp.float32)
    greedy = settings(1, temperature=0, nucleus_p=top_p)
    output = sample(logits, greedy, jnp.zeros(1, jnp.int32))
    expected = np.exp([0, 0, -1]) / np.exp([0, 0, -1]).sum()
    np.testing.assert_allclose(output.top_k_probs[0, :3], expected, rtol=1e-6)
    np.testing.assert_allclose(output.top_k_logprobs[0, :3], np.log(expected), rtol=1e-6)
    np.testing.assert_array_equal(output.prob, output.top_k_probs[:, 0])


@pytest.mark.parametrize("temperature", [1e-30, 1e-3])
def test_a_small_temperature_is_greedy_and_finite(temperature):
    logits = 50 * jax.random.normal(jax.random.key(0), (5, 97))
    output = sample(logits, settings(5, temperature), jnp.zeros(5, jnp.int32))
    assert output.token_id.tolist() == jnp.argmax(logits, axis=-1).tolist()
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in output)
    np.testing.assert_array_equal(output.prob, 1)


def test_frequencies_are_the_probabilities():
    """The reference's bfloat16 noise puts 98 % of uniform draws into the first half."""
    draws, vocabulary = 4000, 1024
    logits = jnp.zeros((draws, vocabulary)).at[:, 7].set(jnp.log(vocabulary - 1))
    output = sample(logits, settings(draws, rng_seed=5), jnp.arange(draws, dtype=jnp.int32))
    tokens = np.array(output.token_id)
    chosen, rest = tokens == 7, tokens[tokens != 7]
    assert abs(chosen.mean() - 0.5) < 4 * (0.25 / draws) ** 0.5  # four standard deviations
    assert abs((rest < vocabulary // 2).mean() - 0.5) < 4 * (0.25 / len(rest)) ** 0.5


def test_temperature_sharpens():
    logits = jnp.log(jnp.tile(jnp.array([0.8, 0.2]), (2, 1)))
    both = settings(2)._replace(temperature=jnp.array([0.5, 2.0]))
    output = sample(logits, both, jnp.zeros(2, jnp.int32))
    np.testing.assert_allclose(output.top_k_probs[0, 0], 0.64 / 0.68, rtol=1e-6)
    np.testing.assert_allclose(output.top_k_probs[1, 0], 2 / 3, rtol=1e-6)


def test_log_probabilities_are_those_before_temperature_and_top_p():
    logits = jnp.log(jnp.tile(jnp.array([0.1, 0.6, 0.3]), (2, 1))) + 7
    output = sample(logits, settings(2, temperature=0.5, nucleus_p=0.5), jnp.zeros(2, jnp.int32))
    assert output.token_id.tolist() == [1, 1]
    np.testing.assert_allclose(output.prob, 1)
    np.testing.assert_allclose(output.logprob, np.log([0.6, 0.6]), rtol=1e-5)
    assert output.top_k_token_ids[0].tolist() == [1, 2, 0]
    np.testing.assert_allclose(output.top_k_logprobs[0], np.log([0.6, 0.3, 0.1]), rtol=1e-5)
    assert output.top_k_probs[0].tolist() == [1, 0, 0]


def test_a_draw_depends_on_seed_and_number_only():
    logits = jnp.zeros((4, 4096))
    rows = settings(4)._replace(rng_seed=jnp.array([3, 3, 4, 3], jnp.uint32))
    output = sample(logits, rows, jnp.array([0, 1, 0, 0]))
    again = sample(logits[:1], settings(1, rng_seed=3), jnp.array([1]))
    first, second, other, same = output.token_id.tolist()
    assert first == same and again.token_id.tolist() == [second]
    assert len({first, second, other}) == 3


def test_advance_ends_rows():
    slots = runners.empty_slots(CONFIG, 4, 8)
    slots = slots._replace(
        settings=settings(4, temperature=0, max_len=3),
        count=jnp.array([1, 2, 1, 0]),
        active=jnp.array([True, True, True, False]),
    )
    logits = jax.nn.one_hot(jnp.array([5, 5, 2, 5]), CONFIG.vocab_size)
    slots, output = runners.advance(logits, slots, eos=2)
    assert output.token_id.tolist() == [5, 5, 2, 5]
    assert slots.count.tolist() == [2, 3, 2, 0]
    assert slots.active.tolist() == [True, False, False, False]  # goes on, full, [EOS], idle


def test_free_slots_draw_and_sort_nothing():
    """Whatever the last request wanted, they take the likeliest of all: where those that run are
    greedy, sampling is as cheap as if there were no others."""
    slots = runners.empty_slots(CONFIG, 3, 8)
    free = slots._replace(settings=settings(3, temperature=100.0, nucleus_p=1e-6))
    logits = jax.nn.one_hot(jnp.array([5, 6, 7]), CONFIG.vocab_size)
    for one in (slots, free):
        _, output = runners.advance(logits, one, eos=2)
        assert output.token_id.tolist() == [5, 6, 7]
        np.testing.assert_array_less(output.top_k_probs[:, 0], 0.5)


# Requests


def test_chunks():
    assert list(runners.chunks(10, (2, 4))) == [(0, 4, 4), (4, 8, 4), (8, 10, 2)]
    assert list(runners.chunks(1, (2, 4))) == [(0, 1, 2)]


def test_alone_or_beside_others_a_request_gives_the_same_bits(inference):
    """Eleven requests through four slots, joining and leaving; then each alone, in slot 0."""
    requests = random_requests(11)
    together = [[] for _ in requests]
    slots_used = set()
    for number, token in inference.generate(requests):
        together[number].append(token)
        slots_used.add((number, token.slot))
    assert {slot for _, slot in slots_used} == set(range(SLOTS))
    for number, request in enumerate(requests):
        assert exact(complete(inference, request)) == exact(together[number]), number


def test_max_len_and_eos(inference):
    ended = 0
    for i, request in enumerate(random_requests(24, seed=1)):
        tokens = complete(inference, dataclasses.replace(request, temperature=2.0, rng_seed=i))
        assert [token.done for token in tokens] == [False] * (len(tokens) - 1) + [True]
        eos = [token.token_id == CONFIG.eos_token for token in tokens]
        ended += eos[-1]
        assert not any(eos[:-1])
        assert len(tokens) == request.max_len or eos[-1]
    assert 0 < ended < 24  # both ways to end


def test_one_new_token_is_one_token(inference):
    assert len(complete(inference, Request([5, 6], 0, max_len=1))) == 1


def test_the_first_token_follows_from_a_plain_pass(inference):
    """Three chunks through the cache, with zeros in the prompt: token 0 is no padding."""
    prompt = [5, 0, 17, 0, 0, 33, 8, 60, 9, 41, 2, 25, 7, 38, 50, 11, 29, 0, 44, 3]
    (token,) = complete(inference, Request(prompt, max_len=1))
    logits = inference.runner.logits(np.array([prompt], np.int32))[0, -1]
    probs, likely = jax.lax.top_k(jax.nn.softmax(logits), runners.TOP_K)
    assert token.top_k_token_ids.tolist() == likely.tolist()
    np.testing.assert_allclose(token.top_k_probs, probs, rtol=1e-4)


def test_a_truncated_prompt_is_its_end(inference):
    prompt = list(range(5, 55))
    request = Request(prompt, temperature=0, max_len=7, truncate=True)
    room = CONFIG.sequence_len - 7
    end = dataclasses.replace(request, prompt=prompt[-room:])
    assert exact(complete(inference, request)) == exact(complete(inference, end))


def test_an_empty_prompt_starts_from_bos(inference):
    empty, bos = (Request(p, 0, max_len=4) for p in ("", [runners.BOS]))
    assert exact(complete(inference, empty)) == exact(complete(inference, bos))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": [3, 61]}, "token id 61 is not in the vocabulary, 0 to 60"),
        ({"prompt": [2**32 + 5]}, "token id 4294967301 is not in the vocabulary"),
        ({"prompt": np.array([2**40])}, "token id 1099511627776 is not in the vocabulary"),
        ({"prompt": [2**70]}, r"integers, as in \[5, 6\]; got object \[1\], \[118059162"),
        ({"prompt": [1.9]}, r"integers, as in \[5, 6\]; got float64 \[1\], \[1.9\]"),
        ({"prompt": ["1"]}, r"integers.*, \['1'\]"),
        ({"prompt": [True]}, r"integers.*got bool \[1\], \[True\]"),
        ({"prompt": [[3, 4]]}, r"integers.*got int64 \[1, 2\], \[\[3, 4\]\]"),
        ({"prompt": [[3], [4, 5]]}, r"integers.*, \[\[3\], \[4, 5\]\]"),
        ({"prompt": [[]]}, r"integers.*, \[\[\]\]"),
        ({"prompt": None}, "integers.*, None"),
        ({"prompt": np.int64(5)}, r"integers.*got int64 \[\]"),
        ({"prompt": b"text"}, "integers.*, b'text'"),
        ({"prompt": "half \ud83d"}, r"the prompt has '\\ud83d' at character 5"),
        ({"prompt": [-1]}, "token id -1 is not in the vocabulary"),
        ({"prompt": [3] * 30}, "30 tokens and 8 new ones do not fit into 37 cache slots"),
        ({"max_len": 37, "truncate": True}, "1 tokens and 37 new ones do not fit"),
        ({"max_len": 0}, "max_len must be 1 or more .*, got 0"),
        ({"max_len": 2.5}, r"max_len must be 1 or more \(a whole number\), got 2.5"),
        ({"max_len": True}, "max_len must be .*, got True"),
        ({"temperature": -0.5}, "temperature must be 0 or more .*, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be 0 or more .*, got nan"),
        ({"temperature": 1e39}, "temperature must be .* finite in float32.*, got 1e"),
        ({"temperature": "0.5"}, "temperature must be .*, got '0.5'"),
        ({"nucleus_p": 0}, "nucleus_p must be above 0 and at most 1 .*, got 0"),
        ({"nucleus_p": 1.5}, "nucleus_p must be above 0 and at most 1 .*, got 1.5"),
        ({"nucleus_p": None}, "nucleus_p must be .*, got None"),
        ({"rng_seed": -1}, "rng_seed must be from 0 to .*, got -1"),
        ({"rng_seed": 0.0}, "rng_seed must be from 0 to .*, got 0.0"),
    ],
)
def test_requests_that_cannot_run(inference, change, message):
    request = dataclasses.replace(Request([3], max_len=8), **change)
    with pytest.raises(ValueError, match=message):
        inference.insert(request)
    assert not inference.busy


def test_a_request_that_cannot_run_ends_no_other(inference):
    good = [Request([5, 6], 0, max_len=4), Request([7], 0, max_len=4)]
    expected = [exact(complete(inference, request)) for request in good]
    found = [[] for _ in range(4)]
    for number, token in inference.generate([good[0], Request([61]), good[1], Request([5], "0")]):
        found[number].append(token)
    assert [exact(found[0]), exact(found[2])] == expected
    for number, message in ((1, "token id 61"), (3, "temperature")):
        (end,) = found[number]
        assert end.done and message in str(end.error)
        assert (end.slot, end.token_id, end.prob, end.top_k_probs.size) == (-1, -1, 0, 0)
    assert not inference.busy
    with pytest.raises(ValueError, match="token id 61"):
        inference.text(Request([61]))


def test_text_needs_a_tokenizer(inference):
    bare = runners.InferenceRunner(inference.runner)
    for prompt in ("text", [5]):
        with pytest.raises(ValueError, match="text needs a tokenizer; give InferenceRunner one"):
            bare.text(Request(prompt, max_len=3))
    with pytest.raises(ValueError, match="sequence_len must be 2 or more, got 0"):
        runners.InferenceRunner(inference.runner, sequence_len=0)


def test_the_longest_request_fills_the_cache(inference):
    request = Request([3] * 29, 0, max_len=8)
    tokens = ids(complete(inference, request))
    assert len(tokens) == 8
    logits = inference.runner.logits(np.array([[3] * 29 + tokens[:-1]], np.int32))[0]
    assert tokens == jnp.argmax(logits, axis=-1)[28:].tolist()


def test_slots_are_taken_and_given_back(inference):
    request = Request([5, 6, 7], 0, max_len=9)
    expected = exact(complete(inference, request))
    first = [inference.insert(request) for _ in range(SLOTS)]
    assert [token.slot for token in first] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="all 4 slots are busy"):
        inference.insert(request)
    second = inference.step()
    inference.remove(2)
    assert [token.slot for token in inference.step()] == [0, 1, 3]
    again = inference.insert(request)
    assert again.slot == 2 and exact([again]) == exact(first[2:3]) == expected[:1]
    assert exact(second[:1]) == expected[1:2]
    inference.remove(-1)  # there is none: nothing happens to the last one
    assert [token.slot for token in inference.step()] == [0, 1, 3]  # of a step begun before
    assert [token.done for token in inference.step()] == [False] * SLOTS
    for slot in (*range(SLOTS), 0, SLOTS):
        inference.remove(slot)
    assert inference.step() == []


def test_closing_the_iterator_frees_its_slots(inference):
    tokens = inference.generate([Request([5], 0, max_len=9)] * 2)
    next(tokens)
    next(tokens)
    assert len(inference.busy) == 2
    tokens.close()
    assert not inference.busy


def test_requests_are_drawn_only_when_a_slot_is_free(inference):
    drawn = []

    def arriving():
        for i in range(6):
            drawn.append(i)
            yield Request([5 + i], 0, max_len=3)

    tokens = inference.generate(arriving())
    next(tokens)
    assert drawn == [0]
    assert len(list(tokens)) == 6 * 3 - 1


def test_those_who_insert_and_those_who_generate_share_the_slots(inference):
    requests = [Request([5 + i], 0, max_len=6) for i in range(4)]
    expected = [exact(complete(inference, request)) for request in requests]
    mine = [inference.insert(requests[0])]
    slot = mine[0].slot
    inference.warm_up([3])
    generated = inference.generate(requests[1:3])
    theirs = [next(generated) for _ in range(5)]
    assert exact(complete(inference, requests[3])) == expected[3]
    generated.close()
    assert inference.busy.keys() == {slot}
    while inference.busy:
        mine += inference.step()
    assert exact(mine) == expected[0]
    for number in (0, 1):
        tokens = [token for n, token in theirs if n == number]
        assert tokens and exact(tokens) == expected[1 + number][: len(tokens)]


def test_generating_needs_a_slot(inference):
    for _ in range(SLOTS):
        inference.insert(Request([5], 0, max_len=9))
    with pytest.raises(ValueError, match="all 4 slots are busy"):
        complete(inference, Request([5], max_len=3))
    for slot in range(SLOTS):
        inference.remove(slot)


def test_a_generated_request_can_be_removed(inference):
    """Even if its slot has another request when the iterator goes on."""
    requests = [Request([5 + i], 0, max_len=6) for i in range(3)]
    expected = [exact(complete(inference, request)) for request in requests]
    generated = inference.generate(requests[:2])
    found = [next(generated), next(generated)]
    inference.remove(found[0][1].slot)
    mine = [inference.insert(requests[2])]
    assert mine[0].slot == found[0][1].slot
    found += generated
    assert exact([token for number, token in found if number == 0]) == expected[0][:1]
    assert exact([token for number, token in found if number == 1]) == expected[1]
    while inference.busy:
        mine += inference.step()
    assert exact(mine) == expected[2]


def test_nothing_compiles_after_warm_up(inference):
    inference.warm_up([3, 20])
    assert dataclasses.astuple(inference.timing) == (0, 0, 0, 0)
    jitted = (inference._prefill, inference._insert, inference._decode)
    before = [f._cache_size() for f in jitted]
    for length in (1, 2, 4, 5, 16, 17, 22):
        complete(inference, Request([7] * length, 0, max_len=3))
    assert [f._cache_size() for f in jitted] == before == [2, 1, 1]
    assert inference.timing.prefill_tokens == 67
    assert inference.timing.decode_tokens == 14


def test_the_interface_of_the_reference(inference):
    server = inference.run()
    text = runners.sample_from_model(server, "GROK", max_len=9, temperature=0.01)
    tokens = complete(inference, Request(Letters().encode("GROK"), 0.01, max_len=9))
    assert text == Letters().decode(ids(tokens)) and len(text) == 9
    assert runners.sample_from_model(server, "GROK", max_len=9, temperature=0.01) == text
    assert server.send(Request("GROK", 0.01, 1.0, 42, 9)) == text
    with pytest.raises(ValueError, match="max_len"):
        runners.sample_from_model(server, "GROK", max_len=0, temperature=0.01)
    assert runners.sample_from_model(server, "GROK", max_len=9, temperature=0.01) == text


# Prompts in parts


def test_steps_and_other_requests_come_between_the_chunks_of_a_prompt(inference, expected):
    request = Request([3] * 33, 0.9, rng_seed=3, max_len=4)  # chunks of 16, 16 and 1
    alone = exact(complete(inference, request))
    firsts, steps, started = [inference.insert(OTHERS[0])], [], inference.start(request)
    while started.left:
        with pytest.raises(
            ValueError, match=f"{len(started.left)} chunks of this prompt are still"
        ):
            inference.insert_row(started)
        inference.prefill(started)
        steps.append(inference.step())
        if len(firsts) == 1:
            firsts.append(inference.insert(OTHERS[1]))
    assert len(steps) == 3
    firsts.append(inference.insert_row(started))
    with pytest.raises(RuntimeError, match="this prompt has a slot"):
        inference.insert_row(started)
    drain(inference, steps)
    assert of_each(firsts, steps) == [*expected, alone]


def test_a_started_prompt_waits_for_a_slot(inference):
    request = Request([5, 6, 7], 0, max_len=3)
    alone = exact(complete(inference, request))
    firsts = [inference.insert(Request([9], max_len=30)) for _ in range(SLOTS)]
    started = inference.start(request)
    inference.prefill(started)
    with pytest.raises(ValueError, match="all 4 slots are busy"):
        inference.insert_row(started)
    for first in firsts:
        inference.remove(first.slot)
    assert finished(inference, [inference.insert_row(started)]) == [alone]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_prompt_goes_on_after_ctrl_c_and_not_after_an_error(inference, monkeypatch, when):
    request = Request([3] * 20, 0, max_len=6)
    alone = exact(complete(inference, request))
    started = inference.start(request)
    fail_once(monkeypatch, inference, "_prefill", "after", ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        inference.prefill(started)
    inference.prefill(started)
    assert finished(inference, [inference.insert_row(started)]) == [alone]
    started = inference.start(request)
    fail_once(monkeypatch, inference, "_prefill", when, broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        inference.prefill(started)
    with pytest.raises(RuntimeError, match="an error took its cache; start it anew"):
        inference.prefill(started)
    assert exact(complete(inference, request)) == alone


def test_nothing_compiles_after_warm_up_of_scored_prompts(inference):
    inference.warm_up([3, 20], scored=True)
    before = inference._prefill._cache_size()
    for length in (1, 4, 16, 22):
        started = inference.start(Request([7] * length, 0, max_len=3), scored=True)
        while started.left:
            inference.prefill(started)
    assert inference._prefill._cache_size() == before


@pytest.mark.parametrize("length", [1, 16, 35])
def test_log_probabilities_of_a_prompt_are_those_of_a_plain_pass(inference, length, monkeypatch):
    monkeypatch.setattr(runners, "SCORED_SIZE", 4)
    prompt = np.random.default_rng(0).integers(3, CONFIG.vocab_size, length)
    started = inference.start(Request(prompt, 0, max_len=1), scored=True)
    assert len(started.left) == -(-length // 4)
    while started.left:
        inference.prefill(started)
    found = started.log_probs()
    expected = jax.nn.log_softmax(inference.runner.logits(prompt[None])[0])
    chosen = np.take_along_axis(expected[:-1], prompt[1:, None], axis=1)[:, 0]
    np.testing.assert_allclose(found.logprob, chosen, rtol=1e-4)
    likely, ids = jax.lax.top_k(expected[:-1], runners.TOP_K)
    np.testing.assert_allclose(found.top_k_logprobs, likely, rtol=1e-4)
    assert found.top_k_token_ids.tolist() == ids.tolist()
    token = inference.insert_row(started)
    assert token.token_id == int(jnp.argmax(expected[-1])) and token.done
    np.testing.assert_allclose(token.logprob, expected[-1].max(), rtol=1e-4)


# Interruptions and errors


def failing(function, when, fail):
    """The function, which once fails "before" it does anything, or "after" it has done it."""
    left = [fail]

    def call(*args):
        if when == "before" and left:
            left.pop()()
        result = function(*args)
        if left:
            left.pop()()
        return result

    return call


def fail_once(monkeypatch, inference, point, when, fail):
    owner = jax if point == "device_get" else inference
    monkeypatch.setattr(owner, point, failing(getattr(owner, point), when, fail))


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def broken():
    raise RuntimeError("out of memory")


OTHERS = [Request([5, 6, 7], 0.8, rng_seed=1, max_len=14), Request([9] * 18, 0, max_len=12)]
CALLS = [(p, when) for p in ("_insert", "_decode", "device_get") for when in ("before", "after")]


@pytest.fixture(scope="module")
def expected(inference):
    return [exact(complete(inference, request)) for request in OTHERS]


def drain(inference, steps, seconds=0):
    """Adds the lists of tokens that are still to come."""
    while inference.busy:
        steps.append(inference.step(seconds))  # between the two there is no moment to interrupt


def of_each(firsts, steps):
    """The tokens of inserted requests, whose first ones these are."""
    return [
        exact([first, *(t for step in steps for t in step if t.slot == first.slot)])
        for first in firsts
    ]


def finished(inference, firsts, seconds=0):
    steps = []
    drain(inference, steps, seconds)
    return of_each(firsts, steps)


LAST = Request([7], 0, max_len=2)  # ends with the first step


@pytest.mark.parametrize(
    "others, seconds, expected",
    [
        ([], 0, "begin begin fetch_1 begin fetch_1 fetch_1"),
        ([LAST], 0, "begin begin fetch_1 begin fetch_1 fetch_1"),
        ([], math.inf, "begin begin begin fetch_3"),
        ([LAST], math.inf, "begin begin fetch_1 begin fetch_2"),
    ],
)
def test_a_step_begins_before_the_last_one_is_fetched(
    inference, monkeypatch, others, seconds, expected
):
    """And none begins for nobody: those of a request are as many as its tokens but the first.

    With time for many steps, tokens are fetched together up to the last one of any request.
    """
    requests = [Request([5, 6, 7], 0, max_len=4), *others]
    alone = [exact(complete(inference, request)) for request in requests]
    decode, fetch, done = inference._decode, jax.device_get, []
    firsts = [inference.insert(request) for request in requests]
    monkeypatch.setattr(inference, "_decode", lambda *x: done.append("begin") or decode(*x))
    monkeypatch.setattr(jax, "device_get", lambda x: done.append(f"fetch_{len(x)}") or fetch(x))
    assert finished(inference, firsts, seconds) == alone
    assert done == expected.split()


@pytest.mark.parametrize("step_seconds, steps", [(0.1, 5), (0.3, 1), (0.6, 1), (0.001, 16)])
def test_tokens_are_fetched_together_that_come_within_some_time(
    inference, monkeypatch, step_seconds, steps
):
    inference.insert(Request([5, 6, 7], 0, max_len=30))
    monkeypatch.setattr(inference, "_step_seconds", step_seconds)
    assert len(inference.step(0.5)) == steps
    assert 0 < inference._step_seconds < math.inf and inference._step_seconds != step_seconds
    drain(inference, [])


def test_a_step_takes_as_long_as_lies_between_two(inference, monkeypatch):
    now = iter([0, 1, 10, 14, 20, 29.0])
    inference.insert(Request([5, 6, 7], 0, max_len=30))
    with monkeypatch.context() as patched:
        patched.setattr(runners.time, "perf_counter", lambda: next(now))
        found = []
        for seconds in (0, 0, 39):  # 13 s from 1 to 14, time for three
            found.append((len(inference.step(seconds)), inference._step_seconds))
    assert [x[0] for x in found] == [1, 1, 3] and [x[1] for x in found[1:]] == [13, 5]
    drain(inference, [])


def test_generate_fetches_tokens_together(inference, monkeypatch):
    monkeypatch.setattr(runners, "GROUP_SECONDS", math.inf)
    fetch, fetched = jax.device_get, []
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(len(x)) or fetch(x))
    complete(inference, Request([5, 6, 7], 0, max_len=30))
    assert fetched == [1, 16, 13]


def test_a_request_that_is_removed_gets_no_token_more(inference, monkeypatch):
    """Also of those that were fetched together with the last one that it got."""
    monkeypatch.setattr(runners, "GROUP_SECONDS", math.inf)
    requests = [Request([5, 6, 7], 0, max_len=30), Request([9], 0, max_len=20)]
    alone = [ids(complete(inference, request)) for request in requests]
    found, other = [[], []], None
    for number, token in inference.generate(requests):
        found[number].append(token.token_id)
        if number == 0 and len(found[0]) == 3:
            inference.remove(token.slot)
            other = inference.insert(Request([5], 0, max_len=9))  # in the same slot
            inference._wait_for({other.slot}, math.inf)  # as an interrupted step leaves it
    assert other.slot == 0 and found == [alone[0][:3], alone[1]]
    assert len(finished(inference, [other])[0]) == 9


def test_several_processes_fetch_one_step_at_a_time(inference, monkeypatch):
    """They must give their devices the same steps, and measure different times."""
    inference.insert(Request([5, 6, 7], 0, max_len=4))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert [len(inference.step(math.inf)) for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("seconds", [0, math.inf])
@pytest.mark.parametrize("point, when", CALLS[2:])
def test_an_interrupted_step_loses_no_token(inference, expected, monkeypatch, point, when, seconds):
    firsts = [inference.insert(request) for request in OTHERS]
    fail_once(monkeypatch, inference, point, when, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        inference.step(seconds)
    again = inference.insert(OTHERS[0])
    assert finished(inference, [*firsts, again], seconds) == [*expected, expected[0]]


@pytest.mark.parametrize("call", ["insert", "text"])
@pytest.mark.parametrize("point, when", [("_prefill", "before"), ("_prefill", "after"), *CALLS])
def test_an_interrupted_request_ends_alone(inference, expected, monkeypatch, call, point, when):
    if (call, point) == ("insert", "_decode"):
        pytest.skip("it makes no step")
    firsts = [inference.insert(request) for request in OTHERS]
    fail_once(monkeypatch, inference, point, when, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        getattr(inference, call)(Request([3] * 20, 0, max_len=6))
    assert inference.busy.keys() == {first.slot for first in firsts}
    assert finished(inference, firsts) == expected


def test_a_second_ctrl_c_is_not_held_back(inference):
    """What hangs can be ended; after it, the runner serves again."""
    reached = []
    with pytest.raises(KeyboardInterrupt), runners.uninterrupted():
        ctrl_c()
        reached.append(1)
        ctrl_c()
        reached.append(2)
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert inference.insert(Request([3], 0, max_len=1)).done


def test_ctrl_c_is_left_to_whoever_handles_it(inference, expected, monkeypatch):
    """With a handler that does not raise, and in a thread, where none is run, nothing changes."""
    calls = []
    before = signal.signal(signal.SIGINT, lambda *args: calls.append(args))
    try:
        fail_once(monkeypatch, inference, "_decode", "after", ctrl_c)
        assert exact(complete(inference, OTHERS[0])) == expected[0]
        assert len(calls) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        assert exact(thread.submit(complete, inference, OTHERS[0]).result()) == expected[0]


def test_ctrl_c_at_any_moment(inference, expected):
    random = np.random.default_rng(0)
    request = Request([3] * 20, 0, max_len=6)
    text = inference.text(request)
    begin = time.perf_counter()
    inference.text(request)
    longest = 1.2 * (time.perf_counter() - begin)

    def interrupting():
        timer = threading.Timer(random.uniform(0, longest), os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        return timer

    interrupted = 0
    for _ in range(40):
        firsts, steps, done = [inference.insert(request) for request in OTHERS], [], False
        try:
            timer = interrupting()
            done = inference.text(request) == text
            timer.join()
        except KeyboardInterrupt:
            interrupted += not done
        assert inference.busy.keys() == {first.slot for first in firsts}
        try:
            timer = interrupting()
            drain(inference, steps)
            timer.join()
        except KeyboardInterrupt:
            drain(inference, steps)
        assert of_each(firsts, steps) == expected
    assert interrupted


@pytest.mark.parametrize("point, when", [("_prefill", "before"), ("_prefill", "after"), *CALLS])
def test_after_an_error_it_goes_on(inference, expected, monkeypatch, point, when):
    """Others are lost only if their cache was already given away, and the error says so."""
    firsts = [inference.insert(request) for request in OTHERS]
    fail_once(monkeypatch, inference, point, when, broken)
    with pytest.raises(RuntimeError, match="out of memory") as error:
        inference.text(Request([3] * 20, 0, max_len=6))
    if point == "_prefill" or (point, when) in (("_insert", "before"), ("_decode", "before")):
        assert not hasattr(error.value, "__notes__")
        assert finished(inference, firsts) == expected
    else:
        assert "All requests of this runner are lost" in error.value.__notes__[0]
        assert not inference.busy and inference.step() == []
    assert exact(complete(inference, OTHERS[1])) == expected[1]


def test_a_lost_request_is_told_of_where_the_next_one_has_its_slot(inference, monkeypatch):
    generated = inference.generate(OTHERS)
    number, token = next(generated)
    fail_once(monkeypatch, inference, "_insert", "after", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        inference.insert(OTHERS[0])
    assert next(generated)[1].slot == token.slot == number == 0
    with pytest.raises(RuntimeError, match="an error in another call ended these requests"):
        list(generated)
    assert not inference.busy


def test_all_slots_are_free_where_the_device_refuses_to_free_them(inference, monkeypatch):
    generated = inference.generate(OTHERS)
    tokens = [next(generated)[1], next(generated)[1]]
    assert inference.busy.keys() == {token.slot for token in tokens} == {0, 1}
    fail_once(monkeypatch, inference, "_free", "before", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        generated.close()
    assert not inference.busy


def test_who_waits_is_told_of_the_loss(inference, monkeypatch):
    generated = inference.generate(OTHERS)
    next(generated)
    fail_once(monkeypatch, inference, "_insert", "after", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        inference.insert(OTHERS[0])
    first = inference.insert(OTHERS[1])  # in the same slot
    with pytest.raises(RuntimeError, match="an error in another call ended these requests"):
        list(generated)
    assert inference.busy.keys() == {first.slot}
    inference.remove(first.slot)


# Logits that are not finite


def test_rows_that_are_not_finite_end(inference):
    good = jax.random.normal(jax.random.key(0), (1, CONFIG.vocab_size))
    bad = [good.at[0, 7].set(np.nan), good.at[0, 7].set(np.inf), jnp.full_like(good, -np.inf)]
    slots = runners.empty_slots(CONFIG, 4, 8)
    slots = slots._replace(settings=settings(4, max_len=3), active=jnp.ones(4, bool))
    after, output = runners.advance(jnp.concatenate([*bad, good]), slots, eos=2)
    assert after.active.tolist() == [False, False, False, True]
    assert jnp.isnan(output.prob).tolist() == [True, True, True, False]
    filtered = sample(jnp.concatenate(bad), settings(3, 0.5, 0.5), jnp.zeros(3, jnp.int32))
    assert jnp.isnan(filtered.prob).all()
    alone = sample(good, settings(1), jnp.zeros(1, jnp.int32))
    assert output.token_id[3] == alone.token_id[0]


def test_a_damaged_expert_ends_the_requests_that_it_reads(inference):
    runner = runners.ModelRunner(CONFIG)
    module, name = next(
        (module, name)
        for module, entries in inference.runner.params.items()
        for name, weight in entries.items()
        if "/moe/" in module and weight.shape[0] == CONFIG.num_experts
    )
    weight = inference.runner.params[module][name]
    damaged = dataclasses.replace(weight, scales=weight.scales.at[3].set(jnp.nan))
    runner.params = inference.runner.params | {module: {name: damaged}}
    server = runners.InferenceRunner(runner, Letters(), SLOTS, pad_sizes=(4, 16))
    requests = [Request([token], 0, max_len=4) for token in range(5, 35)]
    found = [[] for _ in requests]
    for number, token in server.generate(requests):
        found[number].append(token)
    assert not server.busy
    ended = [number for number, tokens in enumerate(found) if tokens[-1].error]
    assert 0 < len(ended) < len(requests)
    for number, request in enumerate(requests):
        tokens = [token for token in found[number] if not token.error]
        assert exact(tokens) == exact(complete(inference, request)[: len(tokens)])
        assert number in ended or len(tokens) == len(complete(inference, request))
    with pytest.raises(ValueError, match="logits of this request are not finite.*verify the check"):
        server.text(requests[ended[0]])


# The reference


@pytest.mark.parametrize(
    "case, weights, mesh, dtype",
    [
        ("single_device", "int8", (1, 1), "bfloat16"),
        ("released_layout", "ternary", (2, 4), "float32"),
        ("single_device", "ternary", (1, 8), "float32"),  # two key/value heads on eight devices
    ],
)
def test_greedy_tokens_of_the_reference(case, weights, mesh, dtype):
    config = golden_config(case, fprop_dtype=dtype)
    runner = runners.ModelRunner(config, sharding.make_mesh(*mesh))
    runner.load(GOLDEN / case, weights)
    assert runner.params[runners.EMBEDDINGS]["embeddings"].dtype == dtype
    slots = 2 * mesh[0]
    inference = runners.InferenceRunner(runner, slots=slots, pad_sizes=(4,))
    prefix = "ternary_" if weights == "ternary" else ""
    arrays = golden_arrays(case)
    request = Request(arrays[f"{prefix}greedy_prompt"], temperature=0, max_len=16)
    texts = [[] for _ in range(slots)]
    for number, token in inference.generate([request] * slots):
        texts[number].append(token.token_id)
    assert texts == [arrays[f"{prefix}greedy_tokens"].tolist()] * slots


@kernels.disabled()
def test_nothing_is_left_of_logits_that_are_not_finite(inference):
    """Without kernels attention reads all of the cache, and other requests come after."""
    runner = runners.ModelRunner(CONFIG)
    good = runner.params = inference.runner.params
    server = runners.InferenceRunner(runner, Letters(), pad_sizes=(4, 32))
    request = Request([5, 6, 7], 0, max_len=4)
    expected = exact(complete(server, request))
    runner.params = jax.tree.map(lambda x: x * jnp.nan if x.ndim == 1 else x, good)
    assert complete(server, Request([9] * 25, 0, max_len=4))[0].error
    runner.params = good
    assert exact(complete(server, request)) == expected


# A model and its parameters


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([[5000]], "token id 5000 is not in the vocabulary, 0 to 60"),
        ([[-1]], "token id -1 is not"),
        ([3, 4], r"integers, as in \[\[5, 6\], \[7, 8\]\]; got int64 \[2\], \[3, 4\]"),
        ([[3.0]], "got float64"),
        (np.zeros((2, 0), np.int32), r"got int32 \[2, 0\]"),
    ],
)
def test_tokens_that_have_no_logits(inference, tokens, message):
    with pytest.raises(ValueError, match=message):
        inference.runner.logits(tokens)


def test_logits_of_any_integers(inference):
    logits = inference.runner.logits(np.array([[3, 4]], np.int32))
    for tokens in ([[3, 4]], np.array([[3, 4]], np.uint8), jnp.array([[3, 4]])):
        np.testing.assert_array_equal(inference.runner.logits(tokens), logits)


def test_without_parameters():
    runner = runners.ModelRunner(CONFIG)
    inference = runners.InferenceRunner(runner, Letters())
    for call in (lambda: runner.logits([[3]]), lambda: inference.text(Request([3], max_len=3))):
        with pytest.raises(RuntimeError, match=r"no parameters yet; call load\(folder\) or init"):
            call()
    runner.params = random_params(CONFIG, "ternary")  # and then it can be used
    assert len(complete(inference, Request([3], 0, max_len=3))) == 3


def test_parameters_are_put_on_large_pages_where_they_arrive(monkeypatch):
    """In `run.py` an InferenceRunner is there before them."""
    advised = []
    monkeypatch.setattr(runners.kernels, "use_large_pages", advised.append)
    runner = runners.ModelRunner(golden_config("single_device"))
    runners.InferenceRunner(runner)
    assert advised == []
    runner.load(GOLDEN / "single_device")
    assert len(advised) == 1
    pairs = zip(*map(jax.tree.leaves, (advised[0], runner.params)), strict=True)
    assert all(given is loaded for given, loaded in pairs)
    runner.params = runner.params | {}
    assert len(advised) == 2 and advised[1] is runner.params


def test_weights_are_checked_unless_that_is_not_wanted(tmp_path):
    params = random_params(CONFIG, "int8")
    module = next(module for module, entries in params.items() if "scale" in entries)
    params[module] = {"scale": params[module]["scale"].at[0].set(jnp.nan)}
    checkpoint.save(tmp_path, params)
    runner = runners.ModelRunner(CONFIG)
    with pytest.raises(checkpoint.CheckpointError):
        runner.load(tmp_path)
    runner.load(tmp_path, check=False)
    assert bool(jnp.isnan(runner.params[module]["scale"][0]))


# Meshes and memory


def test_the_cache_is_spread_and_a_row_inserted_without_moving_it():
    config = dataclasses.replace(EVEN, num_layers=1)
    runner = runners.ModelRunner(config, sharding.make_mesh(2, 4))
    inference = runners.InferenceRunner(runner, slots=4, sequence_len=48)
    k = inference._slots.memory.layers[0].k
    assert k.shape == (4, 8, 48, 6) and k.sharding.shard_shape(k.shape) == (2, 2, 48, 6)
    row = inference._row.layers[0].k
    assert row.sharding.shard_shape(row.shape) == (1, 2, 48, 6)
    logits = np.zeros((1, config.vocab_size), np.float32)
    scalars = SampleSettings(np.float32(0), np.float32(1), np.uint32(0), np.int32(9))
    with jax.set_mesh(runner.mesh):
        lowered = inference._insert.lower(inference._slots, inference._row, logits, scalars, 1)
    program = lowered.compile().as_text()
    assert "fusion" in program
    assert not any(word in program for word in ("all-gather", "all-to-all", "collective-permute"))


def test_init_places_parameters(monkeypatch):
    advised = []
    monkeypatch.setattr(runners.kernels, "use_large_pages", advised.append)
    config = dataclasses.replace(EVEN, num_layers=1)
    runner = runners.ModelRunner(config, sharding.make_mesh(1, 8))
    runner.init(seed=3)
    assert len(advised) == 1 and advised[0] is runner.params
    query = runner.params["transformer/decoder_layer_0/multi_head_attention/query"]["w"]
    assert query.shape == (40, 96) and query.sharding.shard_shape(query.shape) == (40, 12)
    assert jax.tree.structure(runner.params) == jax.tree.structure(model.abstract_params(config))
    logits = runner.logits(np.array([[3, 4, 5]], np.int32))
    assert logits.shape == (1, 3, 104) and bool(jnp.all(jnp.isfinite(logits)))


def test_meshes_that_do_not_fit():
    runner = runners.ModelRunner(EVEN, sharding.make_mesh(2, 4))
    with pytest.raises(ValueError, match="3 slots do not spread over the 2 rows .* multiple"):
        runners.InferenceRunner(runner, slots=3)
    with pytest.raises(ValueError, match="0 slots"):
        runners.InferenceRunner(runners.ModelRunner(ODD), slots=0)


@pytest.mark.parametrize("weights", ["ternary", "ternary-experts", "int8"])
def test_planned_shapes_are_those_of_loaded_weights(weights):
    case = "single_device"  # one scale for each column, as planned
    config = golden_config(case)
    runner = runners.ModelRunner(config)
    runner.load(GOLDEN / case, weights)
    planned = abstract_weights(config, weights)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), runner.params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), planned
    )


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize(
    "preset, weights, activations",
    [
        ("grok-1", "ternary", None),
        ("grok-1", "ternary-experts", "int8"),
        ("grok-1", "int8", "int8"),
        ("bench", "ternary", "int15"),
        ("demo", "ternary", "float"),
    ],
)
def test_the_planned_kernels_are_those_that_a_step_takes(
    preset, weights, activations, backend, monkeypatch
):
    """Counted in the jaxpr of a decode step for the backend."""
    if backend == "cpu" and not kernels.on_cpu():
        pytest.skip("no native kernels: no compiler, or a GPU")
    monkeypatch.setattr(kernels, "platform", lambda: backend)
    config = dataclasses.replace(model.PRESETS[preset], num_layers=1)
    if activations is not None:
        config = dataclasses.replace(config, activations=activations)
    runner = runners.ModelRunner(config)
    found = runners.products_by_path(runner, abstract_weights(runner.config, weights))
    step = functools.partial(runner.model.apply, last_only=True)
    memory = jax.eval_shape(functools.partial(model.init_memory, config, 1))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    jaxpr = jax.make_jaxpr(step)(abstract_weights(config, weights), None, token, memory)
    weights = 0
    for e in equations(jaxpr):
        name = e.params.get("target_name", e.params.get("name"))
        if name in ("ternary_grok_TernaryDots", "ternary_few_rows", "gated_dot", "ternary_sums"):
            weights += sum(x.aval.dtype == jnp.uint8 for x in e.invars)
    assert len(found["kernel"]) + len(found["plain JAX"]) == 7
    assert weights == len(found["kernel"])


def test_texts_of_several_prompts(inference):
    """As each alone, in their order, though there are fewer slots; an error names its request."""
    requests = [
        Request([3 + i] * (1 + i % 3), 0.8, rng_seed=i, max_len=1 + i % 4) for i in range(7)
    ]
    assert inference.texts(requests) == [inference.text(request) for request in requests]
    assert inference.texts([]) == []
    with pytest.raises(ValueError, match="not in the vocabulary") as raised:
        inference.texts([requests[0], Request([10**6]), requests[1]])
    assert raised.value.__notes__ == ["That is request 1 of 3, counted from 0."]
    assert not inference.busy


@pytest.mark.parametrize("weights", ["ternary", "int8"])
def test_loops_make_the_zeros_that_they_start_from(weights, monkeypatch):
    """XLA:GPU made those of all layers first: 54 GB for a chunk of Grok-1's."""
    config = dataclasses.replace(EVEN, num_layers=1)
    params, slots = abstract_weights(config, weights), 2 * attention.CACHE_BLOCK
    memory = jax.eval_shape(lambda: runners.empty_slots(config, 1, slots)).memory
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    monkeypatch.setattr(quantize, "DEVICE_TILE", 1 << 10)
    step = functools.partial(runners.prefill_chunk, model.make_model(config))
    jaxpr = jax.make_jaxpr(step)(params, memory, tokens, 0, 64)
    loops = [e for e in equations(jaxpr) if e.primitive.name in ("scan", "while")]
    constants = {
        e.outvars[0]
        for e in equations(jaxpr)
        if e.primitive.name == "broadcast_in_dim" and isinstance(e.invars[0], Literal)
    }
    carried = [x for loop in loops for x in loop.invars if x.aval.ndim]
    assert len(loops) > 7 and not [x.aval for x in carried if x in constants]
    for loop in loops:  # what a loop stacks starts from such zeros, too
        assert len(loop.outvars) == loop.params.get("num_carry", len(loop.outvars))


def compiled_bytes(runner, weights, slots, sequence_len, scored=False):
    """What XLA says that serving takes: all that stays, and the larger of what two steps add."""
    params = abstract_weights(runner.config, weights)
    names = "scored" if scored else "prefill", "decode"
    lowered = runners.lower_steps(runner, params, slots, sequence_len, names)
    steps = [lowered[name].compile().memory_analysis() for name in names]
    added = [s.temp_size_in_bytes + s.output_size_in_bytes - s.alias_size_in_bytes for s in steps]
    return steps[1].argument_size_in_bytes + steps[0].alias_size_in_bytes + max(added)


@pytest.mark.parametrize(
    "changes, weights, mesh, slots",
    [
        ({}, "ternary", (1, 1), 1),
        ({}, "ternary", (1, 2), 1),
        ({"activations": "float"}, "ternary", (1, 1), 1),
        ({"activations": "int15", "fprop_dtype": "float32"}, "ternary", (1, 1), 3),
        ({"num_experts": 1, "num_selected_experts": 1}, "ternary", (1, 1), 1),
        ({}, "int8", (1, 1), 1),
        ({}, "float32", (1, 1), 1),
    ],
)
def test_planned_memory_is_at_least_what_is_compiled(changes, weights, mesh, slots):
    """And at most a fifth more; at the size of `bench` it is a tenth."""
    config = dataclasses.replace(
        model.PRESETS["bench"], emb_size=256, key_size=64, num_q_heads=4, num_layers=2, **changes
    )
    runner = runners.ModelRunner(config, sharding.make_mesh(*mesh))
    planned = sum(
        runners.device_memory(
            runner, abstract_weights(runner.config, weights), slots, 1024
        ).values()
    )
    compiled = compiled_bytes(runner, weights, slots, 1024)
    assert compiled <= planned <= 1.2 * compiled


@pytest.mark.parametrize("mesh", [(1, 1), (1, 2)])  # with a kernel for the likeliest, and without
def test_planned_memory_of_scored_prompts_is_at_least_what_is_compiled(mesh):
    config = dataclasses.replace(
        model.PRESETS["bench"], emb_size=256, key_size=64, num_q_heads=4, num_layers=2
    )
    runner = runners.ModelRunner(config, sharding.make_mesh(*mesh))
    planned = device_memory(runner, "ternary", 1, 1024, scored=True)
    compiled = compiled_bytes(runner, "ternary", 1, 1024, scored=True)
    assert compiled <= sum(planned.values()) <= 1.2 * compiled


def test_planned_memory_of_a_toy_is_at_least_what_is_compiled():
    runner = runners.ModelRunner(CONFIG)
    planned = sum(
        runners.device_memory(
            runner, abstract_weights(runner.config, "ternary"), SLOTS, 37
        ).values()
    )
    assert compiled_bytes(runner, "ternary", SLOTS, 37) <= planned


@pytest.mark.parametrize(
    "model_axis, activations, compiled",
    [
        (1, "int8", 0.3283e9),
        (1, "int15", 0.4248e9),
        (1, "float", 1.0288e9),
        (8, "int8", 0.1396e9),
        (8, "int15", 0.2120e9),
        (8, "float", 0.1798e9),
    ],
)
def test_planned_activations_of_the_full_model(model_axis, activations, compiled, monkeypatch):
    """At least what XLA took for a chunk of 1024 tokens when it compiled Grok-1 for H200s, and at
    most a hundredth of the whole more."""
    config = dataclasses.replace(model.PRESETS["grok-1"], activations=activations)
    runner = runners.ModelRunner(config, sharding.make_mesh(1, model_axis))
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    needed = runners.device_memory(
        runner, abstract_weights(runner.config, "ternary"), slots=1, sequence_len=8192
    )
    assert 0 <= needed["activations"] - compiled <= sum(needed.values()) / 100


def test_memory_of_the_full_model():
    runner = runners.ModelRunner(model.PRESETS["grok-1"])
    needed = runners.device_memory(
        runner, abstract_weights(runner.config, "ternary"), slots=1, sequence_len=8192
    )
    assert needed["embeddings"] == 131072 * 6144 * 2
    assert abs(needed["weights"] - 78.3e9) < 0.5e9
    assert needed["cache"] == pytest.approx(2 * 64 * 2 * 8192 * 8 * 128 * 2, rel=1e-6)
    eight = runners.ModelRunner(model.PRESETS["grok-1"], sharding.make_mesh(1, 8))
    spread = runners.device_memory(
        eight, abstract_weights(eight.config, "ternary"), slots=1, sequence_len=8192
    )
    assert spread["weights"] == pytest.approx(needed["weights"] / 8, rel=3e-3)
    assert spread["cache"] == pytest.approx(needed["cache"] / 8, rel=1e-3)


def test_the_full_decode_step_traces():
    config = model.PRESETS["grok-1"]
    params = abstract_weights(config, "ternary")
    slots = jax.eval_shape(functools.partial(runners.empty_slots, config, 8, 8192))
    step = functools.partial(runners.decode_step, model.make_model(config), eos=config.eos_token)
    after, output = jax.eval_shape(step, params, slots)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), slots
    )
    assert output.shape == (8, 4 + 3 * runners.TOP_K)


def test_what_a_step_gives_is_fetched_as_one_array():
    random = np.random.default_rng(0)
    prob, logprob, *lists = (
        jnp.asarray(random.standard_normal(shape), jnp.float32)
        for shape in ((2,), (2,), (2, 3), (2, 3))
    )
    token, ids = jnp.array([3, 131071], jnp.int32), jnp.array([[4, 1, 2], [7, 8, 9]], jnp.int32)
    sample = runners.SampleOutput(token, prob.at[1].set(jnp.nan), ids, lists[0], logprob, lists[1])
    found = jax.jit(runners.packed)(sample, jnp.array([True, False]))
    again, active = runners.unpacked(np.asarray(found))
    assert active.tolist() == [True, False]
    for one, other in zip(again, sample, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
