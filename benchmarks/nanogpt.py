"""A dense GPT with nanoGPT's architecture and settings in PyTorch, on the batches of `train.py`.

    python -m benchmarks.nanogpt --data tinyshakespeare --log nanogpt.jsonl --seed 0

Layers, width, heads, context, vocabulary, the cutting of the text and the number of updates are
those of a preset and of its recipe; the layers are as wide as it takes for as many parameters as
the preset uses for a token. Learned positions, LayerNorm, GELU, tied embeddings, and the optimizer,
learning rate and dropout are those that nanoGPT has for a text of characters of this size. Float32.
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import optax
from tqdm import tqdm

import data
import evaluate
import learning
import model
import tokenizer
import train
from benchmarks import timer

try:
    import torch
    from torch import nn
    from torch.nn import functional
except ImportError:
    text = "PyTorch is not installed; pip install torch==2.13.0"
    raise (SystemExit(f"error: {text}") if __name__ == "__main__" else ImportError(text)) from None

LEARNING_RATE, DROPOUT, BETAS, DECAY = 1e-3, 0.2, (0.9, 0.99), 0.1


class Block(nn.Module):
    """Causal attention and a GELU layer, each after a norm and added to h [B, T, D]."""

    def __init__(self, size: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norms = nn.ModuleList([nn.LayerNorm(size, bias=False) for _ in range(2)])
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.out = nn.Linear(size, size, bias=False)
        self.up = nn.Linear(size, hidden, bias=False)
        self.down = nn.Linear(hidden, size, bias=False)

    def forward(self, h):
        qkv = self.qkv(self.norms[0](h)).unflatten(-1, (3, self.heads, -1))
        dropout = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(
            *qkv.permute(2, 0, 3, 1, 4), is_causal=True, dropout_p=dropout
        )  # [B, heads, T, size of a head]
        h = h + functional.dropout(self.out(y.transpose(1, 2).flatten(2)), dropout)
        y = self.down(functional.gelu(self.up(self.norms[1](h))))
        return h + functional.dropout(y, dropout)


class Gpt(nn.Module):
    """Tokens int64 [B, T] to logits [B, T, V]."""

    def __init__(self, config: model.LanguageModelConfig, dropout: float = 0.0):
        super().__init__()
        size, layers = config.emb_size, config.num_layers
        table = config.vocab_size * size
        of_layer = (train.active_parameters(config) - table) // layers
        hidden = max(1, (of_layer - 4 * size**2) // (2 * size))
        self.dropout = dropout
        self.tokens = nn.Embedding(config.vocab_size, size)
        self.positions = nn.Embedding(config.sequence_len, size)
        self.blocks = nn.Sequential(
            *(Block(size, config.num_q_heads, hidden, dropout) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(size, bias=False)
        for name, w in self.named_parameters():
            if w.ndim > 1:
                added = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(w, std=0.02 / math.sqrt(2 * layers if added else 1))

    def forward(self, tokens):
        h = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        h = functional.dropout(h, self.dropout, self.training)
        return self.norm(self.blocks(h)) @ self.tokens.weight.T


def make_optimizer(gpt: Gpt) -> torch.optim.Optimizer:
    groups = [
        {"params": [w for w in gpt.parameters() if w.ndim > 1], "weight_decay": DECAY},
        {"params": [w for w in gpt.parameters() if w.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, LEARNING_RATE, BETAS, fused=True)


def schedule(settings: learning.Settings) -> optax.Schedule:
    """A linear warm-up, then a cosine to a tenth."""
    peak, warmup = settings.learning_rate, settings.warmup
    return optax.warmup_cosine_decay_schedule(
        peak / (warmup + 1), peak, warmup, settings.steps, 0.1 * peak
    )


def tensor(tokens: np.ndarray) -> torch.Tensor:
    """int64 [B, T] of int32."""
    return torch.from_numpy(tokens.astype(np.int64))


def update(gpt: Gpt, optimizer, tokens: torch.Tensor) -> torch.Tensor:
    """One step on int64 [B, T + 1]; the loss."""
    logits = gpt(tokens[:, :-1])
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def run(config, settings: learning.Settings, text: str, log: Path) -> dict:
    """Trains; a line of the log for each evaluation, the last of which is returned."""
    torch.manual_seed(settings.seed)
    processor = tokenizer.load(None, config.vocab_size)
    training, validation = data.split(text)
    texts = train.Texts(processor, training, settings, config.sequence_len)
    gpt = Gpt(config, settings.dropout)
    optimizer, rate = make_optimizer(gpt), schedule(settings)
    print(f"{sum(w.numel() for w in gpt.parameters()):,} parameters, {timer.processor()}")

    def logits(tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return gpt(tensor(tokens)).numpy()

    losses, since = [], time.perf_counter()
    log.write_text("")
    for i in (bar := tqdm(range(settings.steps), unit="step")):
        for group in optimizer.param_groups:
            group["lr"] = float(rate(i))
        losses.append(update(gpt, optimizer, tensor(texts.batch(i))))
        if (i + 1) % settings.eval_every and i + 1 != settings.steps:
            continue
        seconds = time.perf_counter() - since
        row = {
            "step": i + 1,
            "train": float(torch.stack(losses).mean()) / texts.characters_per_token,
            "tokens_per_second": len(losses) * texts.batch_size * texts.length / seconds,
        }
        gpt.eval()
        loss = evaluate.text_loss(logits, validation, processor, texts.length)
        gpt.train()
        row["validation"] = loss.per_character
        bar.set_postfix(train=f"{row['train']:.3f}", validation=f"{row['validation']:.3f}")
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        losses, since = [], time.perf_counter()
    return row


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help=f"text file, or one of {list(data.SOURCES)}")
    parser.add_argument("--log", type=Path, required=True, help="where to write evaluations")
    parser.add_argument("--preset", default="demo", choices=model.PRESETS, help="(demo)")
    parser.add_argument("--steps", type=int, default=learning.Settings.steps, help="updates")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout (0)")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="(%(default)s)")
    parser.add_argument("--dropout", type=float, default=DROPOUT, help="(%(default)s)")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in ("steps", "seed", "learning_rate", "dropout")}
    settings = dataclasses.replace(learning.Settings(), **given)
    last = run(model.PRESETS[args.preset], settings, data.load_text(args.data), args.log)
    print(f"validation {last['validation']:.4f} nats per character after {last['step']} steps")


if __name__ == "__main__":
    main()
