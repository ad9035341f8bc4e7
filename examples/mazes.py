"""A planner for MiniGrid's memory mazes that sees the whole map: what a page lets a robot imitate."""

from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from minigrid.core.constants import OBJECT_TO_IDX
from minigrid.core.world_object import Key
from minigrid.envs import MemoryEnv
from torch import Tensor

KINDS = len(OBJECT_TO_IDX)  # of cells: wall, key, ball, ...
LEFT, RIGHT, FORWARD = ACTIONS = range(3)
Pose = tuple[int, int, int]  # x, y, and the direction: 0 is right, 1 down, 2 left, 3 up


def make(size: int) -> MemoryEnv:
    """The maze MiniGrid-MemoryS13Random-v0 (or 17), without Gymnasium's wrappers: its corridor's length is random."""
    return MemoryEnv(size=size, random_length=True, render_mode="rgb_array")


def sight(observation: dict) -> Tensor:
    """[49]: the kinds of the 7 by 7 cells in sight"""
    return torch.as_tensor(observation["image"][..., 0], dtype=torch.long).flatten()


def search(maze: MemoryEnv, start: Pose, arrived: Callable[[Pose], bool]) -> tuple[list[int], Pose]:
    """The fewest actions from `start` to a pose where `arrived`, and that pose: breadth-first search."""
    came: dict[Pose, tuple[Pose, int]] = {}
    queue, known = deque([start]), {start}
    while queue:
        here = queue.popleft()
        if arrived(here):
            actions, pose = [], here
            while pose != start:
                pose, action = came[pose]
                actions.append(action)
            return actions[::-1], here
        x, y, direction = here
        dx, dy = ((1, 0), (0, 1), (-1, 0), (0, -1))[direction]
        ways = {LEFT: (x, y, (direction - 1) % 4), RIGHT: (x, y, (direction + 1) % 4)}
        if maze.grid.get(x + dx, y + dy) is None:
            ways[FORWARD] = (x + dx, y + dy, direction)
        for action, pose in ways.items():
            if pose not in known:
                known.add(pose)
                came[pose] = here, action
                queue.append(pose)
    raise ValueError(f"maze: expected a way to the goal, got none from {start}")


def plan(maze: MemoryEnv) -> list[int]:
    """The planner's actions: to the nearest pose from where the object in the room is visible, and from there to its like."""
    start = (int(maze.agent_pos[0]), int(maze.agent_pos[1]), int(maze.agent_dir))

    def sees(pose: Pose) -> bool:
        maze.agent_pos, maze.agent_dir = np.array(pose[:2]), pose[2]
        return bool(maze.agent_sees(1, maze.height // 2 - 1))

    there, pose = search(maze, start, sees)
    onward, _ = search(maze, pose, lambda pose: pose[:2] == maze.success_pos)
    maze.agent_pos, maze.agent_dir = np.array(start[:2]), start[2]
    return there + onward


def walk(maze: MemoryEnv, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A path of the planner's in the maze of that seed: [steps, 49] sights, the [steps] actions taken there, and [steps] times
    what the goal is: 1 for a key, 0 for a ball."""
    observation, _ = maze.reset(seed=seed)
    actions, sights = plan(maze), []
    for action in actions:
        sights.append(sight(observation))
        observation, *_ = maze.step(action)
    goal = int(isinstance(maze.grid.get(1, maze.height // 2 - 1), Key))
    return torch.stack(sights), torch.tensor(actions), torch.full((len(actions),), goal)
