"""
Control: find the way in a maze that is seen in part
====================================================

A robot in MiniGrid's memory maze sees only a few cells ahead. It has to find the room with an object, a key or a ball, and
then walk down a corridor to a fork, where it has to turn to the object of the same kind. At the fork, the room is long out of
sight.

The robot learns from a planner that sees the whole map, in ``examples/mazes.py``: a breadth-first search over positions and
directions. The robot imitates its steps and turns from what is in sight, and a GRU is its memory. It also learns to say which
object it looks for, which teaches the memory what to keep. Paths have different lengths, so they are packed. On its way the
robot uses ``gru.step``.

The baseline is the same network, trained on the same paths, whose memory is erased at every step.

Data: simulated by ``minigrid`` (Apache licence; Chevalier-Boisvert et al., 2023), ``MiniGrid-MemoryS13Random-v0``.
"""

# sphinx_gallery_thumbnail_path = "results/path_planning.png"
from collections.abc import Iterable

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastrnn
from examples import mazes
from examples.page import Page

page = Page(__file__, __doc__)

# %%
# The planner's paths
# -------------------

maze = mazes.make(13)
paths = [
    [part.to(page.device) for part in mazes.walk(maze, seed)] for seed in page.progress(range(page.pick(2000, 40)), "walking")
]
lengths = [len(actions) for _, actions, _ in paths]
print(f"{len(paths)} paths of {min(lengths)} to {max(lengths)} steps")

# %%
# The robot
# ---------


class Robot(nn.Module):
    """Chooses an action from what is in sight, and from what it remembers."""

    def __init__(self, remembers: bool, hidden_size: int = 128) -> None:
        super().__init__()
        self.remembers = remembers
        self.look = nn.Sequential(nn.Embedding(mazes.KINDS, 8), nn.Flatten(), nn.Linear(49 * 8, 64), nn.ReLU())
        self.gru = fastrnn.GRU(64, hidden_size)
        self.action, self.goal = nn.Linear(hidden_size, len(mazes.ACTIONS)), nn.Linear(hidden_size, 2)

    def forward(self, sights: PackedSequence) -> tuple[Tensor, Tensor]:
        """Packed [49] sights -> logits of actions and of goals, in packed order"""
        seen = self.look(sights.data)
        if self.remembers:
            hidden = self.gru(PackedSequence(seen, *sights[1:]))[0].data
        else:
            hidden = self.gru(seen[None])[0][0]  # each step is a sequence of its own
        return self.action(hidden), self.goal(hidden)

    def choose(self, sights: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[robots, 49] sights and the state before -> [robots] actions and the state after"""
        hidden, state = self.gru.step(self.look(sights), state if self.remembers else None)
        return self.action(hidden).argmax(-1), state


def batches(size: int = 64) -> Iterable[tuple[PackedSequence, Tensor, Tensor]]:
    """An epoch: all paths in a new order, packed."""
    for chosen in torch.randperm(len(paths)).split(size):
        parts = (pack_sequence([paths[at][part] for at in chosen], enforce_sorted=False) for part in range(3))
        sights, actions, goals = parts
        yield sights, actions.data, goals.data


def train(robot: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable) -> float:
    """Take a step for each batch, and return the mean loss."""
    losses = []
    for sights, actions, goals in batches:
        action, goal = robot(sights)
        loss = cross_entropy(action, actions) + cross_entropy(goal, goals)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


@torch.no_grad()
def test(robot: Robot, size: int, count: int) -> tuple[float, float]:
    """The share of new mazes in which the robot finds the right object, and its steps there over the planner's."""
    tested = [mazes.make(size) for _ in range(count)]
    sights = [mazes.sight(maze.reset(seed=10**6 + at)[0]) for at, maze in enumerate(tested)]
    planned = [len(mazes.plan(maze)) for maze in tested]
    state, going, found = None, [True] * count, [0] * count  # steps to the right object, 0 for none
    for step in range(1, 61):
        actions, state = robot.choose(torch.stack(sights).to(page.device), state)
        for at, (maze, action) in enumerate(zip(tested, actions.tolist())):
            if going[at]:
                observation, reward, over, *_ = maze.step(action)
                sights[at], going[at], found[at] = mazes.sight(observation), not over, step if float(reward) > 0 else 0
    ratios = [steps / best for steps, best in zip(found, planned) if steps]
    return len(ratios) / count, float(np.mean(ratios)) if ratios else float("nan")


robots = {name: Robot(remembers) for name, remembers in {"with memory": True, "memory erased": False}.items()}
losses: dict[str, list[float]] = {name: [] for name in robots}
found: dict[tuple[str, int], tuple[float, float]] = {}
for name, robot in robots.items():
    optimizer = torch.optim.Adam(robot.to(page.device).parameters(), lr=3e-3)
    for _ in page.progress(range(page.pick(10, 1)), name):
        losses[name].append(train(robot, optimizer, batches()))
    for size in (13, 17):
        found[name, size] = test(robot.eval(), size, page.pick(100, 5))

page.race(robots["with memory"], train, batches())
baseline = {"memory erased": found["memory erased", 13][0]}
page.result("right object found in new mazes", found["with memory", 13][0], baseline, unit="%")
if found["with memory", 13][0]:
    print(f"its way there is {found['with memory', 13][1]:.2f} times as long as the planner's")
baseline = {"memory erased": found["memory erased", 17][0]}
page.result("in larger mazes, of 17 cells and not 13", found["with memory", 17][0], baseline, unit="%")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(1, 1.3), layout="constrained")
shown = mazes.make(13)
shown.reset(seed=3)
left.imshow(shown.render())
left.set(title="a maze; the light cells are in sight", xticks=[], yticks=[])
for name, curve in losses.items():
    right.plot(range(1, len(curve) + 1), curve, ".-", label=f"{name}, {found[name, 13][0]:.0%} found")
right.set(title="imitating the planner", xlabel="epoch", ylabel="loss")
right.legend()
page.save(figure)
