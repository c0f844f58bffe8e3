"""SentencePiece tokenizers: loading with a check, encoding, streamed decoding, training our own.

The `tokenizer.model` of the demo model, `checkpoints/demo`, comes from

    python tokenizer.py tinyshakespeare --vocab-size 1024 --output tokenizer.model

with ids 0 to 4 as in Grok-1 ([PAD], [BOS], [EOS], [UNK], newline), then the 256 bytes, so that any
text can be encoded. Encoding and decoding give the text back exactly, but for U+2581, which
SentencePiece itself writes for a space: it comes back as one.
"""

import argparse
import io
import itertools
import os
import re
import sys
from pathlib import Path

import numpy as np
import sentencepiece

import data
import files

PAD, BOS, EOS, UNK = range(4)
FILE = "tokenizer.model"
DEMO = Path(__file__).parent / "checkpoints/demo" / FILE
GROK_1_SIZE = 131072  # pieces
GROK_1_SHA256 = "5c69d7cbad192fa2c9d14e2a77fbfdc11597c68907b043ddb0260e3d28eddd7f"


def load(folder: str | os.PathLike | None, vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    """Tokenizer of a checkpoint folder: its `tokenizer.model`, else the demo's.

    Raises ValueError when the file is no SentencePiece model or has not `vocab_size` pieces.
    """
    own = Path(folder) / FILE if folder is not None else DEMO
    path = own if own.is_file() else DEMO
    if vocab_size == GROK_1_SIZE:
        cure = (
            f"Grok-1's tokenizer is {FILE} in github.com/xai-org/grok-1"
            f" (2,229,219 bytes, sha256 {GROK_1_SHA256}): put it at {own}"
        )
    else:
        cure = f"put the {FILE} that the model was trained with at {own}"
    tokenizer = read(path, cure)
    if len(tokenizer) != vocab_size:
        missing = "" if path == own else f" ({own} does not exist)"
        raise ValueError(
            f"{path}{missing} has {len(tokenizer)} pieces, the model has {vocab_size}; {cure}"
        )
    return tokenizer


def read(path: Path, cure: str) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer in a file; ValueError, which ends with the cure, if it is none."""
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        raise ValueError(f"{path} is not a SentencePiece model ({error}); {cure}") from error


def encode(
    tokenizer: sentencepiece.SentencePieceProcessor, text: str, dropout: float = 0.0, seed: int = 0
) -> np.ndarray:
    """Tokens of a text, int32 [N], without [BOS].

    With dropout, each place between two characters is cut with that probability, and no token
    reaches across a cut: the same text is cut differently for each seed, a regulariser for small
    texts. A token of n characters stays whole as often as in BPE-dropout (Provilkov et al. 2020),
    (1 - dropout)^(n - 1). SentencePiece's own is seeded by the process besides, so that no run
    could resume exactly.

    Raises ValueError for a tokenizer that starts each part with a space.
    """
    if not dropout:
        return np.array(tokenizer.encode(text), np.int32)
    random = np.random.default_rng(seed)
    cuts = np.flatnonzero(random.random(max(len(text) - 1, 0)) < dropout) + 1
    ends = [0, *cuts.tolist(), len(text)]
    parts = tokenizer.encode([text[start:end] for start, end in itertools.pairwise(ends)])
    if "".join(map(tokenizer.decode, parts[:9])) != tokenizer.decode(sum(parts[:9], [])):
        raise ValueError("this tokenizer adds spaces where a text is cut: set bpe_dropout to 0")
    return np.array([token for part in parts for token in part], np.int32)


class StreamDecoder:
    """Text of tokens that come one by one; never half a character.

    What `push` returned so far and then `flush` make up `tokenizer.decode` of all the tokens.
    """

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor):
        self.tokenizer = tokenizer
        self.context = []  # the first tokens, up to some text: a space at the start may be dropped
        self.rest = b""  # bytes of an unfinished character

    def push(self, token: int) -> str:
        """Text that became certain with this token; often one piece, "" within a character."""
        token = int(token)
        before = self.tokenizer.decode(self.context)
        if self.tokenizer.is_byte(token):
            self.rest += bytes([int(self.tokenizer.id_to_piece(token)[3:5], 16)])  # "<0x0A>"
            text = self._take()
        else:
            after = self.tokenizer.decode([*self.context, token])
            text = self.flush() + after[len(before) :]
        if not before:
            self.context.append(token)
        return text

    def flush(self) -> str:
        """Text for the bytes still held back, one U+FFFD each, as SentencePiece decodes them."""
        text, self.rest = "\ufffd" * len(self.rest), b""
        return text

    def _take(self) -> str:
        text = ""
        while self.rest:
            try:
                text, self.rest = text + self.rest.decode("utf-8"), b""
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                text, self.rest = text + "\ufffd", self.rest[1:]
        return text


def train(text: str, vocab_size: int) -> bytes:
    """Contents of a `tokenizer.model` for a text: BPE with byte fallback, normalizing nothing.

    The same text gives the same bytes. No piece crosses a line, for the newline is one itself.
    Raises ValueError when the text has too few different pieces, or `vocab_size` too little room.
    """
    lines = [line for line in text.split("\n") if line]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            character_coverage=1.0,
            max_sentence_length=max(10, *map(len, map(str.encode, lines)), 0),
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            pad_piece="[PAD]",
            bos_piece="[BOS]",
            eos_piece="[EOS]",
            unk_piece="[UNK]",
            unk_surface="",
            user_defined_symbols=["\n"],
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        # "INTERNAL: file(line) [condition] what a reader can use Increase some --flag of theirs"
        reason = (
            str(error).rpartition("] ")[2].partition(" Increase ")[0] or "there are no lines in it."
        )
        raise ValueError(
            f"no tokenizer of {vocab_size} pieces from {len(text)} characters: {reason} Take a "
            "longer text, or another number of pieces"
        ) from error
    return model.getvalue()


def train_at_most(text: str, vocab_size: int) -> bytes:
    """`train`, with as many pieces as the text is good for where these are fewer."""
    try:
        return train(text, vocab_size)
    except ValueError as error:
        most = re.search(r"set it to a value <= (\d+)", str(error))
        if most is None:
            raise
        return train(text, int(most[1]))


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Train a tokenizer on the training part of a text")
    parser.add_argument("text", help=f"a text file, or one of {sorted(data.SOURCES)}")
    parser.add_argument("--vocab-size", type=int, default=1024, help="pieces (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="new file to write")
    args = parser.parse_args(argv)
    try:
        if args.output.exists():
            raise FileExistsError(f"{args.output} exists: remove it, or give another --output")
        training, validation = data.split(data.load_text(args.text))
        model = train(training, args.vocab_size)
        files.write_bytes(args.output, model)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    print(f"{args.output}: {len(tokenizer)} pieces, {len(model):,} bytes")
    for name, part in [("training", training), ("validation", validation)]:
        count = len(tokenizer.encode(part))
        print(f"{name}: {len(part):,} characters, {count:,} tokens, {len(part) / count:.3f} each")


if __name__ == "__main__":
    main()
