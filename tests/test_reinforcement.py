"""fastrnn.sb3 and fastrnn.torchrl stand in for sb3-contrib's policies and TorchRL's modules, which are asked what is right."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import fastrnn

gymnasium = pytest.importorskip("gymnasium", reason="needs gymnasium")

pytestmark = pytest.mark.filterwarnings("ignore")  # of what these libraries import
T, B, I, H = 11, 5, 3, 6


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        torch.testing.assert_close(found[name], right, rtol=2e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def rl():
    pytest.importorskip("torchrl", reason="needs torchrl")
    import torchrl.modules

    import fastrnn.torchrl

    return torchrl.modules, fastrnn.torchrl


def both(rl, name, **options):
    """TorchRL's module and ours with the same weights, and their layers."""
    keys = ("h", "c") if name == "LSTM" else ("h",)
    options |= {"in_keys": ["x", *keys], "out_keys": ["y", *(("next", key) for key in keys)]}
    theirs, own = (getattr(namespace, f"{name}Module")(I, H, **options) for namespace in rl)
    own.load_state_dict(theirs.state_dict())
    return theirs, own


def rollouts(name, shape=(B, T), layers=1, width=H, directions=1, begins=0.2):
    """A batch as a collector records it: states of every step, zeros where an episode begins."""
    from tensordict import TensorDict

    generator = torch.Generator().manual_seed(0)
    is_init = torch.rand(*shape, 1, generator=generator) < begins
    recorded = {"x": torch.randn(*shape, I, generator=generator), "is_init": is_init}
    for key in ("h", "c") if name == "LSTM" else ("h",):
        state = torch.randn(*shape, layers * directions, width if key == "h" else H, generator=generator)
        recorded[key] = state * ~is_init[..., None]
    return TensorDict(recorded, shape)


def results(rl, module, batch, recurrent=True):
    """What a module writes, and the gradients of its weights and its input."""
    batch = batch.clone()
    x = batch["x"].requires_grad_()  # TorchRL writes it anew
    module.zero_grad()
    with rl[0].set_recurrent_mode(recurrent):
        done = module(batch)
    generator = torch.Generator().manual_seed(1)
    written = {key: done[key] for key in module.out_keys}
    sum((value * torch.randn(value.shape, generator=generator)).sum() for value in written.values()).backward()
    found = {str(key): value.detach() for key, value in written.items()} | {"dx": x.grad}
    return found | {key: parameter.grad for key, parameter in module.named_parameters()}


