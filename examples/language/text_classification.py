"""
Text classification: which language is this?
============================================

A GRU reads a sentence character by character. Its last state says which of many languages the sentence is in.

Sentences have very different lengths. ``pack_padded_sequence`` tells the layer where each one ends, so that nothing is
computed for the padding, and the last state is the one after the last character.

The data are the messages of Django, a web framework, as its translators wrote them (package ``django``, BSD licence).
A fifth of the messages is held out in all languages.
"""

# sphinx_gallery_thumbnail_path = "results/text_classification.png"
import random
import re
from collections import Counter
from collections.abc import Sequence

import torch
from matplotlib import pyplot as plt
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

import fastrnn
from examples import catalogues
from examples.page import Page

page = Page(__file__, __doc__)

# %%
# The sentences
# -------------
# Placeholders and markup are the same in all languages, so they are taken out. A language is used if it has 250 sentences.
# Regional variants ("es_MX") are left out: most of their sentences are the same.

NOT_TEXT = re.compile(r"%\(\w+\)\w|%\w|\{[^}]*\}|<[^>]*>|&\w+;|https?:\S+")
Data = list[tuple[str, str]]  # sentences, and the codes of their languages

chance = random.Random(page.seed)
held_out: dict[str, bool] = {}  # by the English message
parts: dict[bool, Data] = {False: [], True: []}
codes = [code for code in catalogues.languages("django") if code in ("zh_Hans", "zh_Hant") or not re.search("_|en", code)]
for code in page.pick(codes, ["ar", "de", "it", "ja", "ru"]):
    found = {source: " ".join(NOT_TEXT.sub(" ", text).split()) for source, text in catalogues.messages("django", code).items()}
    found = {source: text for source, text in found.items() if 8 <= len(text) <= 150 and text != source}
    if len(found) >= 250:
        for source, text in found.items():
            parts[held_out.setdefault(source, chance.random() < 0.2)].append((text, code))

train_data, test_data = parts[False][:: page.pick(1, 5)], parts[True][:: page.pick(1, 5)]
labels = sorted({code for _, code in train_data})
counted = Counter(letter for text, _ in train_data for letter in text)
vocabulary = {letter: at for at, (letter, _) in enumerate(counted.most_common(page.pick(5000, 300)), start=1)}  # 0: others
print(f"{len(train_data):,} sentences to train on, {len(test_data):,} held out")
print(f"{len(labels)} languages, {len(vocabulary):,} letters")


class Classifier(nn.Module):
    """An embedding, a GRU, and a linear layer that reads its last state."""

    def __init__(self, letters: int, classes: int, hidden_size: int = 128):
        super().__init__()
        self.embedding = nn.Embedding(letters, 64)
        self.gru = fastrnn.GRU(64, hidden_size, batch_first=True)
        self.readout = nn.Linear(hidden_size, classes)

    def forward(self, letters: Tensor, lengths: Tensor) -> Tensor:
        """[batch, steps] letters and their lengths [batch] -> [batch, classes] logits."""
        packed = pack_padded_sequence(self.embedding(letters), lengths, batch_first=True, enforce_sorted=False)
        _, last = self.gru(packed)
        return self.readout(last[-1])


def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Texts -> padded letters [batch, steps] and lengths [batch]."""
    rows = [torch.tensor([vocabulary.get(letter, 0) for letter in text]) for text in texts]
    return pad_sequence(rows, batch_first=True).to(page.device), torch.tensor([len(row) for row in rows])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Data]) -> float:
    """Take a step for each batch; the mean loss."""
    total = 0.0
    for batch in batches:
        target = torch.tensor([labels.index(code) for _, code in batch], device=page.device)
        optimizer.zero_grad()
        loss = cross_entropy(model(*encode([text for text, _ in batch])), target)
        loss.backward()
        optimizer.step()
        total += loss.item() / len(batches)
    return total


@torch.no_grad()
def guess(texts: Sequence[str]) -> list[str]:
    """The code of the language of each text."""
    return [labels[best] for best in model(*encode(texts)).argmax(1).tolist()]


model = Classifier(len(vocabulary) + 1, len(labels)).to(page.device)
page.race(model, train, page.shuffled(train_data, 128))
epochs = page.pick(5, 1)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
for epoch in page.progress(range(epochs)):
    print(f"epoch {epoch + 1}: loss {train(model, optimizer, page.shuffled(train_data, 128)):.3f}")
    schedule.step()

# %%
# Against counting letters
# ------------------------
# The baseline is naive Bayes on how often each letter occurs. It does not see their order.

lengths = [2, 4, 8, 16, 32, 64, 128]
truth = [code for _, code in test_data]
curves: dict[str, list[float]] = {"GRU": [], "letter counts": []}
counts = make_pipeline(CountVectorizer(analyzer="char"), MultinomialNB(alpha=0.1)).fit(*zip(*train_data))
for most in lengths:
    begun = [text[:most] for text, _ in test_data]
    guesses = [code for at in range(0, len(begun), 500) for code in guess(begun[at : at + 500])]
    curves["GRU"].append(sum(map(str.__eq__, guesses, truth)) / len(truth))
    curves["letter counts"].append(counts.score(begun, truth))
page.result("accuracy", curves["GRU"][-1], {"letter counts": curves["letter counts"][-1]}, unit="%")

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for name, curve in curves.items():
    axes.plot(lengths, [100 * value for value in curve], "o-", label=name)
axes.set_xscale("log", base=2)
axes.set(xlabel="letters read", ylabel="languages recognised (%)", title=f"{len(labels)} languages, held-out sentences")
axes.legend()
page.save(figure)


def identify(text: str) -> str:
    """The code of the language of a text. ValueError: no letter of it is known."""
    if not any(letter in vocabulary for letter in text if not letter.isspace()):
        raise ValueError(f"text: expected letters of the alphabets that the model knows, got {text!r}")
    return guess([text])[0]


for text in ("Dieses Feld ist erforderlich.", "Questo campo è obbligatorio.", "Это поле обязательно.", "この項目は必須です。"):
    print(f"{identify(text):8} {text}")
