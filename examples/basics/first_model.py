"""
A first recurrent network: digits, row by row
=============================================

The three textbook models, RNN, LSTM and GRU, read the picture of a handwritten digit from top to bottom, one row of eight
pixels a step, and say which digit it is. Only their recurrent layer differs.

The data are the 1797 digits of ``sklearn.datasets.load_digits`` (E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning
Repository, licence CC BY 4.0). A quarter is held out.
"""

# sphinx_gallery_thumbnail_path = "results/first_model.png"
from collections.abc import Sequence

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.models import GRUModel, LSTMModel, RNNModel
from examples.page import Page

page = Page(__file__, __doc__)

# %%
# A picture as a sequence
# -----------------------
# ``x`` is ``[batch, steps, input_size]``: pictures, their rows, the pixels of a row. This order is called batch first.

pictures, digits = load_digits(return_X_y=True)
x = torch.tensor(pictures, dtype=torch.float32).view(-1, 8, 8).to(page.device) / 16
y = torch.tensor(digits, device=page.device)
held_out, *rest = torch.randperm(len(x)).split(len(x) // 4)
known = torch.cat(rest)
print(f"{len(known)} digits to train on, {len(held_out)} held out")

# %%
# Training
# --------
# The loop is that of any classifier. The model's last state has read the whole picture, so the loss looks at it alone.


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[list[int]]) -> float:
    """Take a step for each batch; the mean loss."""
    total = 0.0
    for batch in batches:
        optimizer.zero_grad()
        loss = cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        total += loss.item() / len(batches)
    return total


@torch.no_grad()
def accuracy(model: nn.Module, rows: Tensor) -> float:
    """The share of held-out digits that are recognised from their first rows."""
    return (model(rows).argmax(1) == y[held_out]).float().mean().item()


epochs = page.pick(60, 3)
curves = {}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for kind in (RNNModel, LSTMModel, GRUModel):
    name = kind.__name__.removesuffix("Model")
    torch.manual_seed(page.seed)
    model = kind(input_size=8, hidden_size=128, num_layers=1, num_classes=10).to(page.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    curve = []
    for _ in page.progress(range(epochs), name):
        train(model, optimizer, page.shuffled(known.tolist(), 64))
        schedule.step()
        curve.append(accuracy(model, x[held_out]))
    print(f"{name}: {100 * curve[-1]:.1f} % of held-out digits recognised")
    left.plot(range(1, epochs + 1), [100 * value for value in curve], label=name)
    curves[name] = curve

# %%
# Against a model without recurrence
# ----------------------------------
# Logistic regression sees all 64 pixels at once.

plain = LogisticRegression(max_iter=2000).fit(pictures[known.cpu()] / 16, digits[known.cpu()])
baseline = plain.score(pictures[held_out.cpu()] / 16, digits[held_out.cpu()])
page.result("accuracy of the GRU", curves["GRU"][-1], {"logistic regression": baseline}, unit="%")
page.race(model, train, page.shuffled(known.tolist(), 64))

# %%
# What it knows after each row
# ----------------------------
# The state after a row is what the model knows so far. Here the GRU guesses after each one.

rows = range(1, 9)
left.axhline(100 * baseline, color="grey", linestyle="--", label="logistic regression")
left.set(xlabel="epoch", ylabel="recognised (%)", title="Held-out digits", ylim=(80, 100))
left.legend()
right.plot(rows, [100 * accuracy(model, x[held_out][:, :row]) for row in rows], "o-", color="C2")
right.set(xlabel="rows read", ylabel="recognised (%)", title="The GRU, before it has seen everything")
page.save(figure)
