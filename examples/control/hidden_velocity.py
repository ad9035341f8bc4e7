"""
Control: balance a pole whose velocity is hidden
================================================

In this game a cart moves left or right to balance a pole. The player sees where both are, but not how fast they move, so it
has to remember. It is a GRU, which PPO (Schulman et al., 2017) moves by small steps towards the actions that turned out better
than it had expected.

A rollout is ``[steps, games]``, and games end and begin in the midst of it. ``resets`` tells the GRU where: the state is zeros
again before such a step, and the rollout is one call as it is. It begins with the states that the one before it ended with. The
player itself goes step by step (``gru.step``). torch.nn's GRU has no resets, so in the comparison it goes step by step too.
The baseline is the same player, trained in the same way, whose memory is erased at every step. Data: simulated by
``gymnasium`` (MIT licence), ``CartPole-v1``, where an episode has 500 steps at most.
"""

# sphinx_gallery_thumbnail_path = "results/hidden_velocity.png"
from collections.abc import Iterable
from typing import Any

import gymnasium
import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.distributions import Categorical

import fastrnn
from examples.page import Page

page = Page(__file__, __doc__)
GAMES, STEPS, ROLLOUTS = 32, 128, page.pick(60, 2)
DISCOUNT, TRACE, CLIP = 0.99, 0.95, 0.2
SCALE = torch.tensor([1.0, 10.0], device=page.device)  # of the cart's position and of the pole's angle


class Policy(nn.Module):
    def __init__(self, hidden_size: int = 64) -> None:
        super().__init__()
        self.gru: Any = fastrnn.GRU(2, hidden_size)  # torch.nn's in the comparison
        self.action, self.value = nn.Linear(hidden_size, 2), nn.Linear(hidden_size, 1)

    def heads(self, hidden: Tensor) -> tuple[Categorical, Tensor]:
        return Categorical(logits=self.action(hidden)), self.value(hidden).squeeze(-1)

    def forward(self, looks: Tensor, states: Tensor, begins: Tensor) -> tuple[Categorical, Tensor]:
        """looks [T, B, 2], the states [1, B, H] before them, where episodes begin [T, B] -> actions and values [T, B]"""
        if isinstance(self.gru, fastrnn.GRU):
            return self.heads(self.gru(looks, states, resets=begins)[0])
        hidden = []
        for look, begin in zip(looks, begins):
            _, states = self.gru(look[None], states * ~begin[:, None])
            hidden.append(states[0])
        return self.heads(torch.stack(hidden))


class Player:
    """Plays many games at once, and goes on in each rollout where the last one stopped."""

    def __init__(self, policy: Policy, remembers: bool, games: int = GAMES, seed: int = page.seed) -> None:
        self.policy, self.remembers = policy, remembers
        self.games = gymnasium.make_vec("CartPole-v1", games, vectorization_mode="vector_entry_point")
        self.look = torch.tensor(self.games.reset(seed=seed)[0][:, [0, 2]], device=page.device) * SCALE
        self.state = torch.zeros(1, games, policy.gru.hidden_size, device=page.device)
        self.begins = torch.ones(games, dtype=torch.bool, device=page.device)  # an episode, at the step to come
        self.over = torch.zeros_like(self.begins)  # the step to come only changes games

    @torch.no_grad()
    def play(self, steps: int, greedy: bool = False) -> dict[str, Tensor]:
        """What happened, [steps, games] each. `counts` is False for the steps that only change games."""
        rows: list[dict[str, Tensor]] = []
        before = self.state
        for _ in range(steps):
            begins = self.begins | (not self.remembers)
            hidden, self.state = self.policy.gru.step(self.look, self.state * ~begins[:, None])
            choice, value = self.policy.heads(hidden)
            action = choice.logits.argmax(-1) if greedy else choice.sample()
            look, *outcome = self.games.step(action.cpu().numpy())
            reward, lost, late = (torch.tensor(part, device=page.device) for part in outcome[:3])
            row = {"look": self.look, "action": action, "value": value, "reward": reward, "lost": lost, "end": lost | late}
            rows.append(row | {"likelihood": choice.log_prob(action), "begins": begins, "counts": ~self.over})
            self.begins, self.over = self.over, lost | late
            self.look = torch.tensor(look[:, [0, 2]], device=page.device) * SCALE
        state = self.state * ~(self.begins | (not self.remembers))[:, None]
        last = self.policy.heads(self.policy.gru.step(self.look, state)[0])[1]
        return {"before": before, "last": last, **{name: torch.stack([row[name] for row in rows]) for name in rows[0]}}


def advantages(played: dict[str, Tensor]) -> Tensor:
    """Generalised advantage estimation (Schulman et al., 2016): [steps, games]"""
    following, trace, found = played["last"], torch.zeros_like(played["last"]), []
    for value, reward, lost, end in zip(*(played[name].flip(0) for name in ("value", "reward", "lost", "end"))):
        error = (1 - DISCOUNT) * reward + DISCOUNT * following * ~lost - value  # rewards so small that values are at most 1
        trace = error + DISCOUNT * TRACE * trace * ~end
        found.append(trace)
        following = value
    return torch.stack(found[::-1])


def minibatches(played: dict[str, Tensor], count: int = 4) -> list[tuple]:
    """The games in `count` groups: looks, the states that they begin with, where episodes begin, and more of each step."""
    gain = advantages(played)
    scaled = (gain - gain[played["counts"]].mean()) / gain[played["counts"]].std()
    parts = [played[name] for name in ("look", "before", "begins", "action", "likelihood", "counts")]
    parts += [scaled, gain + played["value"]]
    return [tuple(part[:, games] for part in parts) for games in torch.randperm(gain.shape[1]).tensor_split(count)]


def train(policy: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple]) -> float:
    losses = []
    for looks, states, begins, action, likelihood, counts, gain, target in batches:
        choice, value = policy(looks, states, begins)
        ratio = (choice.log_prob(action) - likelihood).exp()
        clipped = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain)
        loss = ((value - target).square() - clipped - 0.01 * choice.entropy())[counts].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


# %%
# In the test, the player takes the likelier action in new games. A score is the number of steps until a game's first end.

curves: dict[str, list[float]] = {"with memory": [], "memory erased": []}
scores: dict[str, float] = {}
for name, curve in curves.items():
    remembers = name == "with memory"
    torch.manual_seed(page.seed)
    player = Player(policy := Policy().to(page.device), remembers)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    for _ in page.progress(range(ROLLOUTS), name):
        played = player.play(STEPS)
        curve.append(float(played["counts"].sum() / played["end"].sum().clamp(min=1)))
        for _ in range(4):
            train(policy, optimizer, minibatches(played))
    if remembers:
        page.race(policy, train, minibatches(played))
    ends = Player(policy, remembers, games=100, seed=page.seed + 1).play(page.pick(500, 50), greedy=True)["end"]
    scores[name] = float(1 + (ends[:-1].cumsum(0) == 0).sum(0).double().mean())

page.result("mean steps of balance, 500 at most", scores["with memory"], {"memory erased": scores["memory erased"]})

figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
lengths = np.stack(list(curves.values()), axis=1).clip(max=500)
axes.plot(np.arange(1, ROLLOUTS + 1) * STEPS * GAMES / 1000, lengths, label=list(curves))
axes.set(title="a pole with hidden velocity", xlabel="thousand steps played", ylabel="steps per episode")
axes.legend()
page.save(figure)
