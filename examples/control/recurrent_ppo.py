"""
Control: RecurrentPPO of sb3-contrib
====================================

Who trains with `sb3-contrib <https://sb3-contrib.readthedocs.io>`_ changes one argument::

    from fastrnn.sb3 import MlpLstmPolicy

    model = RecurrentPPO(MlpLstmPolicy, env)  # was: RecurrentPPO("MlpLstmPolicy", env)

Its own policy calls the LSTM once for each step of a batch as soon as an episode begins in it, which is in nearly every batch.
fastrnn's policy is derived from it and calls its LSTM once. All else is sb3-contrib's: the algorithm, the networks around the
LSTM, the files.

Here both learn to balance a pole whose velocity is hidden, as in :doc:`hidden_velocity`, and take turns: a rollout and its
training of one, then of the other. Both draw the same random numbers, so they play the same games, until one day rounding
makes one of them act otherwise. From there on what they reach differs by chance. The baseline is sb3-contrib's own policy.
Data: simulated by ``gymnasium`` (MIT licence).
"""

# sphinx_gallery_thumbnail_path = "results/recurrent_ppo.png"
import time
from typing import Any

import gymnasium
import numpy as np
import torch
from matplotlib import pyplot as plt
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import set_random_seed

from examples.page import Page
from fastrnn.sb3 import MlpLstmPolicy

page = Page(__file__, __doc__)
GAMES, STEPS, TURNS = 8, page.pick(128, 32), page.pick(30, 2)
NETWORK: dict[str, Any] = {"lstm_hidden_size": 64, "net_arch": []}
OPTIONS: dict[str, Any] = {
    "n_steps": STEPS,
    "batch_size": 512,
    "learning_rate": 1e-3,
    "n_epochs": page.pick(10, 2),
    "seed": page.seed,
    "device": page.device,
    "policy_kwargs": NETWORK,
}


class HiddenVelocity(gymnasium.ObservationWrapper):
    """Of the cart and the pole only where they are."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[[0, 2]] * np.array([1, 10], np.float32)


def games() -> gymnasium.Env:
    return HiddenVelocity(gymnasium.make("CartPole-v1"))


models = {
    "sb3-contrib": RecurrentPPO("MlpLstmPolicy", make_vec_env(games, GAMES, seed=page.seed), **OPTIONS),
    "fastrnn": RecurrentPPO(MlpLstmPolicy, make_vec_env(games, GAMES, seed=page.seed), **OPTIONS),
}

# %%
# In turns, so that whatever else the machine does slows both.

seconds: dict[str, list[float]] = {name: [] for name in models}
curves: dict[str, list[float]] = {name: [] for name in models}
for turn in page.progress(range(TURNS)):
    for name, model in models.items():
        set_random_seed(page.seed + turn)
        start = time.perf_counter()
        model.learn(GAMES * STEPS, reset_num_timesteps=turn == 0)
        seconds[name].append(time.perf_counter() - start)
        curves[name].append(float(np.mean([episode["r"] for episode in model.ep_info_buffer or ()])))
same = next((turn for turn, (one, other) in enumerate(zip(*curves.values())) if one != other), TURNS) * GAMES * STEPS
print(f"frames in which all episodes had the same lengths: the first {same} of {TURNS * GAMES * STEPS}")
rates = {name: GAMES * STEPS / float(np.median(each)) for name, each in seconds.items()}

# %%
# One rollout, twice: the values and the likelihoods of all its actions, by the policy that sb3-contrib has trained, and by
# fastrnn's with the same weights.

stock = models["sb3-contrib"]
converted = MlpLstmPolicy(stock.observation_space, stock.action_space, lambda _: 1e-3, **NETWORK)
converted.to(page.device).load_state_dict(stock.policy.state_dict())
batch = next(stock.rollout_buffer.get())
with torch.no_grad():
    told = [
        policy.evaluate_actions(batch.observations, batch.actions.flatten(), batch.lstm_states, batch.episode_starts)
        for policy in (stock.policy, converted)
    ]
for what, one, other in zip(("values", "likelihoods"), *told):
    difference = float((one - other).abs().max() / one.abs().max())
    print(f"{what} of a rollout: the largest difference is {difference:.0e} of the largest of them")

# %%
# In the test, the players take the likelier action in new games.

for name, model in models.items():
    tests = make_vec_env(games, GAMES, seed=page.seed + 1)
    score, deviation = evaluate_policy(model, tests, n_eval_episodes=page.pick(50, 2))
    print(f"steps of balance of {name}, 500 at most: {score:.0f}, with a standard deviation of {deviation:.0f} between games")
page.result("frames a second", rates["fastrnn"], {"sb3-contrib's own policy": rates["sb3-contrib"]})
print(f"training and playing: {page.faster(*(1 / rates[name] for name in models))}")

figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained", sharey=True)
frames = np.arange(1, TURNS + 1) * GAMES * STEPS / 1000
for name, curve in curves.items():
    axes[0].plot(frames, curve, label=name)
    axes[1].plot(np.cumsum(seconds[name]), curve, label=name)
axes[0].set(title="a pole with hidden velocity", xlabel="thousand frames", ylabel="steps per episode")
axes[1].set(title="the same, by the clock", xlabel="seconds")
axes[0].legend()
page.save(figure)
