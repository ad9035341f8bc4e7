"""
Speech recognition: recorded sentences, letter by letter
========================================================

A bidirectional LSTM listens to recorded English and writes letters. Nobody says when which letter is spoken: connectionist
temporal classification (CTC, Graves and others, 2006) sums over all the places where the letters may be.

Recordings have different lengths, and the layer takes them packed: nothing is computed for padding, and the backward direction
begins at the end of each recording.

The data are the telephone announcements of Asterisk, spoken by Allison Smith (licence CC BY-SA 3.0), which Debian has as the
packages ``asterisk-core-sounds-en`` and ``asterisk-core-sounds-en-wav``: ``make build/sounds``. A tenth is held out.
"""

# sphinx_gallery_thumbnail_path = "results/speech_recognition.png"
from collections.abc import Sequence

import jiwer
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import ctc_loss
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import fastrnn
from examples import sounds
from examples.page import Page

page = Page(__file__, __doc__)

# %%
# Recordings and what is said in them
# -----------------------------------
# A recording becomes the loudness of 40 bands of frequencies, each 10 ms. Three of these frames are one step.

ALPHABET = "_ 'abcdefghijklmnopqrstuvwxyz"  # _ is CTC's blank
STACKED = 3
Example = tuple[Tensor, str]


def steps(samples: sounds.np.ndarray) -> Tensor:
    """Samples -> what the network hears [steps, STACKED * bands]."""
    bands = sounds.loudness(samples)
    return bands[: len(bands) // STACKED * STACKED].reshape(-1, STACKED * sounds.BANDS).to(page.device)


recordings = {text: samples for samples, text in sounds.announcements() if len(samples) < 12 * sounds.RATE}
examples = [(steps(samples), text) for text, samples in recordings.items()]
order = torch.randperm(len(examples)).tolist()[:: page.pick(1, 10)]
test_data, train_data = ([examples[at] for at in part] for part in (order[: len(order) // 10], order[len(order) // 10 :]))
minutes = sum(len(sound) for sound, _ in train_data) * STACKED * sounds.HOP / sounds.RATE / 60
print(f"{len(train_data)} recordings to train on, {minutes:.1f} minutes together; {len(test_data)} held out")

# %%
# The model
# ---------


class Recogniser(nn.Module):
    """Two bidirectional LSTM layers, and a linear layer that scores the letters at each step."""

    def __init__(self, size: int = 192):
        super().__init__()
        self.lstm = fastrnn.LSTM(STACKED * sounds.BANDS, size, 2, bidirectional=True, dropout=0.3)
        self.readout = nn.Linear(2 * size, len(ALPHABET))

    def forward(self, packed: PackedSequence) -> tuple[Tensor, Tensor]:
        """Recordings, packed -> log probabilities [steps, batch, letters], and the lengths [batch]."""
        hidden, lengths = pad_packed_sequence(self.lstm(packed)[0])
        return self.readout(hidden).log_softmax(-1), lengths


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[list[Example]]) -> float:
    """Take a step for each batch; the mean loss."""
    total = 0.0
    for batch in batches:
        target = torch.tensor([ALPHABET.index(letter) for _, text in batch for letter in text], device=page.device)
        optimizer.zero_grad()
        scores, lengths = model(pack_sequence([sound for sound, _ in batch], enforce_sorted=False))
        loss = ctc_loss(scores, target, lengths, torch.tensor([len(text) for _, text in batch]), zero_infinity=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item() / len(batches)
    return total


@torch.no_grad()
def listen(heard: Sequence[Tensor]) -> list[str]:
    """The text of each recording: the best letter of each step, without repetitions and blanks. ValueError: one is empty."""
    if not all(len(sound) for sound in heard):
        raise ValueError(f"heard: expected at least one step in each recording, got {[len(sound) for sound in heard]}")
    scores, lengths = model.eval()(pack_sequence(list(heard), enforce_sorted=False))
    best = [row[:length].unique_consecutive().tolist() for row, length in zip(scores.argmax(-1).T, lengths)]
    return ["".join(ALPHABET[letter] for letter in letters if letter) for letters in best]


model = Recogniser().to(page.device)
page.race(model, train, page.shuffled(train_data, 16))

# %%
# Until the backward pass a layer keeps the gates of every step, which takes memory where recordings are long. In a block of
# ``fastrnn.recompute`` it keeps a state now and then, and the backward pass computes the steps between once more.

longest = pack_sequence(sorted((sound for sound, _ in train_data), key=len)[-16:], enforce_sorted=False)
kept: dict[int, int] = {}  # bytes, by address
for recompute in (False, True):
    kept.clear()
    with fastrnn.recompute(recompute), saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x.nbytes}) or x, lambda x: x):
        scores, _ = model(longest)
    print(f"kept of 16 long recordings{' under recompute' * recompute}: {sum(kept.values()) / 1e6:.0f} MB")

epochs = page.pick(30, 1)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=epochs + 1)
truth = [text for _, text in test_data]
curve = []
for epoch in page.progress(range(epochs)):
    loss = train(model.train(), optimizer, page.shuffled(train_data, 16))
    schedule.step()
    curve.append(jiwer.cer(truth, listen([sound for sound, _ in test_data])))
    if epoch % 5 == 4:
        print(f"epoch {epoch + 1}: loss {loss:.3f}, character error rate {100 * curve[-1]:.1f} %")

# %%
# Held-out recordings
# -------------------
# The baseline answers with the announcement of the training data whose recording has the nearest length.

nearest = [min(train_data, key=lambda one: abs(len(one[0]) - len(sound)))[1] for sound, _ in test_data]
found = listen([sound for sound, _ in test_data])
page.result("character error rate", curve[-1], {"nearest length": jiwer.cer(truth, nearest)}, lower=True, unit="%")
page.result("word error rate", jiwer.wer(truth, found), {"nearest length": jiwer.wer(truth, nearest)}, lower=True, unit="%")
for text, heard in list(zip(truth, found))[:6]:
    print(f"\n  said:  {text}\n  heard: {heard}")

figure, (left, right) = plt.subplots(2, 1, figsize=(8, 5), layout="constrained", height_ratios=[2, 3])
sound, text = min(test_data, key=lambda one: abs(len(one[0]) - 100))
with torch.no_grad():
    scores = model(pack_sequence([sound]))[0][:, 0].exp()
left.imshow(sound.cpu().reshape(-1, sounds.BANDS).T, origin="lower", aspect="auto", cmap="magma")
left.set(title=f'"{text}"', ylabel="band")
left.grid(False)
right.plot(scores[:, 1:].cpu())
for at, (letter, before) in enumerate(zip(best := scores.argmax(-1).tolist(), [0, *best])):
    if letter and letter != before:
        right.annotate(ALPHABET[letter].replace(" ", "␣"), (at, float(scores[at, letter])), ha="center")
right.set(xlabel="step of 30 ms", ylabel="probability", xlim=(0, len(scores) - 1), title="When it hears which letter")
page.save(figure)