def refuse_theirs(rl, name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("TorchRL's own forward ran")

    monkeypatch.setattr(getattr(rl[0], f"{name}Module"), "forward", refuse)


OPTIONS = [{}, {"num_layers": 2}, {"bias": False}]


@pytest.mark.parametrize("shape", [(B, T), (T,), (2, 3, T)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_episodes_in_a_batch_are_those_of_torchrl(rl, name, options, shape, monkeypatch):
    theirs, own = both(rl, name, **options)
    for begins in (0.3, 0.0, 1.0):
        batch = rollouts(name, shape, options.get("num_layers", 1), begins=begins)
        expected = results(rl, theirs, batch)
        with monkeypatch.context() as patch:
            refuse_theirs(rl, name, patch)
            assert_same(results(rl, own, batch), expected)


def test_a_projection(rl, monkeypatch):
    theirs, own = both(rl, "LSTM", proj_size=4)
    batch = rollouts("LSTM", width=4)
    expected = results(rl, theirs, batch)
    refuse_theirs(rl, "LSTM", monkeypatch)
    assert_same(results(rl, own, batch), expected)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_without_recorded_states(rl, name):
    theirs, own = both(rl, name)
    batch = rollouts(name).select("x", "is_init")
    assert_same(results(rl, own, batch), results(rl, theirs, batch))


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_what_resets_cannot_do_is_torchrls(rl, name):
    """States of another beginning than zero, and two directions."""
    theirs, own = both(rl, name)
    batch = rollouts(name)
    batch["h"] = torch.randn(batch["h"].shape)
    assert_same(results(rl, own, batch), results(rl, theirs, batch))
    theirs, own = both(rl, name, bidirectional=True)
    batch = rollouts(name, directions=2)
    assert_same(results(rl, own, batch), results(rl, theirs, batch))


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_single_steps_are_those_of_torchrl(rl, name):
    theirs, own = both(rl, name)
    batch = rollouts(name, (B,))
    assert_same(results(rl, own, batch, False), results(rl, theirs, batch, False))


def test_a_given_layer_and_a_missing_mark(rl):
    layer = torch.nn.LSTM(I, H, batch_first=True)
    weights = [*layer.parameters()]
    module = rl[1].LSTMModule(lstm=layer, in_keys=["x", "h", "c"], out_keys=["y", ("next", "h"), ("next", "c")])
    assert module.lstm is layer and type(layer) is fastrnn.LSTM
    assert all(one is other for one, other in zip(weights, module.parameters(), strict=True))
    with rl[0].set_recurrent_mode(True), pytest.raises(KeyError, match="is_init"):
        module(rollouts("LSTM").exclude("is_init"))


@pytest.fixture(scope="module")
def sb3():
    pytest.importorskip("sb3_contrib", reason="needs sb3-contrib")
    from sb3_contrib.ppo_recurrent import policies

    import fastrnn.sb3

    return policies, fastrnn.sb3


class Game(gymnasium.Env):
    """Ends after some steps, which are other ones each time. Observations are noise of a space."""

    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, space):
        self.observation_space, self.steps = space, 0

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.observation_space.seed(seed)
        self.left, self.steps = 2 + self.steps % 5, self.steps + 1
        return self.observation_space.sample(), {}

    def step(self, action):
        self.left, self.steps = self.left - 1, self.steps + 1
        return self.observation_space.sample(), float(action), self.left == 0, False, {}


VECTOR, PICTURE = gymnasium.spaces.Box(-1, 1, (I,)), gymnasium.spaces.Box(0, 255, (3, 36, 36), np.uint8)
SPACES = {
    "MlpLstmPolicy": VECTOR,
    "CnnLstmPolicy": PICTURE,
    "MultiInputLstmPolicy": gymnasium.spaces.Dict({"a": VECTOR, "b": VECTOR}),
}


def trainers(sb3, name="MlpLstmPolicy", **options):
    """RecurrentPPO with sb3-contrib's policy and with ours, alike in all else."""
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.vec_env import DummyVecEnv

    found = []
    for namespace in sb3:
        games = DummyVecEnv([lambda: Game(copy.deepcopy(SPACES[name]))] * 3)
        options = {"lstm_hidden_size": H, "net_arch": [4]} | options
        own = {"n_steps": 16, "batch_size": 20, "n_epochs": 2, "seed": 1, "policy_kwargs": options, "device": "cpu"}
        found.append(RecurrentPPO(getattr(namespace, name), games, **own))
    return found


@pytest.mark.parametrize("options", [{}, {"n_lstm_layers": 2}, {"shared_lstm": True, "enable_critic_lstm": False}], ids=str)
def test_values_and_likelihoods_of_a_rollout_are_those_of_sb3(sb3, options):
    theirs, own = trainers(sb3, **options)
    own.policy.load_state_dict(theirs.policy.state_dict())
    theirs.learn(48)
    own.policy.load_state_dict(theirs.policy.state_dict())
    for batch in theirs.rollout_buffer.get(20):
        found = []
        for policy in (own.policy, theirs.policy):
            policy.zero_grad()
            given = batch.observations, batch.actions.flatten(), batch.lstm_states, batch.episode_starts
            done = dict(zip(("value", "likelihood", "entropy"), policy.evaluate_actions(*given), strict=True))
            sum(value.sin().sum() for value in done.values()).backward()
            gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
            found.append({name: value.detach() for name, value in done.items()} | gradients)
        assert_same(*found)


@pytest.mark.parametrize("begins", [0.0, 0.3, 1.0])
def test_episodes_that_begin_in_the_midst_of_a_sequence(sb3, begins):
    theirs, own = (namespace.MlpLstmPolicy._process_sequence for namespace in sb3)
    stock = torch.nn.LSTM(I, H, 2)
    converted = fastrnn.convert(stock, inplace=False)
    x, states = torch.randn(B * T, I), tuple(torch.randn(2, 2, B, H))
    starts = (torch.rand(B * T) < begins).float()
    found = []
    for process, lstm in ((own, converted), (theirs, stock)):
        given, (h, c) = x.clone().requires_grad_(), (state.clone().requires_grad_() for state in states)
        y, (h_n, c_n) = process(given, (h, c), starts, lstm)
        (y.sin().sum() + h_n.sum() + c_n.cos().sum()).backward()
        done = {"y": y, "h_n": h_n, "c_n": c_n, "dx": given.grad, "dh": h.grad, "dc": c.grad}
        gradients = {name: parameter.grad for name, parameter in lstm.named_parameters()}
        found.append({name: value.detach() for name, value in done.items()} | gradients)
    assert_same(*found)


@pytest.mark.parametrize("name", SPACES)
def test_training_files_and_play_are_those_of_sb3(sb3, name, tmp_path, monkeypatch):
    theirs, own = trainers(sb3, name)
    theirs.set_random_seed(1)
    theirs.learn(96)
    monkeypatch.setattr(torch.nn.LSTM, "forward", None)  # torch.nn's own code does not run
    own.set_random_seed(1)
    own.learn(96)
    found, expected = (trainer.policy.state_dict() for trainer in (own, theirs))
    for key, right in expected.items():
        torch.testing.assert_close(found[key], right, rtol=1e-3, atol=1e-5, msg=key)
    own.save(tmp_path / "own")
    loaded = type(own).load(tmp_path / "own")
    assert type(loaded.policy) is getattr(sb3[1], name)
    look = own.env.reset()
    action, state = own.predict(look, deterministic=True)
    again, same = loaded.predict(look, deterministic=True)
    assert (action == again).all() and all((one == other).all() for one, other in zip(state, same, strict=True))


def test_a_policy_of_ones_own(sb3):
    class Own(sb3[0].MlpLstmPolicy):
        def forward(self, *args, **kwargs):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(*args, **kwargs)

    class Both(sb3[1].MlpLstmPolicy, Own):
        pass

    from sb3_contrib import RecurrentPPO

    trainer = RecurrentPPO(Both, Game(VECTOR), n_steps=8, batch_size=8).learn(8)
    assert trainer.policy.calls == 8 and type(trainer.policy.lstm_actor) is fastrnn.LSTM
