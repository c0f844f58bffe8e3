import json
import re
from pathlib import Path

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoint
import evaluate
import files
import model
import runners
import tokenizer

TEXT = "To be, or not to be: that is the question.\n" * 40


@pytest.fixture(scope="module")
def processor():
    return tokenizer.load(None, model.PRESETS["tiny"].vocab_size)


def test_even_odds_cost_log_of_the_vocabulary(processor):
    vocab = len(processor)
    loss = evaluate.text_loss(lambda t: jnp.zeros((*t.shape, vocab)), TEXT, processor, length=50)
    assert loss.tokens == len(processor.encode(TEXT))
    assert loss.characters == len(TEXT)
    np.testing.assert_allclose(loss.per_token, np.log(vocab), rtol=1e-6)
    np.testing.assert_allclose(loss.perplexity, vocab, rtol=1e-5)
    np.testing.assert_allclose(loss.per_character * len(TEXT), np.log(vocab) * loss.tokens, 1e-6)


def test_each_token_is_predicted_from_those_before_it(processor):
    """A model that knows the text by its position pays nothing; windows are in order."""
    tokens = np.array([tokenizer.BOS, *processor.encode(TEXT)])
    seen = []

    def knowing(inputs):
        rows = [row for row in np.asarray(inputs) if row.any()]
        seen.extend(rows)
        starts = [
            next(i for i in range(len(tokens) - 20) if (tokens[i : i + 20] == row).all())
            for row in rows
        ]
        following = np.zeros(inputs.shape, int)
        for row, start in enumerate(starts):
            following[row] = tokens[start + 1 : start + 21]
        return jnp.where(jax.nn.one_hot(following, len(processor)) > 0, 100.0, 0.0)

    assert evaluate.text_loss(knowing, TEXT, processor, length=20).nats < 1e-6
    assert len(seen) == -(-(len(tokens) - 1) // 20)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder in released format of the golden case, and tokens for it."""
    folder = factories.GOLDEN / "single_device"
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokens = np.random.default_rng(0).integers(vocab, size=(2, 7)).astype(np.int32)
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, tokens)
    return folder, path, tokens


@pytest.mark.parametrize("weights", ["ternary", "int8"])
def test_saved_logits_are_the_runners(saved, tmp_path, weights):
    folder, path, tokens = saved
    target = tmp_path / "logits"
    flags = ["--weights", weights, "--dtype", "float32", "--mesh", "1,2"]
    evaluate.main([str(folder), "--tokens", str(path), "--save-logits", str(target), *flags])
    logits = np.load(target)
    assert logits.dtype == np.float32
    config = model.config_from_dict(checkpoint.read_config(folder) | {"fprop_dtype": "float32"})
    runner = runners.ModelRunner(config)
    runner.load(folder, weights)
    # One device against two, whose sums are in another order.
    np.testing.assert_allclose(logits, runner.logits(tokens), atol=1e-4)


def test_errors_are_one_line(saved, tmp_path, capsys):
    folder, path, tokens = saved
    logits = ["--save-logits", str(tmp_path / "logits.npy")]

    def message(*args):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main([str(arg) for arg in args])
        return f"{stopped.value}{capsys.readouterr().err}"

    assert "go together" in message(folder, "--tokens", path)
    wrong = tmp_path / "wrong.npy"
    np.save(wrong, tokens[0])
    assert "wrong.npy: token ids are integers" in message(folder, "--tokens", wrong, *logits)
    np.save(wrong, tokens + 1000)
    text = message(folder, "--tokens", wrong, *logits)
    assert re.search(r"wrong.npy: token id 10\d\d is not in the vocabulary, 0 to 79", text)
    for content in (b"", b"text", b"PK\x03\x04", b"\x93NUMPY"):
        wrong.write_bytes(content)
        text = message(folder, "--tokens", wrong, *logits)
        assert f"error: {wrong} is no .npy file (" in text and "numpy.save" in text
    np.savez(tmp_path / "several.npz", tokens)
    assert "several arrays" in message(folder, "--tokens", tmp_path / "several.npz", *logits)
    (tmp_path / "checkpoint" / "ckpt-0").mkdir(parents=True)
    assert f"{tmp_path}/checkpoint" in message(tmp_path, "--data", __file__)
    assert "no checkpoint here" in message(tmp_path, "--tokens", path, *logits)
    assert "two numbers" in message(folder, "--tokens", path, *logits, "--mesh", "1x8")
    assert "has 1024 pieces, the model has 80" in message(folder, "--data", __file__)
    assert not (tmp_path / "logits.npy").exists()


DEMO = Path(evaluate.__file__).parent / "checkpoints/demo"
TEXTS = (
    DEMO.parents[2] / "shared/data/tinyshakespeare.txt",
    files.cache_folder() / "tinyshakespeare.txt",
)


def test_the_demo_has_the_loss_that_it_says(capsys):
    """Of the packed ternary weights, on text that it was not trained on."""
    text = next((path for path in TEXTS if path.exists()), None)
    if text is None:
        pytest.skip("tinyshakespeare.txt is not here; `train.py --data tinyshakespeare` fetches it")
    evaluate.main([str(DEMO), "--data", str(text)])
    found = float(re.search(r"per character +([\d.]+)", capsys.readouterr().out)[1])
    said = json.loads((DEMO / "training.json").read_text())["validation"]
    assert abs(found - said) < 2e-3  # int8 latents move gamma by 1e-4
    assert found <= 1.75


def test_the_demo_is_small():
    assert sum(path.stat().st_size for path in DEMO.rglob("*")) <= 12e6
