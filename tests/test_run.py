"""The command: what it prints, what it refuses."""

import dataclasses
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import EVEN, random_params

import checkpoint
import kernels
import model
import run
import runners
import tokenizer

CONFIG = dataclasses.replace(model.PRESETS["tiny"], num_layers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint.save(folder, random_params(CONFIG, "int8"))
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(CONFIG)))
    return folder


def command(folder, *flags):
    return ["--checkpoint", str(folder), "--mesh", "1,1", "--max-len", "9", *flags]


def refused(arguments, capsys):
    """The message that the command exits with, and nothing of a traceback."""
    with pytest.raises(SystemExit) as exit_:
        run.main(arguments)
    assert exit_.value.code not in (0, None)
    return f"{exit_.value.code}" if isinstance(exit_.value.code, str) else capsys.readouterr().err


@pytest.fixture(scope="module")
def expected(folder):
    """(prompt, settings) -> prompt and continuation, through runners alone."""
    processor = tokenizer.load(folder, CONFIG.vocab_size)
    runner = runners.ModelRunner(CONFIG)
    runner.load(folder, "ternary")
    inference = runners.InferenceRunner(runner, processor)

    def text(prompt, **settings):
        request = runners.Request(prompt, max_len=9, **settings)
        tokens = inference.prompt_tokens(request).tolist()
        tokens += [token.token_id for _, token in inference.generate([request])]
        return processor.decode([token for token in tokens if token != CONFIG.eos_token])

    return text


def test_one_prompt(folder, expected, capsys):
    run.main(command(folder, "--prompt", "First Citizen:", "--temperature", "0.9", "--seed", "7"))
    out, err = capsys.readouterr()
    assert out == expected("First Citizen:", temperature=0.9, rng_seed=7) + "\n"
    lines = dict(line.split(maxsplit=1) for line in err.splitlines())
    assert lines["model"].startswith("1 layers of 48, 6 query and 2 key/value heads of 8, 2 of 8")
    assert lines["parameters"] == f"{count_parameters():,}"
    assert lines["weights"] == "ternary, float activations in float32"
    found = lines["products"]
    assert found.startswith("plain JAX: all quantized matrices")
    assert found.endswith("--activations int15 or int8 have kernels") == kernels.on_cpu()
    assert lines["mesh"] == "1 data x 1 model, cpu"
    assert lines["slots"] == "1 of 64 tokens, vocabulary 1024"
    assert lines["memory"].startswith("weights 22.6 kB + embeddings 197 kB + cache")
    assert "of" in lines["total"] and lines["total"].endswith("GB on each device")
    assert lines["load"].endswith(" s")
    assert lines["decode"].startswith("8 tokens, ")
    assert list(lines)[-2:] == ["prefill", "decode"]


def count_parameters():
    return sum(w.size for w in jax.tree.leaves(model.abstract_params(CONFIG)))


