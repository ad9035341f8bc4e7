"""A character language model, trained on torch.nn and on fastrnn side by side: same seed, same losses, less waiting.

    python examples/char_lm.py --cell lstm --hidden-size 256

The text is the Python language reference, which ships with CPython. Both models take each batch in turn; at the end
stand a table of their losses and seconds, some text that fastrnn's model wrote, and a picture of loss against time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastrnn

LIBRARIES = {"torch.nn": nn, "fastrnn": fastrnn}
EMBEDDING_SIZE = 64
TABLE_ROWS = 10


class CharModel(nn.Module):
    """Predicts each next character. `library` is where the recurrent layers come from: the only difference there is."""

    def __init__(self, library: ModuleType, cell: str, vocabulary: int, hidden_size: int, layers: int):
        super().__init__()
        recurrent = getattr(library, cell.upper())  # LSTM, GRU or RNN
        self.embedding = nn.Embedding(vocabulary, EMBEDDING_SIZE)
        self.recurrent = recurrent(EMBEDDING_SIZE, hidden_size, layers, batch_first=True)
        self.readout = nn.Linear(hidden_size, vocabulary)

    def forward(self, characters: Tensor, states=None):
        """[batch, steps] characters -> ([batch, steps, vocabulary] logits, final states)."""
        hidden, states = self.recurrent(self.embedding(characters), states)
        return self.readout(hidden), states


@dataclass
class Run:
    """A model in training, and how it fares."""

    model: CharModel
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of training so far, after each step

    def step(self, batch: Tensor) -> None:
        """Train on [batch, steps + 1] characters."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        logits, _ = self.model(batch[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append((self.seconds or [0.0])[-1] + time.perf_counter() - start)


def read_text() -> str:
    """English prose, half a million characters of it, as ASCII and without the rulers under its headings."""
    lines = "\n\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore").decode().splitlines()
    return "\n".join(line for line in lines if not line or set(line) - set("*=-~^"))


def train(runs: Sequence[Run], data: Tensor, options: argparse.Namespace, console: Console) -> None:
    """Give every batch to every run; their order alternates, so that none always has the warm caches."""
    sampler = torch.Generator().manual_seed(options.seed)
    window = torch.arange(options.sequence_length + 1)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=options.steps)
        for step in range(options.steps):
            starts = torch.randint(len(data) - len(window), (options.batch_size, 1), generator=sampler)
            batch = data[starts + window]
            for run in runs if step % 2 else reversed(runs):
                run.step(batch)
            progress.update(task, advance=1, description=f"loss {runs[-1].losses[-1]:.3f}")


@torch.no_grad()
def write(model: CharModel, alphabet: str, length: int, seed: int, temperature: float = 0.6) -> str:
    """Text that the model writes, character by character."""
    sampler = torch.Generator().manual_seed(seed)
    text, states = "The ", None
    characters = torch.tensor([[alphabet.index(character) for character in text]])
    for _ in range(length):
        logits, states = model(characters, states)
        characters = torch.multinomial((logits[:, -1] / temperature).softmax(-1), 1, generator=sampler)
        text += alphabet[int(characters)]
    return text


def comparison(runs: dict[str, Run]) -> Table:
    """Losses and seconds of both, at some steps."""
    table = Table("step", title="both models, step by step")
    for name in runs:
        table.add_column(f"loss\n{name}", justify="right")
    table.add_column("difference", justify="right")
    for name in runs:
        table.add_column(f"seconds\n{name}", justify="right")
    a, b = runs.values()
    steps = len(a.losses)
    for step in sorted({round(1 + row * (steps - 1) / (TABLE_ROWS - 1)) for row in range(TABLE_ROWS)}):
        at = step - 1
        losses = (f"{a.losses[at]:.5f}", f"{b.losses[at]:.5f}", f"{abs(a.losses[at] - b.losses[at]):.0e}")
        table.add_row(str(step), *losses, f"{a.seconds[at]:.1f}", f"{b.seconds[at]:.1f}")
    return table


def draw(runs: dict[str, Run], title: str, path: Path) -> None:
    """Loss against seconds of training, smoothed over a few steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, run in runs.items():
        width = max(1, len(run.losses) // 50)
        smooth = torch.tensor(run.losses).unfold(0, width, 1).mean(-1)
        axes.plot(run.seconds[width - 1 :], smooth, label=f"{name}, {run.seconds[-1]:.0f} s")
    axes.set(xlabel="seconds of training", ylabel="loss (nats per character)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cell", choices=("lstm", "gru", "rnn"), default="lstm")
    parser.add_argument("--hidden-size", type=int, default=256, help="(default %(default)s)")
    parser.add_argument("--layers", type=int, default=1, help="(default %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="batches to train on (default %(default)s)")
    parser.add_argument("--threads", type=int, help="(default: torch's own choice)")
    parser.add_argument("--batch-size", type=int, default=32, help="(default %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=100, help="(default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("char_lm.png"), help="the picture (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Run]:
    """Run the example; returns the finished runs by library."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(highlight=False)
    text = read_text()
    alphabet = "".join(sorted(set(text)))
    index = {character: at for at, character in enumerate(alphabet)}
    data = torch.tensor([index[character] for character in text])

    runs = {}
    for name, library in LIBRARIES.items():
        torch.manual_seed(options.seed)  # the same seed gives both the same initial weights
        model = CharModel(library, options.cell, len(alphabet), options.hidden_size, options.layers)
        runs[name] = Run(model, torch.optim.Adam(model.parameters(), lr=options.learning_rate))
    example = torch.zeros(options.batch_size, options.sequence_length, EMBEDDING_SIZE)
    console.print(f"{len(text):,} characters of English, {len(alphabet)} different; {torch.get_num_threads()} threads")
    console.print(f"{model.recurrent}\n{fastrnn.explain(model.recurrent, example)}\n")

    train(list(runs.values()), data, options, console)

    console.print(comparison(runs))
    theirs, ours = runs["torch.nn"], runs["fastrnn"]
    a, b = theirs.seconds[-1], ours.seconds[-1]
    console.print(f"seconds of training: torch.nn {a:.1f}, fastrnn {b:.1f}: {a / b:.2f} times as fast\n")
    console.print(Panel(Text(write(ours.model, alphabet, 400, options.seed)), title="written by fastrnn's model"))
    draw(runs, f"{options.cell.upper()}, {options.hidden_size} units, {options.layers} layer(s)", options.output)
    console.print(f"picture: {options.output}")
    return runs


if __name__ == "__main__":
    main()
