"""A small GPT-2 with the modules of torch, and batches for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, CONTEXT, WIDTH, HEADS, DEPTH, BATCH = 24, 8, 16, 4, 2, 3


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.softmax = nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        heads = [
            layer(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        ]
        q, k, v = heads
        scores = q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        weights = self.softmax(scores.masked_fill(future, -torch.inf))
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Block(nn.Module):
    """With norms before and behind its halves; `parted`: a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.parted = False
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), Attention(), nn.RMSNorm(WIDTH)
        self.norm3, self.feed, self.norm4 = nn.LayerNorm(WIDTH), FeedForward(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm2(self.attention(self.norm1(x)))
        if self.parted:
            torch._dynamo.graph_break()
        return x + self.norm4(self.feed(self.norm3(x)))


class GPT(nn.Module):
    """Tokens and targets, (batch, context), to the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, tokens: Tensor, targets: Tensor) -> Any:
        x = self.tokens(tokens)
        x = x + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.loss(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]
