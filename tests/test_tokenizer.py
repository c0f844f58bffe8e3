import hashlib
import io
import re
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import sentencepiece
from hypothesis import strategies as st

import data
import tokenizer

SHARED = Path(__file__).resolve().parents[1] / "../shared/data"
GROK_1 = SHARED / "grok1_tokenizer.model"
TEXT = SHARED / "tinyshakespeare.txt"
SPEECH = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"
SPACE = "\u2581"  # SentencePiece's sign for a space: the one character that is not kept

needs_grok_1 = pytest.mark.skipif(
    not GROK_1.is_file(), reason="needs Grok-1's tokenizer as ../shared/data/grok1_tokenizer.model"
)
property_test = hypothesis.settings(deadline=None)  # a busy machine is no failure


@pytest.fixture(scope="module", params=["demo", pytest.param("grok-1", marks=needs_grok_1)])
def processor(request, tmp_path_factory):
    if request.param == "demo":
        return tokenizer.load(None, 1024)
    return load_grok_1(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def demo():
    return tokenizer.load(None, 1024)


def load_grok_1(folder):
    (folder / "tokenizer.model").symlink_to(GROK_1.resolve())
    return tokenizer.load(folder, 131072)


def stream(processor, tokens):
    """Pieces of text in the order they come, the flushed one last."""
    decoder = tokenizer.StreamDecoder(processor)
    return [decoder.push(token) for token in tokens] + [decoder.flush()]


# Loading


def test_special_ids_are_those_of_grok_1(processor):
    pieces = [processor.id_to_piece(i) for i in range(5)]
    assert pieces == ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "\n"]
    assert [processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()] == [
        tokenizer.PAD,
        tokenizer.BOS,
        tokenizer.EOS,
        tokenizer.UNK,
    ]


def test_load_prefers_the_checkpoint_folder(tmp_path):
    assert len(tokenizer.load(tmp_path, 1024)) == 1024
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.train(SPEECH, 300))
    assert len(tokenizer.load(tmp_path, 300)) == 300


def test_the_demo_has_its_own():
    folder = Path(tokenizer.__file__).parent / "checkpoints/demo"
    assert (folder / "config.json").exists() and tokenizer.DEMO.parent == folder
    assert len(tokenizer.load(folder, 1024)) == 1024


def test_load_says_how_to_get_the_tokenizer_of_grok_1(tmp_path):
    own = tmp_path / "tokenizer.model"
    message = (
        rf"^{re.escape(f'{tokenizer.DEMO} ({own} does not exist)')} has 1024 pieces,"
        r" the model has 131072; .*github.com/xai-org/grok-1 \(2,229,219 bytes, sha256 5c69d7cb.*"
        rf" put it at {re.escape(str(own))}$"
    )
    with pytest.raises(ValueError, match=message):
        tokenizer.load(tmp_path, 131072)


def test_load_refuses_another_size(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer.train(SPEECH, 300))
    with pytest.raises(
        ValueError, match="tokenizer.model has 300 pieces, the model has 1024; put the"
    ):
        tokenizer.load(tmp_path, 1024)


def test_load_refuses_other_files(tmp_path):
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model.* put"):
        tokenizer.load(tmp_path, 1024)


@needs_grok_1
def test_grok_1(tmp_path):
    assert hashlib.sha256(GROK_1.read_bytes()).hexdigest() == tokenizer.GROK_1_SHA256
    processor = load_grok_1(tmp_path)
    assert len(processor) == tokenizer.GROK_1_SIZE == 131072
    sentence = "The answer to life the universe and everything is of course"
    tokens = [422, 3033, 356, 1180, 333, 9072, 360, 2175, 391, 359, 1805]
    assert tokenizer.encode(processor, sentence).tolist() == tokens
    assert processor.decode(tokens) == sentence


# Encoding


@property_test
@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPACE)))
@hypothesis.example(" \t  two\n\n\nlines\r\n ")
@hypothesis.example("\0 [PAD] <0x41> \U0001f468\u200d\U0001f469\u200d\U0001f467 \u0301e\ufb01")
def test_any_text_comes_back(processor, text):
    tokens = tokenizer.encode(processor, text)
    assert tokens.dtype == np.int32
    assert tokenizer.UNK not in tokens
    assert processor.decode(tokens.tolist()) == text


def test_one_character_does_not_come_back(demo):
    assert demo.decode(demo.encode(f"a{SPACE}b")) == "a b"  # as the module's docstring says


def test_pieces_stay_within_a_line(demo):
    for i in range(len(demo)):
        assert "\n" not in demo.id_to_piece(i) or i == 4


def test_names_of_special_tokens_are_ordinary_text(processor):
    assert min(tokenizer.encode(processor, "[PAD][BOS][EOS][UNK]")) > tokenizer.UNK


def test_dropout_is_fixed_by_its_seed(demo):
    text = SPEECH * 20
    plain = tokenizer.encode(demo, text)
    first, other, again = (tokenizer.encode(demo, text, 0.1, seed) for seed in (1, 2, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(plain) < len(first) < 1.5 * len(plain)
    assert demo.decode(first.tolist()) == demo.decode(other.tolist()) == text
    np.testing.assert_array_equal(tokenizer.encode(demo, text), plain)
    pieces = [demo.id_to_piece(i) for i in tokenizer.encode(demo, "to be or not to be", 0.2, 3)]
    assert pieces == [
        "t",
        "o",
        "▁be",
        "▁or",
        "▁n",
        "ot",
        "▁to",
        "▁be",
    ]  # in this process as in any other


def test_dropout_needs_a_tokenizer_that_adds_no_spaces():
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SPEECH]), model_writer=written, vocab_size=34, minloglevel=2
    )
    adding = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    with pytest.raises(ValueError, match="adds spaces where a text is cut: set bpe_dropout to 0"):
        tokenizer.encode(adding, SPEECH, 0.3, 0)


