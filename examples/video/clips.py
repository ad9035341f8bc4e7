"""
Clip classification: a digit that passes behind a slit
======================================================

A handwritten digit moves behind a narrow slit, at its own speed, from the left or from the right. Each picture of the clip
shows two of the digit's columns and much noise. To name the digit, one has to put together what was seen over time. A small
network looks at each picture, and a GRU puts the looks together.

Clips have different lengths, because digits have different speeds. They are packed, so nothing is computed for padding.

The baseline looks at each picture with the same network and takes the mean of its votes over the clip.

Data: the 1797 digits of 8 by 8 pixels that scikit-learn ships (UCI, Alpaydin and Kaynak, CC BY 4.0). Motion and noise are
made here.
"""

# sphinx_gallery_thumbnail_path = "results/clips.png"
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import fastrnn
from examples.page import Page

page = Page(__file__, __doc__)
SLIT = 2  # pixels
random = np.random.default_rng(page.seed)

# %%
# The clips
# ---------


def pass_by(digit: np.ndarray) -> Tensor:
    """A clip [frames, 8, SLIT] of a digit [8, 8] that passes behind the slit."""
    if digit.size == 0:
        raise ValueError("digit: expected pixels, got an empty picture")
    frames = int(random.integers(10, 41))
    wide = np.pad(digit, ((1, 1), (SLIT, SLIT)))[int(random.integers(3)) :][:8]  # moved up or down by a pixel
    places = np.linspace(0, wide.shape[1] - SLIT, frames)
    if random.random() < 0.5:
        places = places[::-1]
    left = np.minimum(places.astype(int), wide.shape[1] - SLIT - 1)
    share = (places - left)[:, None, None]
    seen = np.stack([wide[:, at : at + SLIT + 1] for at in left])  # between two columns both show
    clip = (1 - share) * seen[:, :, :-1] + share * seen[:, :, 1:]
    return torch.tensor(clip + random.normal(0, 0.25, clip.shape), dtype=torch.float32)


digits = load_digits()
train_images, test_images, train_labels, test_labels = train_test_split(
    digits.images / 16, digits.target, test_size=0.25, random_state=page.seed, stratify=digits.target
)


def batches(images: np.ndarray, labels: np.ndarray, size: int = 64) -> Iterator[tuple[PackedSequence, Tensor]]:
    """An epoch: every digit passes by once, in a new order, and each time anew."""
    for at in np.array_split(random.permutation(len(images)), max(1, len(images) // size)):
        clips = pack_sequence([pass_by(image).to(page.device) for image in images[at]], enforce_sorted=False)
        yield clips, torch.tensor(labels[at], device=page.device)


# %%
# The model
# ---------


class Classifier(nn.Module):
    def __init__(self, recurrent: bool, hidden_size: int = 96) -> None:
        super().__init__()
        convolution = nn.Conv2d(1, 16, (3, SLIT))  # [*, 1, 8, SLIT] -> [*, 16, 6, 1]
        self.look = nn.Sequential(nn.Unflatten(1, (1, 8)), convolution, nn.ReLU(), nn.Flatten(), nn.Linear(96, 64), nn.ReLU())
        self.gru = fastrnn.GRU(64, hidden_size) if recurrent else None
        self.readout = nn.Linear(hidden_size if recurrent else 64, 10)

    def forward(self, clips: PackedSequence) -> Tensor:
        """Packed [8, SLIT] pictures -> [clips, 10] logits"""
        seen = PackedSequence(self.look(clips.data), *clips[1:])
        if self.gru:
            return self.readout(self.gru(seen)[1][-1])
        votes, lengths = pad_packed_sequence(PackedSequence(self.readout(seen.data), *clips[1:]))
        return votes.sum(0) / lengths[:, None].to(votes.device)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[PackedSequence, Tensor]]) -> float:
    """Take a step for each batch, and return the mean loss."""
    losses = []
    for clips, label in batches:
        loss = cross_entropy(model(clips), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


# %%
# The test
# --------
# Each digit that was held out passes by once.

test_clips, test_truth = next(batches(test_images, test_labels, len(test_labels)))
accuracy: dict[str, float] = {}
curves: dict[str, list[float]] = {}
for name, recurrent in {"GRU": True, "votes of the pictures": False}.items():
    model = Classifier(recurrent).to(page.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    curves[name] = []
    for _ in page.progress(range(page.pick(35, 1)), name):
        train(model, optimizer, batches(train_images, train_labels))
        with torch.no_grad():
            curves[name].append(float((model(test_clips).argmax(1) == test_truth).double().mean()))
    accuracy[name] = curves[name][-1]
    if recurrent:
        page.race(model, train, batches(train_images, train_labels))
page.result("digits recognised behind the slit", accuracy.pop("GRU"), accuracy, unit="%")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3), width_ratios=(1.5, 1), layout="constrained")
random = np.random.default_rng(2)
clip = pass_by(test_images[0])[:24]
left.imshow(pad(clip, (0, 1), value=float("nan")).transpose(0, 1).flatten(1).numpy(), cmap="gray_r")
left.set(title=f"the first pictures of a clip: a {test_labels[0]}", xticks=[], yticks=[])
left.grid(False)
for name, curve in curves.items():
    right.plot(range(1, len(curve) + 1), [100 * value for value in curve], label=name)
right.set(xlabel="epoch", ylabel="recognised (%)", title="digits that were held out", ylim=(0, 100))
right.legend()
page.save(figure)
