"""
Why gates: what a plain RNN forgets
===================================

A recurrent network reads a handwritten digit, one row of pixels a step, then nothing but noise for a while, and then has to
say which digit it was. The longer the delay, the longer it has to keep the digit in mind, and the further the gradient has to
travel back in time. This page measures both for a plain RNN, an LSTM and a GRU of the same size: the figure that textbooks
draw.

In a plain RNN, each step back in time multiplies the gradient by the transposed recurrent matrix and by the slope of tanh,
which is below one. So the gradient vanishes (Bengio, Simard and Frasconi, 1994). In an LSTM, a step multiplies the gradient
of the cell state by the forget gate (Hochreiter and Schmidhuber, 1997; Gers et al., 2000), and in a GRU, that of the state by
the update gate (Cho et al., 2014). Where the gate is near one, the gradient passes. A bias of the gate lets it start there
(Jozefowicz et al., 2015).

Data: the 1797 digits of 8 by 8 pixels that scikit-learn ships (UCI, Alpaydin and Kaynak, CC BY 4.0). The noise is made here.
"""

# sphinx_gallery_thumbnail_path = "results/gates.png"

from collections.abc import Iterable, Iterator

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastrnn
from examples.page import Page

page = Page(__file__, __doc__)
CELLS = {"RNN": fastrnn.RNN, "LSTM": fastrnn.LSTM, "GRU": fastrnn.GRU}
DELAYS = page.pick((0, 10, 30, 60, 120), (0, 20))  # steps of noise

# %%
# The data
# --------

digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32, device=page.device)  # [digits, 8, 8]
labels = torch.tensor(digits.target, device=page.device)
train_at, test_at = train_test_split(range(len(labels)), test_size=0.25, random_state=page.seed, stratify=digits.target)


def delayed(images: Tensor, delay: int) -> Tensor:
    """The rows of each digit, and then `delay` rows of noise: [digits, 8, 8] -> [digits, 8 + delay, 8]"""
    return torch.cat([images, 0.2 * torch.randn(len(images), delay, images.shape[2], device=images.device)], dim=1)


# %%
# The model
# ---------
# A gate that keeps the state for T steps is 1 - 1/T, so units start with biases of log T for different T up to the sequence's
# length, and an LSTM's input gate with the opposite (Tallec and Ollivier, 2018). PyTorch adds two biases. Of the gates, in the
# order i, f, g, o (LSTM) or r, z, n (GRU), the second one keeps.


class Remember(nn.Module):
    def __init__(self, cell: str, steps: int, hidden_size: int = 64) -> None:
        super().__init__()
        self.recurrent = CELLS[cell](images.shape[2], hidden_size, batch_first=True)
        self.readout = nn.Linear(hidden_size, 10)
        if cell != "RNN":
            keep = torch.empty(hidden_size).uniform_(1, steps).log()
            biases = self.recurrent.bias_hh_l0.data.split(hidden_size)
            biases[1].copy_(keep)
            if cell == "LSTM":
                biases[0].copy_(-keep)

    def forward(self, rows: Tensor) -> Tensor:
        """[batch, steps, 8] -> [batch, 10] logits"""
        output, _ = self.recurrent(rows)
        return self.readout(output[:, -1])


def batches(delay: int, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch: all digits of training in a new order, and new noise."""
    for chosen in torch.tensor(train_at)[torch.randperm(len(train_at))].split(size):
        yield delayed(images[chosen], delay), labels[chosen]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Take a step for each batch, and return the mean loss."""
    losses = []
    for rows, label in batches:
        loss = cross_entropy(model(rows), label)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


# %%
# How far the gradient reaches
# ----------------------------
# Before any training: the gradient of the loss for what was read so many steps ago, as a share of that for the last step.


def reach(model: nn.Module, steps: int) -> Tensor:
    """[steps] norms of the loss' gradient by the distance of an input to the end; the first is 1."""
    rows = delayed(images[test_at], steps)[:, -steps:].double().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(model(rows), labels[test_at]), rows)
    norms = gradient.norm(dim=(0, 2)).flip(0).cpu()
    return norms / norms[0]


gradients, longest = {}, DELAYS[-1]
for cell in CELLS:
    torch.manual_seed(page.seed)
    gradients[cell] = reach(Remember(cell, longest).to(page.device).double(), longest)
    print(f"{cell}: a step {len(gradients[cell])} steps ago has {gradients[cell][-1]:.1e} of the last step's gradient")

# %%
# Who remembers
# -------------
# Every cell learns every delay from the beginning, with the same number of steps.

jobs = [(cell, delay) for delay in DELAYS for cell in CELLS]
accuracy = {}
for cell, delay in page.progress(jobs):
    torch.manual_seed(page.seed)
    model = Remember(cell, images.shape[1] + delay).to(page.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(page.pick(20, 2)):
        train(model, optimizer, batches(delay))
    with torch.no_grad():
        accuracy[cell, delay] = float((model(delayed(images[test_at], delay)).argmax(1) == labels[test_at]).float().mean())

for delay in DELAYS:
    print(f"delay {delay:3}:", ", ".join(f"{cell} {accuracy[cell, delay]:.0%}" for cell in CELLS))
chance = float(labels[test_at].bincount().max() / len(test_at))
for cell in ("LSTM", "GRU"):
    baselines = {"RNN": accuracy["RNN", longest], "the most frequent digit": chance}
    page.result(f"{cell}'s accuracy after {longest} steps", accuracy[cell, longest], baselines, unit="%")
page.race(Remember("LSTM", longest).to(page.device), train, batches(longest))

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
for cell in CELLS:
    left.semilogy(gradients[cell].numpy(), label=cell)
    right.plot(DELAYS, [100 * accuracy[cell, delay] for delay in DELAYS], "o-", label=cell)
left.set(title="gradient, before training", xlabel="steps back in time", ylabel="norm, relative to the last step's")
right.axhline(100 * chance, color="k", linestyle=":", label="chance")
right.set(title="remembering a digit", xlabel="delay (steps)", ylabel="accuracy (%)", ylim=(0, 102))
for axes in (left, right):
    axes.legend()
page.save(figure)
