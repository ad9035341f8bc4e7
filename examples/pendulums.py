"""Gymnasium's pendulum, many at once or filmed, from where one wants. The angle is 0 at the top and grows to the left."""

import os
from collections.abc import Sequence

import numpy as np
from gymnasium.envs.classic_control import PendulumEnv

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pictures are drawn in memory, and no screen is looked for


class Pendulums:
    """Pendulums with these angles and angular velocities."""

    def __init__(self, angles: Sequence[float] | np.ndarray, velocities: Sequence[float] | np.ndarray) -> None:
        self.environments = [PendulumEnv() for _ in angles]
        for environment, angle, velocity in zip(self.environments, angles, velocities):
            environment.reset()
            environment.state = np.array([angle, velocity])

    def look(self) -> np.ndarray:
        """[pendulums, 2]: the cosine, which is the height, and the sine of each angle."""
        angles = np.array([environment.state[0] for environment in self.environments])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    def push(self, torques: np.ndarray) -> np.ndarray:
        """Move each pendulum on by 0.05 s, and return the costs: of not being upright, of speed and of torque."""
        return np.array([-environment.step([torque])[1] for environment, torque in zip(self.environments, torques)])


ACTIONS = ("spins left", "spins right", "swings", "is held up", "is braked")


def film(action: str, frames: int, pixels: int, random: np.random.Generator) -> np.ndarray:
    """A clip [frames, pixels, pixels] of a pendulum that does this, one of ACTIONS. White is 1. ValueError: another action."""
    if action not in ACTIONS:
        raise ValueError(f"action: expected one of {', '.join(ACTIONS)}, got {action!r}")
    pendulum = PendulumEnv("rgb_array")
    pendulum.screen_dim = pixels
    pendulum.reset()
    if action == "is held up":
        pendulum.state = random.uniform([-0.2, -0.5], [0.2, 0.5])
    elif action in ("spins left", "spins right"):
        pendulum.state = np.array([random.uniform(-np.pi, np.pi), random.uniform(6, 8) * (1 if action == "spins left" else -1)])
    else:
        pendulum.state = np.array([np.pi + random.choice([-1, 1]) * random.uniform(0.3, 2.2), random.uniform(-3, 3)])
    clip = []
    for _ in range(frames):
        pendulum.last_u = None  # else an arrow in the picture would show the torque
        clip.append(pendulum.render().mean(-1) / 255)
        angle, velocity = pendulum.state
        hold, brake = -12 * np.sin(angle) - 3 * velocity, -1.5 * velocity
        pendulum.step([dict(zip(ACTIONS, (2.0, -2.0, 0.0, hold, brake)))[action]])
    return np.stack(clip)
