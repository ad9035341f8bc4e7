"""The examples do what they show: the models equal those on torch.nn, and learn."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from examples import char_lm
from examples.models import GRUModel, LSTMModel, RNNModel

MODELS = {"rnn": RNNModel, "lstm": LSTMModel, "gru": GRUModel}


def on_torch(model: nn.Module) -> nn.Module:
    """The same model with torch.nn's layer and the same weights."""
    cell = type(model).__name__.removesuffix("Model")
    layer = getattr(model, cell.lower())
    with torch.random.fork_rng():
        twin = type(model)(layer.input_size, layer.hidden_size, layer.num_layers, model.fc.out_features)
        recurrent = getattr(nn, cell)(layer.input_size, layer.hidden_size, layer.num_layers, batch_first=True)
    setattr(twin, cell.lower(), recurrent)
    twin.load_state_dict(model.state_dict())
    return twin


def assert_near(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    error = torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected)
    assert error <= 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("cell", MODELS)
def test_model_equals_its_twin_on_torch(cell, num_layers):
    torch.manual_seed(0)
    model = MODELS[cell](5, 17, num_layers, 3)
    twin = on_torch(model)
    assert type(getattr(twin, cell)) is not type(getattr(model, cell))
    x, labels = torch.randn(7, 11, 5), torch.randint(3, (7,))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [m(inputs[i]) for i, m in enumerate((model, twin))]
    for output in outputs:
        cross_entropy(output, labels).backward()
    assert_near(*outputs, "logits")
    assert_near(*(x.grad for x in inputs), "gradient of x")
    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, expected[name].grad, f"gradient of {name}")


@pytest.mark.parametrize("cell", MODELS)
def test_model_learns_digits(cell):
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16  # a digit is 8 steps, its rows
    y = torch.tensor(labels)
    torch.manual_seed(0)
    held_out, *batches = torch.randperm(len(x)).split(150)
    model = MODELS[cell](8, 64, 1, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(12):
        for batch in batches:
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (model(x[held_out]).argmax(1) == y[held_out]).float().mean()
    assert accuracy > 0.85, f"{accuracy:.0%} of held-out digits right"


@pytest.mark.parametrize(("cell", "layers"), [("lstm", 2), ("gru", 1), ("rnn", 1)])
def test_char_lm(cell, layers, tmp_path, capsys):
    picture = tmp_path / "loss.png"
    sizes = f"--hidden-size 32 --layers {layers} --batch-size 8 --sequence-length 20 --steps 12".split()
    runs = char_lm.main(["--cell", cell, *sizes, "--output", str(picture)])
    theirs, ours = runs["torch.nn"], runs["fastrnn"]
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert ours.losses[-1] < ours.losses[0] - 0.3
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "seconds" in printed
    assert "written by fastrnn's model" in printed
