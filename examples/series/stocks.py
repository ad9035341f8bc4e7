"""
Stocks: why tomorrow's price is not to be had, and what is
==========================================================

An LSTM reads forty days of a stock and forecasts two numbers of the next day, each as three quantiles: the return (how far
the price moves, and to which side) and the range (how far the day's highest price is above its lowest), which measures
volatility.

**The first does not work.** The page shows that "tomorrow's price is today's" is as good. Pages that claim otherwise have
mostly drawn today's price one day further right. **The second works**: calm and stormy days come in clusters. So the range of
tomorrow can be forecast, and with it how wide an interval around tomorrow's price has to be.

Data: daily prices of Apple, Google, IBM and Microsoft from 2000 to 2013, in the package ``bokeh_sampledata`` (from Quandl's
WIKI prices, public domain). The days from 2010 on are for the test.
"""

# sphinx_gallery_thumbnail_path = "results/stocks.png"
from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from bokeh_sampledata import stocks
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastrnn
from examples.page import Page
from examples.quantiles import quantile_loss

page = Page(__file__, __doc__)
PAST = 40  # trading days
QUANTILES = torch.tensor([0.05, 0.5, 0.95], device=page.device)
TICKERS = ("AAPL", "GOOG", "IBM", "MSFT")

# %%
# The data
# --------
# The range of a day measures its volatility (Parkinson, 1980).


def read(ticker: str) -> pd.DataFrame:
    """By day: the return since the day before, the logarithm of the range, and the change of the traded volume."""
    if ticker not in TICKERS:
        raise ValueError(f"ticker: expected one of {', '.join(TICKERS)}, got {ticker!r}")
    table = stocks.data[stocks.data["ticker"] == ticker].set_index("date")
    numbers = table[["high", "low", "adj_close", "volume"]]
    if not (numbers > 0).all(axis=None):
        raise ValueError(f"{ticker}: expected positive prices and volumes, got {(~(numbers > 0)).sum().to_dict()} without")
    table["range"] = np.log(np.log(table["high"] / table["low"]).clip(lower=1e-3))
    table[["return", "volume"]] = np.log(table[["adj_close", "volume"]]).diff()
    return table[["return", "range", "volume"]].iloc[1:]


def windows(ticker: str) -> tuple[np.ndarray, ...]:
    """[days, PAST, 3] features up to each day, the [days, 2] return and range of the next one, its date, and the ticker."""
    values = (table := read(ticker)).to_numpy()
    past = np.lib.stride_tricks.sliding_window_view(values[:-1], PAST, axis=0).swapaxes(1, 2)
    return past, values[PAST:, :2], table.index[PAST:].to_numpy(), np.full(len(past), ticker)


past, target, dates, tickers = (np.concatenate(part) for part in zip(*(windows(ticker) for ticker in TICKERS)))
later = dates >= np.datetime64("2010-01-01")
test_past = past[later]
mean, scale = past[~later].mean((0, 1)), past[~later].std((0, 1))


def normalised(values: np.ndarray) -> Tensor:
    """The first features, with the mean 0 and the variance 1 over the days of training."""
    at = slice(values.shape[-1])
    return torch.tensor((values - mean[at]) / scale[at], dtype=torch.float32, device=page.device)


loader = DataLoader(TensorDataset(normalised(past[~later]), normalised(target[~later])), batch_size=128, shuffle=True)


class Forecaster(nn.Module):
    def __init__(self, hidden_size: int = 64) -> None:
        super().__init__()
        self.lstm = fastrnn.LSTM(3, hidden_size, batch_first=True)
        self.readout = nn.Linear(hidden_size, 2 * len(QUANTILES))

    def forward(self, past: Tensor) -> Tensor:
        """[batch, PAST, 3] -> [batch, 2, 3] quantiles of the return and of the range"""
        return self.readout(self.lstm(past)[0][:, -1]).unflatten(-1, (2, len(QUANTILES)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable) -> float:
    """Take a step for each batch, and return the mean loss."""
    losses = []
    for past, target in batches:
        loss = quantile_loss(model(past), target, QUANTILES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


model = Forecaster().to(page.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
for _ in page.progress(range(page.pick(8, 1))):
    train(model, optimizer, loader)
page.race(model, train, loader)

# %%
# The test
# --------
# The error of the return is that of the price, in percent of it. A return of nothing says that tomorrow is today.

with torch.no_grad():
    quantiles = model(normalised(test_past)).cpu().numpy() * scale[:2, None] + mean[:2, None]  # [days, 2, 3]
returns, ranges = target[later].T
theirs, ours = np.abs(returns).mean(), np.abs(quantiles[:, 0, 1] - returns).mean()
print(f"mean absolute error of the return: LSTM {ours:.3%}, tomorrow is today {theirs:.3%}")
week, month = test_past[:, -5:, 1].mean(1), test_past[:, -22:, 1].mean(1)
forecasts = {"LSTM": quantiles[:, 1, 1], "today's": test_past[:, -1, 1], "last week's": week, "last month's": month}
errors = {name: float(np.abs(forecast - ranges).mean()) for name, forecast in forecasts.items()}
page.result("mean absolute error of the log range", errors.pop("LSTM"), errors, lower=True)

# %%
# Stormy days are those after a month of wide ranges. An interval of one width for all days suits no day.

level = QUANTILES.cpu().double()
fixed = np.broadcast_to(np.quantile(target[~later, 0], level), quantiles[:, 0].shape)
intervals = {"LSTM": quantiles[:, 0], "one width for all days": fixed}
losses = {name: 100 * float(quantile_loss(torch.tensor(q), torch.tensor(returns), level)) for name, q in intervals.items()}
page.result("quantile loss of the return, times 100", losses.pop("LSTM"), losses, lower=True)
stormy = month > np.median(month)
for name, q in intervals.items():
    inside = (q[:, 0] <= returns) & (returns <= q[:, 2])
    print(
        f"{name}: the 90 % interval holds {inside[~stormy].mean():.0%} of calm and {inside[stormy].mean():.0%} of stormy days"
    )

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
shown = np.flatnonzero(tickers[later] == "IBM")[330:480]
days = dates[later][shown]
left.fill_between(days, *(100 * quantiles[shown, 0, at] for at in (0, 2)), color="tab:blue", alpha=0.25, label="LSTM's 90 %")
left.plot(days, 100 * fixed[shown, ::2], "k--", linewidth=0.8)
left.plot(days, 100 * returns[shown], "k.", markersize=3, label="return")
left.set(title="IBM: returns, and the intervals forecast the day before", ylabel="return (%)")
right.plot(days, 100 * np.exp(ranges[shown]), "k.", markersize=3, label="range")
right.plot(days, 100 * np.exp(quantiles[shown, 1, 1]), color="tab:blue", label="LSTM's forecast")
right.set(title="IBM: the day's range", ylabel="highest above lowest price (%)")
left.legend()
right.legend()
page.save(figure)
