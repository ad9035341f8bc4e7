"""
Control: a learned model of a pendulum, and plans made in it
============================================================

Gymnasium's pendulum hangs from a motor that is too weak to lift it at once: it has to swing. This page learns how the
pendulum moves by watching it under random torques, and then swings it up by planning.

The model is one GRU. While it watches, each input is an observation (the angle; the velocity is hidden) and a torque. While
it imagines, the observation is blank and only torques come in. So its state has to hold the velocity, and carry it on. A plan
is a sequence of torques whose imagined cost is low, found by the cross-entropy method (Rubinstein, 1999; PlaNet, Hafner et
al., 2019). It takes hundreds of imagined futures a step, so the weights are frozen for it (``fastrnn.freeze``). Data:
simulated by ``gymnasium`` (MIT licence), ``Pendulum-v1``.
"""

# sphinx_gallery_thumbnail_path = "results/world_model.png"
from collections.abc import Iterable

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastrnn
from examples.page import Page
from examples.pendulums import Pendulums

page = Page(__file__, __doc__)
STEPS, WATCHED, IMAGINED = 100, 10, 30  # of 0.05 s
random = np.random.default_rng(page.seed)


def record(episodes: int, steps: int) -> Tensor:
    """[episodes, steps, 4]: cosine and sine, a torque that changes now and then, and a tenth of the cost of the step."""
    watched = Pendulums(random.uniform(-np.pi, np.pi, episodes), 8 * random.uniform(-1, 1, episodes) ** 3)
    torques, rows = np.zeros(episodes), []
    for _ in range(steps):
        torques = np.where(random.random(episodes) < 0.2, random.uniform(-2, 2, episodes), torques)
        rows.append(np.column_stack([watched.look(), torques, watched.push(torques) / 10]))
    return torch.tensor(np.stack(rows, axis=1), dtype=torch.float32, device=page.device)


loader = DataLoader(TensorDataset(record(page.pick(1000, 64), STEPS)), batch_size=64, shuffle=True)
test_set = record(page.pick(200, 16), WATCHED + IMAGINED)

# %%
# The model
# ---------


class Model(nn.Module):
    def __init__(self, hidden_size: int = 64) -> None:
        super().__init__()
        self.gru = fastrnn.GRU(4, hidden_size, batch_first=True)
        self.readout = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, 3))

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> Tensor:
        """[batch, steps, 4] (cosine, sine, 1 if seen, torque) -> [batch, steps, 3] (next cosine and sine, cost)"""
        return self.readout(self.gru(inputs, state)[0])


def blank(rows: Tensor, watched: Tensor) -> Tensor:
    """The model's inputs of recorded rows [batch, steps, 4], of which it sees the first `watched` [batch, 1]."""
    seen = (torch.arange(rows.shape[1], device=rows.device) < watched).to(rows.dtype).unsqueeze(-1)
    return torch.cat([rows[..., :2] * seen, seen, rows[..., 2:3]], dim=-1)[:, :-1]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable) -> float:
    losses = []
    for (rows,) in batches:
        target = torch.cat([rows[:, 1:, :2], rows[:, :-1, 3:]], dim=-1)
        error = model(blank(rows, torch.randint(3, STEPS - 10, (len(rows), 1), device=rows.device))) - target
        loss = error[:, 2:].square().mean()  # the velocity cannot be known from a single angle
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


model, epochs = Model().to(page.device), page.pick(80, 2)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for epoch in page.progress(range(epochs)):
    optimizer.param_groups[0]["lr"] = 3e-3 * (1 - epoch / epochs)
    train(model, optimizer, loader)
page.race(model, train, loader)

# %%
# The distance of the imagined from the real position, on a circle of diameter 2. The baseline goes on turning as the pendulum
# did between the last two sights.

fastrnn.freeze(model.eval())
with torch.no_grad():
    imagined = model(blank(test_set, torch.full((len(test_set), 1), WATCHED, device=page.device)))[:, WATCHED - 1 :, :2]
