"""
Sales: a year of house sales in two dozen towns, from one model
===============================================================

A shop forecasts thousands of products, and no single one has enough history to train a network. One model for all series is
the way: it learns what seasons look like from the lot. Here an encoder reads three years of a town's monthly house sales, and
a decoder writes the next twelve months, each as three quantiles.

Two forecasts are there to be beaten on the same towns and months: last month's sales (naive), and those of the same month a
year before (seasonal naive), which is hard to beat for yearly seasons.

Data: ``txhousing`` from the package ``plotnine`` (MIT licence), collected by the Texas A&M Real Estate Center: 46 towns,
monthly from 2000 to July 2015. Forecasts that begin from 2013 on are for the test.
"""

# sphinx_gallery_thumbnail_path = "results/sales.png"
from collections.abc import Iterable

import numpy as np
import torch
from matplotlib import pyplot as plt
from plotnine.data import txhousing
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastrnn
from examples.page import Page
from examples.quantiles import quantile_loss

page = Page(__file__, __doc__)
PAST, AHEAD = 36, 12  # months
QUANTILES = torch.tensor([0.1, 0.5, 0.9], device=page.device)

# %%
# The data
# --------
# Some towns reported nothing for a while. Those towns are left out, by name.


def read(town: str) -> np.ndarray:
    """The town's sales, month by month, or a ValueError that names the first month without."""
    if town not in set(txhousing["city"]):
        raise ValueError(f"town: expected one of {', '.join(txhousing['city'].unique())}, got {town!r}")
    table = txhousing[txhousing["city"] == town].sort_values(["year", "month"])
    gaps = table[table["sales"].isna()]
    if len(gaps):
        year, month = gaps[["year", "month"]].iloc[0]
        raise ValueError(f"{town}: expected sales in each month, got none in {len(gaps)}, the first {year}-{month:02}")
    return table["sales"].to_numpy()


series, left_out = {}, []
for town in txhousing["city"].unique():
    try:
        series[town] = read(town)
    except ValueError as error:
        left_out.append(str(error))
print(f"{len(series)} towns; {len(left_out)} left out, such as {left_out[0]}")
sales = np.stack(list(series.values()))  # [towns, months]
test_start = 13 * 12  # January 2013, in months since January 2000
# Towns differ a hundredfold in size. All that the model sees is relative to the town's mean over the year before.
season = 2 * np.pi * np.arange(sales.shape[1] + AHEAD) / 12
calendar = np.stack([np.sin(season), np.cos(season), np.sin(2 * season), np.cos(2 * season)], axis=1)  # [months, 4]


def windows(starts: Iterable[int]) -> tuple[Tensor, ...]:
    """For forecasts that begin in the months `starts`, of all towns: the past [rows, PAST, 5], months ahead [rows, AHEAD, 4],
    the sales in them [rows, AHEAD], and the level [rows] that sales are relative to."""
    rows = []
    for start in starts:
        level = sales[:, start - 12 : start].mean(1)
        past = np.log(sales[:, start - PAST : start, None] / level[:, None, None])
        dates = np.broadcast_to(calendar[start - PAST : start], (len(sales), PAST, 4))
        months = np.broadcast_to(calendar[start : start + AHEAD], (len(sales), AHEAD, 4))
        ahead = np.log(sales[:, start : start + AHEAD] / level[:, None])
        rows.append((np.concatenate([past, dates], axis=2), months, ahead, level))
    return tuple(torch.tensor(np.concatenate(part), dtype=torch.float32, device=page.device) for part in zip(*rows))


train_set = TensorDataset(*windows(range(PAST, test_start - AHEAD + 1, page.pick(1, 4)))[:3])
test_starts = range(test_start, sales.shape[1] - AHEAD + 1)
past, months, ahead, level = windows(test_starts)
loader = DataLoader(train_set, batch_size=128, shuffle=True)

# %%
# The model
# ---------
# The decoder's input is the calendar, which is known for the future. Its initial state is what the encoder made of the past.


class Forecaster(nn.Module):
    def __init__(self, hidden_size: int = 64) -> None:
        super().__init__()
        self.encoder = fastrnn.GRU(5, hidden_size, batch_first=True)
        self.decoder = fastrnn.GRU(4, hidden_size, batch_first=True)
        self.readout = nn.Linear(hidden_size, len(QUANTILES))

    def forward(self, past: Tensor, months: Tensor) -> Tensor:
        """[batch, PAST, 5], [batch, AHEAD, 4] -> [batch, AHEAD, 3] quantiles"""
        _, state = self.encoder(past)
        output, _ = self.decoder(months, state)
        return self.readout(output)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable) -> float:
    """Take a step for each batch, and return the mean loss."""
    losses = []
    for past, months, ahead in batches:
        loss = quantile_loss(model(past, months), ahead, QUANTILES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


model = Forecaster().to(page.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
for _ in page.progress(range(page.pick(12, 1))):
    train(model, optimizer, loader)
page.race(model, train, loader)

# %%
# The test
# --------
# The error is that of all sales together (weighted absolute percentage error), so that a small town's few houses do not
# dominate.

with torch.no_grad():
    quantiles = (model(past, months).exp() * level[:, None, None]).cpu().numpy()  # [rows, AHEAD, 3]
truth = (ahead.exp() * level[:, None]).cpu().numpy()
history = np.concatenate([sales[:, start - 12 : start] for start in test_starts])  # [rows, 12]
forecasts = {"GRU": quantiles[:, :, 1], "naive": history[:, -1:], "seasonal naive": history}
errors = {name: float(np.abs(forecast - truth).sum() / truth.sum()) for name, forecast in forecasts.items()}
page.result("error of twelve months ahead", errors.pop("GRU"), errors, lower=True, unit="%")
inside = (quantiles[:, :, 0] <= truth) & (truth <= quantiles[:, :, 2])
print(f"months inside the 80 % interval: {inside.mean():.0%}")

figure, plots = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
time = 2000 + np.arange(sales.shape[1]) / 12
for axes, town in zip(plots, ("Houston", "Austin", "San Antonio")):
    row = list(series).index(town) + len(series) * (len(test_starts) - 1)  # the last forecast
    future = time[test_starts[-1] : test_starts[-1] + AHEAD]
    axes.plot(time[-36:], series[town][-36:], "k.-", linewidth=0.5, markersize=3, label="sold")
    axes.fill_between(future, quantiles[row, :, 0], quantiles[row, :, 2], color="tab:blue", alpha=0.25, label="80 % interval")
    axes.plot(future, quantiles[row, :, 1], color="tab:blue", label="forecast")
    axes.plot(future, history[row], "--", color="tab:orange", linewidth=1, label="seasonal naive")
    axes.set(title=town, ylabel="houses a month", ylim=(0, None))
plots[0].legend()
page.save(figure)
