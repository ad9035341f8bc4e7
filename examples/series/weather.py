"""
Weather: next week's temperatures, and how sure they are
========================================================

A GRU reads four weeks of Seattle's weather and forecasts the highest temperature of each of the next seven days. It gives
three quantiles a day and not one number, so that each forecast says how sure it is. The quantile loss teaches them.

Three forecasts are there to be beaten on the same days: the temperature of today (naive), that of the same date a year ago
(seasonal naive), and the usual one of the season (climatology).

Data: ``seattle-weather`` from the package ``vega_datasets`` (MIT licence), measured daily from 2012 to 2015 by NOAA (public
domain). The first three years are for training, and 2015 is for the test.
"""

# sphinx_gallery_thumbnail_path = "results/weather.png"
from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from vega_datasets import local_data

import fastrnn
from examples.page import Page
from examples.quantiles import quantile_loss

page = Page(__file__, __doc__)
PAST, AHEAD = 28, 7  # days
QUANTILES = torch.tensor([0.1, 0.5, 0.9], device=page.device)


# %%
# The data
# --------
# A table with a gap would shift all days after it, so it is refused.


def check_days(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table, which has a row for each day and no value missing, or raise a ValueError that names the first gap."""
    days = pd.date_range(table.index[0], table.index[-1])
    gaps = days.difference(table.index).union(table.index[table.isna().any(axis=1)])
    if len(gaps):
        raise ValueError(f"table: expected a value for each day, got {len(gaps)} gap(s), the first on {gaps[0]:%Y-%m-%d}")
    return table


table = check_days(local_data.seattle_weather().set_index("date"))
temperature = table["temp_max"].to_numpy()
angle = 2 * np.pi * table.index.day_of_year.to_numpy() / 365.25
training = int((table.index.year < 2015).sum())  # days

# The usual temperature of a date: two waves a year, fitted to the years of training.
waves = np.stack([np.ones_like(angle), *(wave(k * angle) for k in (1, 2) for wave in (np.sin, np.cos))], axis=1)
usual = waves @ np.linalg.lstsq(waves[:training], temperature[:training], rcond=None)[0]

# The model sees and forecasts how far a day is from the usual, in summer as in winter.
deviation = temperature - usual
columns = [deviation, table["temp_min"] - usual, np.log1p(table["precipitation"]), table["wind"], waves[:, 1], waves[:, 2]]
features = np.stack(columns, axis=1)
features = (features - features[:training].mean(0)) / features[:training].std(0)
scale = deviation[:training].std()


def windows(first: int, last: int) -> TensorDataset:
    """[days, PAST, 6] features up to each day of [first, last), and the [days, AHEAD] deviations after it."""
    days = range(first, last)
    past = np.stack([features[day + 1 - PAST : day + 1] for day in days])
    ahead = np.stack([deviation[day + 1 : day + 1 + AHEAD] for day in days]) / scale
    return TensorDataset(*(torch.tensor(values, dtype=torch.float32, device=page.device) for values in (past, ahead)))


loader = DataLoader(windows(PAST - 1, training - AHEAD), batch_size=64, shuffle=True)
test_days = np.arange(training - 1, len(table) - AHEAD)

# %%
# The model
# ---------
# The last state of a GRU sums up the weeks before. One linear layer makes all quantiles of all days of it.


class Forecaster(nn.Module):
    def __init__(self, hidden_size: int = 64) -> None:
        super().__init__()
        self.gru = fastrnn.GRU(features.shape[1], hidden_size, batch_first=True)
        self.dropout = nn.Dropout(0.3)
        self.readout = nn.Linear(hidden_size, AHEAD * len(QUANTILES))

    def forward(self, past: Tensor) -> Tensor:
        """[batch, PAST, 6] -> [batch, AHEAD, 3] quantiles"""
        _, state = self.gru(past)
        return self.readout(self.dropout(state[-1])).unflatten(-1, (AHEAD, len(QUANTILES)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable) -> float:
    """Take a step for each batch, and return the mean loss."""
    losses = []
    for past, ahead in batches:
        loss = quantile_loss(model(past), ahead, QUANTILES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


model = Forecaster().to(page.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
for _ in page.progress(range(page.pick(12, 1))):
    train(model.train(), optimizer, loader)
page.race(model, train, loader)

# %%
# The test
# --------
# The middle quantile is the model's guess, and eight of ten days should lie between the outer two.

with torch.no_grad():
    quantiles = model.eval()(windows(test_days[0], test_days[-1] + 1).tensors[0]).cpu().numpy() * scale
ahead = test_days[:, None] + 1 + np.arange(AHEAD)  # the days that are forecast
truth = temperature[ahead]
forecasts = {
    "GRU": quantiles[:, :, 1] + usual[ahead],
    "naive": temperature[test_days][:, None],
    "seasonal naive": temperature[ahead - 365],
    "climatology": usual[ahead],
}
errors = {name: np.abs(forecast - truth).mean(0) for name, forecast in forecasts.items()}  # [AHEAD]
means = {name: float(error.mean()) for name, error in errors.items()}
page.result("mean absolute error over the week", means.pop("GRU"), means, lower=True, unit="°C")
low, high = (quantiles[:, :, at] + usual[ahead] for at in (0, 2))
inside = float(((low <= truth) & (truth <= high)).mean())
print(f"days inside the 80 % interval: {inside:.0%}, which is {(high - low).mean():.1f} °C wide on average")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(2, 1), layout="constrained")
for start in range(150, 150 + 8 * AHEAD, AHEAD):
    dates = table.index[ahead[start]]
    band = left.fill_between(dates, low[start], high[start], color="tab:blue", alpha=0.25)
    (line,) = left.plot(dates, forecasts["GRU"][start], color="tab:blue")
shown = slice(ahead[150 - AHEAD, 0], ahead[150 + 8 * AHEAD, 0])
(dots,) = left.plot(table.index[shown], temperature[shown], "k.-", linewidth=0.5)
left.legend([dots, line, band], ["measured", "forecast", "80 % interval"])
left.set(title="forecasts, each made the day before", ylabel="temperature (°C)", xticks=table.index[shown][::14])
for name, error in errors.items():
    right.plot(range(1, AHEAD + 1), error, ".-", label=name)
right.set(title="error against distance", xlabel="days ahead", ylabel="mean absolute error (°C)")
right.legend()
page.save(figure)