def test_several_prompts_from_file_and_stdin(folder, expected, capsys, monkeypatch, tmp_path):
    """Three prompts through two slots: each as if it were alone."""
    lines = tmp_path / "prompts.txt"
    lines.write_text("To be, or\n\nAll: é😀\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("two  lines\nof it\n"))
    run.main(
        command(folder, "--prompt", "-", "--prompts-file", str(lines), "--slots", "2")
        + ["--temperature", "0"]
    )
    out, err = capsys.readouterr()
    for number, prompt in enumerate(["two  lines\nof it", "To be, or", "All: é😀"], start=1):
        assert f"[{number}] {expected(prompt, temperature=0.0)}\n\n" in out
    assert out.count("\n\n[") == 2
    assert "slots       2 of 64 tokens" in err


def test_samples_of_prompts(folder, expected, capsys):
    """Each text has a seed of its own, one after the other."""
    prompts = ("--prompt", "All:", "--prompt", "First")
    run.main(command(folder, *prompts, "--samples", "2", "--seed", str(2**32 - 2), "--slots", "2"))
    out = capsys.readouterr().out
    for i, (prompt, seed) in enumerate(
        zip(("All:", "All:", "First", "First"), (-2, -1, 0, 1), strict=True)
    ):
        text = expected(prompt, temperature=0.7, rng_seed=seed % 2**32)
        assert f"[{i + 1}] {text}\n\n" in out
    assert out.count("[") >= 4


def test_a_text_that_ends_before_a_stop(folder, expected, capsys):
    """Wherever it lies in tokens; the slot is then free for the next one."""
    whole = expected("All:", temperature=0.7, rng_seed=42)
    new = whole.removeprefix("All:")
    stop = new[4:7]
    flags = ("--slots", "1", "--stop", "never written", "--stop", stop)
    run.main(command(folder, "--prompt", "All:", *flags))
    assert capsys.readouterr().out == "All:" + new[: new.index(stop)] + "\n"
    run.main(command(folder, "--prompt", "All:", "--prompt", "First", *flags))
    out = capsys.readouterr().out
    assert f"[1] All:{new[: new.index(stop)]}\n\n[2] First" in out


def test_answers_in_json(folder, expected, capsys):
    prompts = ("--prompt", "All:", "--prompt", "é 😀")
    run.main(command(folder, *prompts, "--json", "--temperature", "0"))
    answers = {a["prompt"]: a for a in map(json.loads, capsys.readouterr().out.splitlines())}
    for seed, prompt in enumerate(("All:", "é 😀"), start=42):
        found = answers[prompt]
        assert prompt + found["text"] == expected(prompt, temperature=0.0)
        assert (found["reason"], found["seed"]) == ("length", seed) and found["seconds"] > 0
        assert len(found["tokens"]) == len(found["logprobs"]) == len(found["alternatives"]) == 9
        for token, logprob, likely in zip(
            found["tokens"], found["logprobs"], found["alternatives"], strict=True
        ):
            assert likely[str(token)] == logprob == max(likely.values()) < 0  # the likeliest
            assert len(likely) == runners.TOP_K
    assert "error" not in answers["All:"]


def test_an_answer_in_json_that_fails(folder, capsys, monkeypatch):
    failed = runners.failed(0, ValueError("not finite"))
    monkeypatch.setattr(
        runners.InferenceRunner, "generate", lambda *_: (pair for pair in [(0, failed)])
    )
    with pytest.raises(SystemExit, match="error: prompt 1: not finite"):
        run.main(command(folder, "--prompt", "x", "--json"))
    found = json.loads(capsys.readouterr().out)
    assert (found["reason"], found["error"], found["tokens"]) == ("error", "not finite", [])


def conversation(monkeypatch, *prompts):
    """Somebody at a terminal who asks these; an exception is raised."""
    prompts = iter([*prompts, EOFError()])

    def ask(_):
        prompt = next(prompts)
        if isinstance(prompt, str):
            return prompt
        raise prompt

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)


def test_a_conversation(folder, expected, capsys, monkeypatch):
    other = UnicodeDecodeError("utf-8", b"caf\xe9", 3, 4, "invalid start byte")
    conversation(monkeypatch, "First Citizen:", "x" * 200, "caf\udce9", other, "First Citizen:")
    run.main(command(folder, "--temperature", "0"))
    out, err = capsys.readouterr()
    text = expected("First Citizen:", temperature=0.0)
    assert out == f"{text}\n{text}\n\n"
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert errors[0].startswith("error       a prompt of")  # and the conversation goes on
    assert "(--truncate), or choose a longer --sequence-len" in errors[0]
    assert "the prompt is not UTF-8 text" in errors[1] and "\\udce9" in errors[1]
    assert "the prompt is not UTF-8 text" in errors[2] and "0xe9" in errors[2]
    assert len(errors) == 3
    assert "does not chat; Ctrl-C ends an answer, Ctrl-D leaves" in err


def test_an_interrupted_answer(folder, expected, capsys, monkeypatch):
    """It ends; the conversation goes on, and the slot is free."""
    write, texts = run.write, []

    def interrupted(text):
        texts.append(text)
        if len(texts) == 3:
            raise KeyboardInterrupt
        write(text)

    monkeypatch.setattr(run, "write", interrupted)
    conversation(monkeypatch, "First Citizen:", "First Citizen:")
    run.main(command(folder, "--temperature", "0"))
    text = expected("First Citizen:", temperature=0.0)
    assert capsys.readouterr().out == f"{''.join(texts[:2])}\n{text}\n\n"
    conversation(monkeypatch, KeyboardInterrupt())  # while nothing is generated
    assert refused(command(folder), capsys) == "\ninterrupted"


def test_a_terminal_gets_no_control_characters(capsys, monkeypatch):
    text = "a\tb\n\x07\x1b]0;title\x07\r\x9b2J\x7f\0é"
    run.write(text)
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run.write(text)
    shown = "a\tb\n\\x07\\x1b]0;title\\x07\\r\\x9b2J\\x7f\\x00é"
    assert capsys.readouterr().out == shown


def test_a_sequence_longer_than_the_models(folder, capsys):
    for length, noted in ((64, False), (65, True)):
        run.resolve_config(run.parse_arguments(command(folder, "--sequence-len", str(length))))
        note = "--sequence-len 65 is more than the 64 tokens of the model"
        assert (note in capsys.readouterr().err) == noted


