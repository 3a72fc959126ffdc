"""The two training runs of `fastopt demo`: real data, split into training and held-out parts.

Both need no download: scikit-learn ships the digits, Python ships its own sources. A task
holds its initial weights and every batch, so that each optimizer starts from the same point
and sees the same data in the same order.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]

# Long, prose-like modules that every CPython from 3.11 on has. The text is read in this order,
# so the held-out slice at its end is made of modules the training never sees.
STDLIB_MODULES = (
    "argparse", "ast", "bdb", "calendar", "configparser", "copy", "csv", "dataclasses",
    "difflib", "enum", "fractions", "ftplib", "functools", "gettext", "heapq", "inspect",
    "ipaddress", "locale", "mailbox", "mimetypes", "optparse", "pdb", "pickle", "pickletools",
    "platform", "plistlib", "pydoc", "random", "shutil", "smtplib", "socket", "statistics",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "tokenize", "traceback",
    "typing", "uuid",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One training run, fixed before any optimizer is chosen.

    batches    one (inputs, targets) pair a training step
    held_out   (inputs, targets) pairs never trained on
    """

    name: str
    title: str
    model: nn.Module
    lr: float
    batches: list[Batch]
    held_out: list[Batch]

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def n_tensors(self) -> int:
        return sum(1 for _ in self.model.parameters())


def cross_entropy(
    logits: Tensor, targets: Tensor, loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
) -> Tensor:
    """Mean of -log softmax(logits)[target]; logits (..., n_classes), targets (...).

    loss: what computes it, from logits (n, n_classes) and targets (n,).
    """
    return loss(logits.flatten(0, -2), targets.flatten())


def digits_task(seed: int, quick: bool) -> Task:
    """A small convolutional network on scikit-learn's 1,797 scanned digits, one fifth held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target, dtype=torch.int64)
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=random)
    n_held_out = len(labels) // 5
    held_out, training = order[:n_held_out], order[n_held_out:]

    batch_size, n_steps = 64, 30 if quick else 400
    batches: list[Batch] = []
    while len(batches) < n_steps:
        epoch = training[torch.randperm(len(training), generator=random)]
        batches += [(images[rows], labels[rows]) for rows in torch.split(epoch, batch_size)[:-1]]
    return Task(
        name="digits",
        title="Convolutional network on scanned digits",
        model=_seeded(seed, digits_net),
        lr=1e-3,
        batches=batches[:n_steps],
        held_out=[(images[held_out], labels[held_out])],
    )


def text_task(seed: int, quick: bool) -> Task:
    """A character-level transformer on Python's own library sources, the last tenth held out."""
    text = stdlib_text()
    alphabet = sorted(set(text))
    index_of = {character: i for i, character in enumerate(alphabet)}
    ids = torch.tensor([index_of[character] for character in text], dtype=torch.int64)
    n_training = len(ids) * 9 // 10
    training, held_out = ids[:n_training], ids[n_training:]

    n_steps, batch_size, context, n_blocks = (25, 4, 32, 3) if quick else (320, 8, 64, 6)
    random = torch.Generator().manual_seed(seed)
    window = torch.arange(context + 1)

    def sample(source: Tensor, n: int) -> Batch:
        starts = torch.randint(len(source) - context, (n, 1), generator=random)
        windows = source[starts + window]
        return windows[:, :-1], windows[:, 1:]

    return Task(
        name="text",
        title="Character transformer on Python's sources",
        model=_seeded(seed, lambda: CharTransformer(len(alphabet), context, n_blocks)),
        lr=1e-3,
        batches=[sample(training, batch_size) for _ in range(n_steps)],
        held_out=[sample(held_out, 32) for _ in range(2 if quick else 16)],
    )


def digits_net() -> nn.Module:
    """Images (n, 1, 8, 8) in [0, 1] to logits (n, 10).

    Smooth throughout: ReLU or max pooling would blow up the last bit in which two optimizers
    round differently to a loss gap of 1e-2 in 400 steps, and hide what the comparison is to show.
    With GELU, average pooling and group norm it stays below 1e-6.
    """
    return nn.Sequential(
        *_convolution(1, 32),
        *_convolution(32, 64),
        nn.AvgPool2d(2),
        *_convolution(64, 64),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.GELU(),
        nn.Linear(64, 10),
    )


def _convolution(n_in: int, n_out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(n_in, n_out, 3, padding=1), nn.GroupNorm(8, n_out), nn.GELU()


class AddNorm(nn.LayerNorm):
    """Adds a branch to the residual stream and returns (the norm of their sum, the sum)."""

    def forward(self, branch: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        stream = branch + stream
        return super().forward(stream), stream


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Takes and gives x as two summands, the last branch and the stream it has yet to join.
    """

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm = AddNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = AddNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def attention(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        qkv = self.qkv(x).view(n, length, 3, self.n_heads, width // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.projection(mixed.transpose(1, 2).reshape(n, length, width))
        return out

    def forward(self, branch: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        y, stream = self.attention_norm(branch, stream)
        y, stream = self.mlp_norm(self.attention(y), stream)
        return self.mlp(y), stream


class CharTransformer(nn.Module):
    """Character ids (n, length) to next-character logits (n, length, n_characters)."""

    def __init__(
        self, n_characters: int, context: int, n_blocks: int, width: int = 128, n_heads: int = 4
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(n_characters, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, n_heads) for _ in range(n_blocks))
        self.norm = AddNorm(width)
        self.head = nn.Linear(width, n_characters)

    def forward(self, ids: Tensor) -> Tensor:
        branch = self.characters(ids)
        stream = self.positions.weight[: ids.shape[1]].expand_as(branch)
        for block in self.blocks:
            branch, stream = block(branch, stream)
        logits: Tensor = self.head(self.norm(branch, stream)[0])
        return logits


def stdlib_text() -> str:
    """The sources of STDLIB_MODULES, one after the other."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [folder / f"{name}.py" for name in STDLIB_MODULES]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"the demo trains on Python's own library sources, and {folder} lacks "
            f"{', '.join(missing)}: run it with a Python that was installed with its sources"
        )
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def _seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """build() with the same weights for the same seed; the caller's random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
