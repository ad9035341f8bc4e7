"""
Text generation: a chatbot that streams its answers
===================================================

An LSTM learns to predict each next character of short dialogues. To answer a question, it reads the question and then writes,
one character at a time, what it thinks comes next.

Writing is one step after another, so the model answers with ``step``, which takes one character and the states, after
``fastrnn.freeze`` has packed the weights once. To ask it something yourself, start the page with ``python -i -m``
and write ``print(*answer("who are you"), sep="")``.

The data are the questions and answers that R. Wallace wrote for the chatbot A.L.I.C.E. (GPL, in the package ``python-aiml``).
A twentieth of the questions is held out.
"""

# sphinx_gallery_thumbnail_path = "results/text_generation.png"
import math
import random
import statistics
from collections.abc import Iterator, Sequence

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from examples import dialogues
from examples.counts import Counts
from examples.page import Page

page = Page(__file__, __doc__)

# %%
# A text is a question, a mark, its answer and another mark.

ANSWER, END = "\t", "\n"
pairs = dialogues.pairs()
held_out = set(random.Random(page.seed).sample(sorted({question for question, _ in pairs}), len(pairs) // 20))
train_data = [q + ANSWER + answer + END for q, answer in pairs if q not in held_out][:: page.pick(1, 100)]
test_data = [q + ANSWER + answer + END for q, answer in pairs if q in held_out][:: page.pick(1, 100)]
alphabet = sorted({letter for pair in pairs for letter in "".join(pair) + ANSWER + END})
index = {letter: at for at, letter in enumerate(alphabet)}
print(f"{len(train_data):,} questions and answers to train on, {len(test_data):,} held out; {len(alphabet)} characters")


def encode(text: str) -> Tensor:
    """Text -> [steps] characters, without those that no dialogue has."""
    return torch.tensor([index[letter] for letter in text if letter in index], device=page.device)


class Chatbot(nn.Module):
    """Predicts each next character."""

    def __init__(self, characters: int, hidden_size: int = 256):
        super().__init__()
        self.embedding = nn.Embedding(characters, 64)
        self.lstm = fastrnn.LSTM(64, hidden_size, batch_first=True)
        self.readout = nn.Sequential(nn.Dropout(0.3), nn.Linear(hidden_size, characters))

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts of any lengths, packed -> logits of all next characters [steps, characters], and these characters [steps]."""
        given = pack_sequence([encode(text[:-1]) for text in texts], enforce_sorted=False)
        hidden, _ = self.lstm(given._replace(data=self.embedding(given.data)))
        return self.readout(hidden.data), pack_sequence([encode(text[1:]) for text in texts], enforce_sorted=False).data


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[list[str]]) -> float:
    """Take a step for each batch; the mean loss."""
    total = 0.0
    for batch in batches:
        optimizer.zero_grad()
        loss = cross_entropy(*model(batch))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item() / len(batches)
    return total


@torch.no_grad()
def bits(model: nn.Module) -> float:
    """Bits per character of held-out answers, given their questions."""
    outputs = [(*model([text]), text.index(ANSWER)) for text in test_data]
    costs = [cross_entropy(logits[start:], following[start:], reduction="none") for logits, following, start in outputs]
    return torch.cat(costs).mean().item() / math.log(2)


# The baseline counts which characters follow the same five.
counts = Counts(train_data)
baseline = statistics.mean(cost for text in test_data for cost in counts.bits(text, text.index(ANSWER) + 1))

model = Chatbot(len(alphabet)).to(page.device)
page.race(model, train, page.shuffled(train_data, 32))
epochs = page.pick(12, 1)
optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
curve = []
for epoch in page.progress(range(epochs)):
    loss = train(model.train(), optimizer, page.shuffled(train_data, 32)) / math.log(2)
    schedule.step()
    curve.append(bits(model.eval()))
    print(f"epoch {epoch + 1}: {loss:.2f} bits per character, {curve[-1]:.2f} in held-out answers")
page.result("bits per character", curve[-1], {"counts of characters": baseline}, lower=True)


# %%
# Answers, streamed:


@torch.no_grad()
def answer(question: str, temperature: float = 0.3, most: int = 150) -> Iterator[str]:
    """The characters of an answer, each as soon as it is chosen. ValueError: no dialogue has a character of the question."""
    if not len(encode(question)):
        raise ValueError(f"question: expected characters that the dialogues have, got {question!r}")
    state = None
    for character in encode(question + ANSWER):
        hidden, state = model.lstm.step(model.embedding(character[None]), state)
    for _ in range(most):
        character = torch.multinomial((model.readout(hidden[0]) / temperature).softmax(-1), 1)
        if alphabet[int(character)] == END:
            break
        yield alphabet[int(character)]
        hidden, state = model.lstm.step(model.embedding(character), state)


fastrnn.freeze(model.eval())
for question in ("hello", "who are you", "do you like music", "what is a computer", "can you dream", "where is paris"):
    print(f"\n> {question}\n  ", end="")
    for letter in answer(question):
        print(letter, end="", flush=True)

# %%
# What a character costs, on torch.nn and here:
with torch.no_grad():
    x, theirs = torch.randn(1, 64, device=page.device), nn.LSTM(64, model.lstm.hidden_size).to(page.device).eval()
    _, state = model.lstm.step(x)
    calls = {"torch.nn's forward": lambda: theirs(x[None], state), "fastrnn's step": lambda: model.lstm.step(x, state)}
    times = page.seconds(calls, 2.0)
print("\n\n" + ", ".join(f"{name}: {time * 1e6:.1f} microseconds a character" for name, time in times.items()))

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.plot(range(1, epochs + 1), curve, "o-", label="LSTM")
left.axhline(baseline, color="C1", linestyle="--", label="counts of characters")
left.legend()
left.set(xlabel="epoch", ylabel="bits per character", title="Answers to questions that were not seen")
right.barh(list(times), [time * 1e6 for time in times.values()], color=["grey", "C0"])
right.set(xlabel="microseconds a character", title="Writing an answer")
page.save(figure)