def test_text_that_is_not_utf_8(folder, capsys, monkeypatch, tmp_path):
    (tmp_path / "prompts").write_bytes(b"caf\xe9")
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    for flags, message in (
        (["--prompt", "-"], "stdin is not UTF-8 text ('utf-8' codec can't decode byte 0xe9"),
        (["--prompt", "caf\udce9"], "--prompt is not UTF-8 text ('utf-8' codec can't encode"),
        (["--prompts-file", str(tmp_path / "prompts")], f"{tmp_path}/prompts is not UTF-8 text: b"),
    ):
        text = refused(command(folder, *flags), capsys)
        assert text.startswith(f"error: {message}") and text.endswith("with iconv")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt", "x", "--max-len", "80"], "error: a prompt of 1 tokens and 80 new ones do"),
        (["--prompt", "x", "--mesh", "1,16"], "error: mesh 1,16 needs 16 devices"),
        (
            ["--prompt", "x", "--mesh", "1,8"],
            "48 packed inputs do not split into blocks of 4 over the 8",
        ),
        (["--prompt", "x", "--mesh", "8"], "error: a mesh is two numbers"),
        (["--prompt", "x", "--mesh", "2,1", "--slots", "3"], "error: 3 slots do not spread over"),
        (["--prompt", "x", "--temperature", "-1"], "error: --temperature must be 0 or more"),
        (["--prompt", "x", "--top-p", "0"], "error: --top-p must be above 0"),
        (["--prompt", "x", "--seed", "-1"], "error: --seed must be from 0"),
        (["--prompt", "x", "--max-len", "0"], "error: --max-len must be 1 or more"),
        (["--prompt", "x" * 200], "(--truncate), or choose a longer --sequence-len"),
        (["--prompt", "x", "--preset", "demo"], "tensor files, this model needs"),
        (["--prompt", "x", "--preset", "grok-1"], "Grok-1's tokenizer is tokenizer.model in"),
        (["--prompt", "x", "--preset", "grok-2"], "invalid choice: 'grok-2'"),
        (["--prompt", "x", "--weights", "half"], "invalid choice: 'half'"),
        (
            ["--prompt", "x", "--max-len", "3", "--weights", "float32"],
            "it is int8 in the file, which cannot become float32",
        ),
        (["--prompt", "x", "--sequence-len", "1"], "--sequence-len: must be 2 or more, got 1"),
        (["--prompt", "x", "--distributed", "host"], "error: --distributed is HOST:PORT,N,I"),
        (["--prompts-file", "/nowhere/prompts.txt"], "/nowhere/prompts.txt"),
        ([], "error: no prompt; give --prompt"),
    ],
)
def test_what_is_refused(folder, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    text = refused(["--checkpoint", str(folder), *flags], capsys)
    assert message in text and "Traceback" not in text


def test_a_folder_that_is_no_checkpoint(folder, tmp_path, capsys):
    """Said at once, with where one is."""
    (tmp_path / "checkpoint" / "ckpt-0").mkdir(parents=True)
    for wrong, cure in (
        (tmp_path / "gone", ""),
        (tmp_path, f"{tmp_path}/checkpoint"),
        (folder / "ckpt-0", f"parent, {folder}"),
    ):
        text = refused(["--checkpoint", str(wrong), "--prompt", "x"], capsys)
        assert text.startswith(f"error: {wrong}: no") and text.endswith(cure)


def test_too_little_memory_is_said_before_loading(folder, capsys, monkeypatch):
    monkeypatch.setattr(run.sharding, "memory_limit", lambda mesh: 400_000)
    monkeypatch.setattr(runners.ModelRunner, "load", lambda *_: pytest.fail("loaded"))
    flags = ["--prompt", "x", "--prompt", "y", "--weights", "int8"]
    text = refused(command(folder, *flags), capsys)
    assert text.startswith("error: this needs ") and "on each device, which has 400 kB" in text
    cures = "a larger model axis in --mesh, --weights ternary, fewer --slots, a shorter --sequence"
    assert cures in text
    monkeypatch.setattr(run.sharding, "memory_limit", lambda mesh: 100_000)
    text = refused(command(folder, *flags), capsys)
    assert text.endswith("try a larger model axis in --mesh, --weights ternary")


def test_interrupted(folder, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runners.ModelRunner, "load", interrupt)
    assert refused(command(folder, "--prompt", "x"), capsys) == "\ninterrupted"


@pytest.mark.parametrize("flags, check", [([], True), (["--check"], True), (["--no-check"], False)])
def test_weights_are_checked_unless_asked_not_to(folder, capsys, monkeypatch, flags, check):
    def load(runner, *_, **settings):
        raise ValueError(f"check={settings['check']}")

    monkeypatch.setattr(runners.ModelRunner, "load", load)
    text = refused(command(folder, "--prompt", "x", *flags), capsys)
    assert text == f"error: check={check}"


def test_default_mesh_divides_the_heads():
    assert dict(run.resolve_mesh(None, 2).shape) == {"data": 1, "model": 2}
    assert dict(run.resolve_mesh(None, 6).shape) == {"data": 1, "model": 2}
    assert dict(run.resolve_mesh(None, EVEN.num_kv_heads).shape) == {"data": 1, "model": 8}


def test_flags_change_the_configuration(folder):
    flags = ["--dtype", "bfloat16", "--activations", "int8", "--sequence-len", "20"]
    config = run.resolve_config(run.parse_arguments(command(folder, *flags)))
    assert config == dataclasses.replace(
        CONFIG, fprop_dtype="bfloat16", activations="int8", sequence_len=20
    )
    config = run.resolve_config(run.parse_arguments(command(folder, "--preset", "demo")))
    assert config == model.PRESETS["demo"]


def test_grok_1_is_the_configuration_without_a_file(tmp_path):
    config = run.resolve_config(run.parse_arguments(["--checkpoint", str(tmp_path)]))
    assert config == model.PRESETS["grok-1"]


def test_damaged_weights_end_with_an_error(folder, capsys, monkeypatch):
    load = runners.ModelRunner.load

    def damaged(self, *args, **kwargs):
        load(self, *args, **kwargs)
        self.params = jax.tree.map(lambda x: x * jnp.nan if x.ndim == 1 else x, self.params)

    monkeypatch.setattr(runners.ModelRunner, "load", damaged)
    text = refused(command(folder, "--prompt", "First Citizen:"), capsys)
    assert text.startswith("error: prompt 1: the logits of this request are not finite")
    text = refused(command(folder, "--prompt", "a", "--prompt", "b"), capsys)
    assert "error: prompt 1: the logits" in text and "\nprompt 2: the logits" in text


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_host_is_that_of_all(monkeypatch, failing):
    """Also with the name of a file that is no UTF-8, and more than is sent."""

    def check():
        raise ValueError("caf\udce9: not here" + 2 * run.MESSAGE * "!")

    def gather(own):
        assert own.shape == (run.MESSAGE,) and own.any() == (failing == 0)
        sent.append(own)
        return np.stack([sent[0], np.zeros_like(own)][:: 1 if failing == 0 else -1])

    sent = (
        [] if failing == 0 else [np.frombuffer(b"host 1: bad".ljust(run.MESSAGE, b"\0"), np.uint8)]
    )
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(run.multihost_utils, "process_allgather", gather)
    message = r"^host 0, .*: caf\?: not here!+$" if failing == 0 else "^host 1: bad$"
    with pytest.raises(ValueError, match=message):
        run.on_all_hosts(check if failing == 0 else lambda: 7)


def test_no_cluster_around_it(monkeypatch):
    def initialize():  # which refuses to start where JAX has run
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(SystemExit) as ended:
        run.main(["--prompt", "x", "--distributed"])
    assert "JAX finds no cluster around it (coordinator_address should" in str(ended.value)
    assert "give --distributed HOST:PORT,N,I" in str(ended.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("RESOURCE_EXHAUSTED: 9 GB", "error: no memory is left: RESOURCE_EXHAUSTED: 9 GB\n"),
        ("Gloo failed", "error: another host ended, or cannot be reached: Gloo failed\n"),
    ],
)
def test_an_error_of_a_device_ends_one_of_several_hosts(capsys, monkeypatch, text, said):
    def fail(args):
        raise jax.errors.JaxRuntimeError(text)

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(run, "run", fail)
    monkeypatch.setattr(run.os, "_exit", leave)
    with pytest.raises(SystemExit, match="1"):
        run.main(["--distributed", "a:1,2,0"])
    assert capsys.readouterr().err == said
    with pytest.raises(jax.errors.JaxRuntimeError):  # alone, it is JAX's own
        run.main([])


@pytest.mark.parametrize("mesh", ["0,8", "-1,-4", "2,8"])
def test_a_mesh_that_the_planned_devices_are_not(capsys, mesh):
    message = refused(["--plan", "h200x8", "--preset", "tiny", f"--mesh={mesh}"], capsys)
    assert f"--mesh {mesh} is no mesh of the 8 devices of --plan h200x8" in message