# Streamed decoding


@property_test
@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"])))
@hypothesis.example("  two spaces")
def test_stream_of_a_text(processor, text):
    tokens = tokenizer.encode(processor, text).tolist()
    pieces = stream(processor, tokens)
    assert "".join(pieces) == processor.decode(tokens)
    assert pieces[-1] == ""


BYTES = st.sampled_from([0x41, 0x80, 0x9F, 0xA0, 0xBF, 0xC1, 0xC3, 0xE2, 0xED, 0xF0, 0xF4, 0xFF])


@property_test
@hypothesis.given(st.lists(BYTES | st.integers(0, 1023) | st.integers(0, 4).map(lambda i: -i)))
def test_stream_of_any_tokens(processor, choices):
    """Bytes that make no character, special tokens and spaces at the start."""
    first = processor.piece_to_id("<0x00>")
    space = processor.piece_to_id(SPACE)
    tokens = [space if i == 0 else -i if i < 0 else first + i if i < 256 else i for i in choices]
    assert "".join(stream(processor, tokens)) == processor.decode(tokens)


def test_stream_holds_back_half_characters(demo):
    tokens = [demo.piece_to_id(f"<0x{byte:02X}>") for byte in "é😀".encode()]
    assert stream(demo, tokens) == ["", "é", "", "", "", "😀", ""]


def test_stream_gives_up_on_bytes_that_make_no_character(demo):
    ids = [demo.piece_to_id(piece) for piece in ("<0xF0>", "<0x9F>", SPACE + "the", "<0xE2>")]
    assert stream(demo, ids) == ["", "", "\ufffd\ufffd the", "", "\ufffd"]


def test_stream_takes_array_scalars(demo):
    tokens = [np.array(token) for token in tokenizer.encode(demo, SPEECH)]
    assert "".join(stream(demo, tokens)) == SPEECH


# Training


def test_training_is_reproducible():
    first = tokenizer.train(SPEECH, 300)
    assert tokenizer.train(SPEECH, 300) == first
    assert tokenizer.train(SPEECH + "proceed proceed", 300) != first


@pytest.mark.skipif(not TEXT.is_file(), reason="needs ../shared/data/tinyshakespeare.txt")
def test_demo_tokenizer_is_what_training_gives(demo):
    training, validation = data.split(data.load_text(TEXT))
    assert tokenizer.train(training, 1024) == tokenizer.DEMO.read_bytes()
    assert len(demo.encode(validation)) == 50439  # 2.21 characters each


def test_training_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"no tokenizer of 100 pieces from 81 characters: .*"):
        tokenizer.train(SPEECH, 100)
    with pytest.raises(ValueError, match=r"no tokenizer of 9999 pieces"):
        tokenizer.train(SPEECH, 9999)


def test_training_takes_fewer_pieces_where_there_are_no_more():
    assert tokenizer.train_at_most(SPEECH, 300) == tokenizer.train(SPEECH, 300)
    fewer = tokenizer.train_at_most(SPEECH, 9999)
    pieces = len(sentencepiece.SentencePieceProcessor(model_proto=fewer))
    assert fewer == tokenizer.train(SPEECH, pieces)
    with pytest.raises(ValueError, match=f"no tokenizer of {pieces + 1} pieces"):
        tokenizer.train(SPEECH, pieces + 1)
    with pytest.raises(ValueError, match="no tokenizer of 100 pieces"):
        tokenizer.train_at_most(SPEECH, 100)


def test_command_trains_on_the_first_nine_tenths(tmp_path, capsys):
    text, output = tmp_path / "text.txt", tmp_path / "new.model"
    text.write_text(SPEECH * 9 + "é" * len(SPEECH))
    tokenizer.main([str(text), "--vocab-size", "300", "--output", str(output)])
    assert output.read_bytes() == tokenizer.train(SPEECH * 9, 300)
    printed = capsys.readouterr().out
    assert "300 pieces" in printed
    assert "training: 729 characters" in printed
    assert "validation: 81 characters, 162 tokens, 0.500 each" in printed


def test_command_overwrites_no_tokenizer(tmp_path, capsys):
    """Least of all the one of the demo model."""
    text = tmp_path / "text.txt"
    text.write_text(SPEECH * 9)
    before = tokenizer.DEMO.read_bytes()
    with pytest.raises(SystemExit):
        tokenizer.main([str(text), "--vocab-size", "300"])
    assert "required: --output" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"tokenizer.model exists: remove it, or give another --o"):
        tokenizer.main([str(text), "--vocab-size", "300", "--output", str(tokenizer.DEMO)])
    assert tokenizer.DEMO.read_bytes() == before


@pytest.mark.parametrize(
    "text, reason",
    [
        (
            "hello\n",
            "1024 pieces from 5 characters: Vocabulary size too high (1024). Please set it",
        ),
        ("", "1024 pieces from 0 characters: there are no lines in it. Take a longer text"),
        ("\n" * 9, "1024 pieces from 8 characters: there are no lines in it. Take a longer text"),
    ],
)
def test_command_says_that_a_text_is_too_short(tmp_path, text, reason):
    path, output = tmp_path / "text.txt", tmp_path / "new.model"
    path.write_text(text)
    with pytest.raises(SystemExit, match=re.escape(f"error: no tokenizer of {reason}")) as error:
        tokenizer.main([str(path), "--output", str(output)])
    assert ".cc(" not in str(error.value) and not output.exists()
