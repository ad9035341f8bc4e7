"""
Action recognition: what is the pendulum doing?
===============================================

A camera films a pendulum that spins to the left or to the right, swings, is held upright, or is brought to rest. Every
picture shows the same pendulum, so no single one tells what is going on: that is in the order of the pictures. A small
convolutional network sums up each picture, and a GRU reads the sums.

Two baselines share the network that looks at pictures. The first sees one picture, the second the whole clip, but without the
order of its pictures: it takes their mean.

Data: clips rendered from ``gymnasium`` (MIT licence), ``Pendulum-v1``. The camera's brightness and noise are made here.
"""

# sphinx_gallery_thumbnail_path = "results/actions.png"
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastrnn
from examples.page import Page
from examples.pendulums import ACTIONS, film

page = Page(__file__, __doc__)
FRAMES, PIXELS = 16, 24
random = np.random.default_rng(page.seed)

# %%
# The clips
# ---------
# ``film`` lets the pendulum start somewhere, pushes it such that it does what it should, and takes pictures.


def record(count: int, what: str) -> tuple[Tensor, Tensor]:
    """[count, FRAMES, 1, PIXELS, PIXELS] clips, and their labels."""
    labels = np.arange(count) % len(ACTIONS)
    clips = np.stack([film(ACTIONS[label], FRAMES, PIXELS, random) for label in page.progress(labels.tolist(), what)])
    clips = clips * random.uniform(0.5, 1, (count, 1, 1, 1)) + random.normal(0, 0.1, clips.shape)
    return torch.tensor(clips, dtype=torch.float32, device=page.device).unsqueeze(2), torch.tensor(labels, device=page.device)


train_clips, train_labels = record(page.pick(1000, 40), "filming for training")
test_clips, test_labels = record(page.pick(300, 20), "filming for the test")


# %%
# The model
# ---------


class Recogniser(nn.Module):
    """Names the action of a clip. Reads it in order with a GRU, or takes the mean of its pictures."""

    def __init__(self, recurrent: bool, hidden_size: int = 64) -> None:
        super().__init__()
        self.look = nn.Sequential(  # [*, 1, PIXELS, PIXELS] -> [*, 64]
            nn.Conv2d(1, 8, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * (PIXELS // 4) ** 2, 64),
            nn.ReLU(),
        )
        self.gru = fastrnn.GRU(64, hidden_size, batch_first=True) if recurrent else None
        self.readout = nn.Linear(hidden_size, len(ACTIONS))

    def forward(self, clips: Tensor) -> Tensor:
        """[batch, frames, 1, PIXELS, PIXELS] -> [batch, actions] logits"""
        if not clips.shape[1]:
            raise ValueError("clips: expected at least one frame, got an empty clip")
        seen = self.look(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
        return self.readout(self.gru(seen)[0][:, -1] if self.gru else seen.mean(1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Take a step for each batch of (clips, labels), and return the mean loss."""
    losses = []
    for clips, labels in batches:
        loss = cross_entropy(model(clips), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


def batches(frames: slice, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch of clips in a new order, of which these frames are shown."""
    for chosen in torch.randperm(len(train_labels), device=page.device).split(size):
        yield train_clips[chosen, frames], train_labels[chosen]


everything, middle = slice(None), slice(FRAMES // 2, FRAMES // 2 + 1)
accuracy, confusion = {}, torch.zeros(len(ACTIONS), len(ACTIONS))
for name, frames in {"GRU": everything, "pictures without order": everything, "one picture": middle}.items():
    recurrent = name == "GRU"
    model = Recogniser(recurrent).to(page.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in page.progress(range(page.pick(25, 2)), name):
        train(model, optimizer, batches(frames))
    with torch.no_grad():
        named = model(test_clips[:, frames]).argmax(1)
    accuracy[name] = float((named == test_labels).double().mean())
    if recurrent:
        page.race(model, train, batches(frames))
        for truth, guess in zip(test_labels.tolist(), named.tolist()):
            confusion[truth, guess] += 1

page.result("actions recognised", accuracy.pop("GRU"), accuracy, unit="%")

figure = plt.figure(figsize=(11, 4), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(1.6, 1), squeeze=False)[0]
plots = left.subplots(len(ACTIONS), 1)
for action, axes in enumerate(plots):
    clip = train_clips[action, ::2, 0].cpu()  # the labels go round
    axes.imshow(torch.cat(list(clip), dim=1).numpy(), cmap="gray")
    axes.set(xticks=[], yticks=[])
    axes.set_ylabel(ACTIONS[action], rotation=0, ha="right", va="center")
left.suptitle("every second picture of a clip")
axes = right.subplots()
axes.imshow(confusion.numpy(), cmap="Blues")
axes.set(title="the GRU's guesses", xticks=range(len(ACTIONS)), yticks=range(len(ACTIONS)), ylabel="action")
axes.set_xticklabels(ACTIONS, rotation=30, ha="right")
axes.set_yticklabels(ACTIONS)
axes.grid(False)
page.save(figure)