before, last = torch.atan2(test_set[..., 1], test_set[..., 0])[:, WATCHED - 2 : WATCHED].split(1, dim=1)
turned = last + (last - before) * torch.arange(1, IMAGINED + 1, device=page.device)
forecasts = {"GRU": imagined, "keeps turning": torch.stack([turned.cos(), turned.sin()], dim=-1)}
errors = {name: (at - test_set[:, WATCHED:, :2]).norm(dim=-1).mean(0).cpu().numpy() for name, at in forecasts.items()}
means = {name: float(error.mean()) for name, error in errors.items()}
page.result(f"mean distance over {IMAGINED} imagined steps", means.pop("GRU"), means, lower=True)

# %%
# Planning in imagination
# -----------------------
# At each step, torques are drawn from a normal distribution, their futures imagined, and the distribution moved to the best of
# them, a few times over. The first torque is applied. What the pendulum then shows comes in by ``gru.step``.

ROUNDS, CANDIDATES, BEST, PENDULUMS = 3, 100, 10, 8


@torch.no_grad()
def plan(now: Tensor, state: Tensor | None, mean: Tensor) -> Tensor:
    """Improve the plans `mean` [pendulums, IMAGINED], from what is seen now [pendulums, 3] and the GRU's state before it."""
    deviation = torch.full_like(mean, 1.5)
    states = None if state is None else state.repeat(1, CANDIDATES, 1)
    for _ in range(ROUNDS):
        torques = (mean + deviation * torch.randn(CANDIDATES, *mean.shape, device=mean.device)).clamp(-2, 2)
        inputs = torch.cat([torques.new_zeros(*torques.shape, 3), torques.unsqueeze(-1)], dim=-1)
        inputs[:, :, 0, :3] = now
        costs = model(inputs.flatten(0, 1), states)[..., 2].sum(1).view(CANDIDATES, PENDULUMS)
        best = costs.topk(BEST, dim=0, largest=False).indices.unsqueeze(-1).expand(-1, -1, IMAGINED)
        mean, deviation = torques.gather(0, best).mean(0), torques.gather(0, best).std(0)
    return mean


def swing(planned: bool, steps: int) -> np.ndarray:
    """Let pendulums that start near the bottom swing, by plan or by random torques: heights [steps, pendulums]."""
    swinging, state = Pendulums(random.uniform(np.pi - 0.5, np.pi + 0.5, PENDULUMS), random.uniform(-0.5, 0.5, PENDULUMS)), None
    mean, heights = torch.zeros(PENDULUMS, IMAGINED, device=page.device), []
    for _ in page.progress(range(steps), "planning" if planned else "random torques"):
        now = torch.tensor(np.pad(swinging.look(), ((0, 0), (0, 1)), constant_values=1), dtype=mean.dtype, device=page.device)
        mean = plan(now, state, mean) if planned else torch.rand_like(mean) * 4 - 2
        _, state = model.gru.step(torch.cat([now, mean[:, :1]], dim=-1), state)
        heights.append(swinging.look()[:, 0])
        swinging.push(mean[:, 0].double().cpu().numpy())
        mean = torch.cat([mean[:, 1:], torch.zeros_like(mean[:, :1])], dim=1)
    return np.array(heights)


heights = {name: swing(name == "planned", page.pick(140, 5)) for name in ("planned", "random torques")}
up = {name: float((reached[-40:] > 0.9).mean()) for name, reached in heights.items()}
page.result("share of the last two seconds upright", up.pop("planned"), up, unit="%")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
left.plot(np.arange(1, IMAGINED + 1) * 0.05, np.stack(list(errors.values()), axis=1), label=list(errors))
left.set(title="imagined against real", xlabel="seconds since the last sight", ylabel="mean distance")
left.legend()
right.plot(np.arange(len(heights["planned"])) * 0.05, heights["planned"], color="tab:blue", linewidth=0.8)
right.set(title="swinging up by plan, all pendulums", xlabel="seconds", ylabel="height (1 is upright)")
page.save(figure)
