"""
Machine translation: English to Spanish with attention
======================================================

A bidirectional GRU reads an English sentence. A second GRU writes it in Spanish, one piece of a word after another, and before
each piece it looks at all the states of the first one, some more than others: attention (Luong and others, 2015).

In training the second GRU sees a whole translation in one call of the layer. Beam search follows several translations at once
and prolongs each by one piece at a time: that is ``step``, on a model that ``fastrnn.freeze`` has packed.

The data are the messages of Django (BSD licence) and of Gramps, a genealogy program (GPL), with the translations that their
packages ship. A twentieth is held out. BLEU, by ``sacrebleu``, is the share of the words and runs of words that are right.
"""

# sphinx_gallery_thumbnail_path = "results/translation.png"
import random
from collections.abc import Sequence

import sacrebleu
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import fastrnn
from examples import catalogues
from examples.page import Page

page = Page(__file__, __doc__)

# %%
# Messages with placeholders are left out. Words are written in pieces, 2000 for both languages, so rare ones are no problem.

PAD, START, END = 0, 1, 2
Pair = tuple[str, str]

messages = catalogues.messages("gramps", "es") | catalogues.messages("django", "es")
pairs = [pair for pair in sorted(messages.items()) if len(pair[0]) <= 80 and not set("%{<&$_\n") & set("".join(pair))]
random.Random(page.seed).shuffle(pairs)
pairs = pairs[: page.pick(None, 600)]
test_data, train_data = pairs[: len(pairs) // 20], pairs[len(pairs) // 20 :]
pieces = catalogues.pieces((text for pair in train_data for text in pair), size=page.pick(2000, 600))
print(f"{len(train_data):,} sentences to train on, {len(test_data):,} held out; {len(pieces):,} pieces of words")


def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Texts -> padded pieces [batch, steps] and lengths [batch]."""
    rows = [torch.tensor([START, *pieces.encode(text), END]) for text in texts]
    return pad_sequence(rows, batch_first=True).to(page.device), torch.tensor([len(row) for row in rows])


class Translator(nn.Module):
    """An encoder, a decoder, and attention between them."""

    def __init__(self, pieces: int, size: int = 192):
        super().__init__()
        self.embedding = nn.Embedding(pieces, size, padding_idx=PAD)
        self.encoder = fastrnn.GRU(size, size // 2, batch_first=True, bidirectional=True)
        self.decoder = fastrnn.GRU(size, size, batch_first=True)
        self.combine = nn.Linear(2 * size, size)
        self.dropout = nn.Dropout(0.3)
        self.readout = nn.Linear(size, pieces)
        self.readout.weight = self.embedding.weight

    def read(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, steps] pieces -> what attention looks at [batch, steps, size], and the decoder's first state."""
        packed = pack_padded_sequence(self.dropout(self.embedding(source)), lengths, batch_first=True, enforce_sorted=False)
        states, last = self.encoder(packed)
        return pad_packed_sequence(states, batch_first=True)[0], torch.cat(tuple(last), dim=-1)[None]

    def attend(self, states: Tensor, source: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's outputs [batch, steps, size] -> logits, and how much of each source piece they looked at."""
        scores = hidden @ states.transpose(1, 2)
        weights = scores.masked_fill((source == PAD)[:, None], float("-inf")).softmax(-1)
        combined = self.combine(torch.cat((hidden, weights @ states), dim=-1)).tanh()
        return self.readout(self.dropout(combined)), weights

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Logits of the piece that follows each piece of the target: [batch, steps, pieces]."""
        states, first = self.read(source, lengths)
        return self.attend(states, source, self.decoder(self.dropout(self.embedding(target)), first)[0])[0]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[list[Pair]]) -> float:
    """Take a step for each batch; the mean loss."""
    total = 0.0
    for batch in batches:
        target, _ = encode([target for _, target in batch])
        optimizer.zero_grad()
        logits = model(*encode([source for source, _ in batch]), target[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        total += loss.item() / len(batches)
    return total


@torch.no_grad()
def translate(text: str, beams: int = 5, most: int = 60) -> str:
    """The translation with the best mean log probability that beam search finds. ValueError: there is no text."""
    if not text.strip():
        raise ValueError(f"text: expected English words, got {text!r}")
    source, lengths = encode([text])
    states, state = model.read(source, lengths)
    alive, scores = torch.full((1, 1), START, device=page.device), torch.zeros(1, device=page.device)
    finished: list[tuple[float, list[int]]] = []
    while len(finished) < beams and alive.shape[1] < most:
        hidden, state = model.decoder.step(model.embedding(alive[:, -1]), state)
        logits, _ = model.attend(states, source, hidden[:, None])
        scores, best = (scores[:, None] + logits[:, 0].log_softmax(-1)).flatten().topk(beams)  # of [beams, pieces]
        row, piece = best // len(pieces), best % len(pieces)
        alive, state = torch.cat((alive[row], piece[:, None]), dim=1), state[:, row]
        done = piece == END
        finished += [(float(score) / alive.shape[1], found.tolist()) for score, found in zip(scores[done], alive[done])]
        scores = scores.masked_fill(done, float("-inf"))
    return pieces.decode(max(finished, default=(0.0, alive[0].tolist()))[1])


model = Translator(len(pieces)).to(page.device)
page.race(model, train, page.shuffled(train_data, 64))
epochs = page.pick(12, 1)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
for epoch in page.progress(range(epochs)):
    print(f"epoch {epoch + 1}: loss {train(model.train(), optimizer, page.shuffled(train_data, 64)):.3f}")
    schedule.step()
fastrnn.freeze(model.eval())
truth = [[target for _, target in test_data]]
found = {beams: [translate(source, beams) for source, _ in page.progress(test_data, "translating")] for beams in (1, 5)}
bleu = {beams: sacrebleu.corpus_bleu(texts, truth).score for beams, texts in found.items()}
copied = sacrebleu.corpus_bleu([source for source, _ in test_data], truth).score
page.result("BLEU", bleu[5], {"without beam search": bleu[1], "copying the English": copied})
for (source, target), text in list(zip(test_data, found[5]))[:6]:
    print(f"\n  {source}\n= {target}\n> {text}")

# %%
# What the second GRU looks at while it writes a sentence is the page's figure.

shown = next(source for source, _ in test_data if 5 <= len(source.split()) <= 8)
(read, length), written = encode([shown]), encode([translate(shown)])[0][:, :-1]
with torch.no_grad():
    states, first = model.read(read, length)
    _, weights = model.attend(states, read, model.decoder(model.embedding(written), first)[0])
figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
axes.imshow(weights[0].cpu(), cmap="Blues", aspect="auto")
axes.set_xticks(range(read.shape[1]), [pieces.id_to_piece(piece) for piece in read[0].tolist()], rotation=60)
axes.set_yticks(range(written.shape[1]), [*(pieces.id_to_piece(piece) for piece in written[0, 1:].tolist()), "</s>"])
axes.grid(False)
page.save(figure)
