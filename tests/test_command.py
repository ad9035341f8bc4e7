"""`python -m fastrnn` and `fastrnn.timing.compare`: they say what is there, and time only what computes the same."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from contract import python
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import __main__ as command
from fastrnn import timing

QUICK = "--hidden 9 --input 5 --batch 3 --steps 4 --seconds 0.01".split()


def printed(capsys, *arguments: str) -> str:
    assert command.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_info_names_versions_and_engines(capsys):
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in printed(capsys, "info").splitlines())
    assert rows["fastrnn"].startswith(fastrnn.__version__) and rows["torch"] == torch.__version__
    assert rows["engine, cpu"].startswith("fastrnn, ")
    assert rows["threads"] == command.cpu.team()[1]
    if not torch.cuda.is_available():
        assert rows["engine, cuda"] == "none: torch finds no GPU here"
    assert {"Python", "numba", "triton", "processor", "CPUs", "kernel cache"} <= rows.keys()


def test_info_says_why_an_engine_does_not_run():
    run = "import runpy, sys; sys.argv = ['fastrnn', 'info']; runpy.run_module('fastrnn', run_name='__main__')"
    code = f"try:\n    {run}\nexcept SystemExit as ended:\n    assert ended.code == 0"
    assert re.search(r"engine, cpu +torch, because FASTRNN_BACKEND says so", python(code, FASTRNN_BACKEND="torch"))


@pytest.mark.skipif(command.cpu.load()[0] != "compiled", reason="the compiled runtime reads quotas")
@pytest.mark.parametrize(("quota", "words"), [(float("inf"), "there is no quota"), (1.5, "a quota grants it the time of 1.5")])
def test_info_names_the_quota(monkeypatch, capsys, quota, words):
    runtime = command.cpu.runtime_module()
    assert runtime.cpu_quota("") > 0
    given = SimpleNamespace(cpu_quota=lambda root: quota, tiers=runtime.tiers, threads=runtime.threads)
    monkeypatch.setattr(command.cpu, "runtime_module", lambda: given)
    assert words in printed(capsys, "info")


def test_info_says_why_torch_runs(monkeypatch, capsys):
    monkeypatch.setattr(command.dispatch, "unavailable", "no kernels fit")
    assert "torch.nn's own code, because no kernels fit" in printed(capsys, "info")


@pytest.mark.parametrize("more", [[], ["--train"], ["--layers", "2", "--bidirectional"], ["--dtype", "bfloat16", "--train"]])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_bench_prints_times_and_their_ratio(capsys, cell, more):
    out = printed(capsys, "bench", "--cell", cell, *QUICK, *more)
    assert out.startswith(f"{cell.upper()}(5, 9") and "batch 3, 4 steps" in out and "engine: cpu" in out
    assert ("training step" in out) == ("--train" in more)
    (line,) = (line for line in out.splitlines() if "speed-up" in line)
    low, middle, high = map(float, re.findall(r"([\d.]+)x", line))
    assert 0 < low <= middle <= high
    assert "Both compute the same" in out


def test_bench_without_rich(monkeypatch, capsys):
    rich = printed(capsys, "bench", *QUICK)
    for name in ("rich.console", "rich.table", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    plain = printed(capsys, "bench", *QUICK)
    assert "│" in rich and "│" not in plain
    table = [re.split(r"  +", line) for line in plain.splitlines()[2:6]]
    assert [row[0] for row in table] == ["inference", "torch.nn", "fastrnn", "speed-up"]
    assert table[0][1:] == ["p20", "p50", "p80"] and all(len(row) == 4 for row in table)


def test_bench_uses_the_threads_it_is_given(capsys):
    before = torch.get_num_threads()
    try:
        assert "on 1 threads of" in printed(capsys, "bench", "--threads", "1", *QUICK)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_bench_takes_no_time_of_wrong_results(monkeypatch, capsys):
    monkeypatch.setattr(timing, "difference", lambda a, b: 0.5)
    monkeypatch.setattr(timing, "interleave", None)
    assert command.main(["bench", *QUICK]) == 1
    caught = capsys.readouterr()
    assert "y: fastrnn's differs from torch.nn's by 0.5" in caught.err and "speed-up" not in caught.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required"),
        (["measure"], "invalid choice: 'measure'"),
        (["bench", "--cell", "mamba"], "argument --cell: invalid choice: 'mamba'"),
        (["bench", "--hidden", "0"], "argument --hidden: expected a whole number above 0, got '0'"),
        (["bench", "--batch", "many"], "argument --batch: expected a whole number above 0, got 'many'"),
        (["bench", "--threads", "-2"], "argument --threads: expected a whole number above 0, got '-2'"),
        (["bench", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["bench", "--seconds", "nan"], "argument --seconds: expected seconds above 0, at most 3600, got 'nan'"),
        (["bench", "--warmup"], "unrecognized arguments: --warmup"),
    ],
)
def test_bad_arguments_exit_with_2_and_a_line_that_says_why(capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_bad_argument(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["bench", "--device", "cuda"])
    assert ended.value.code == 2
    assert "torch finds no GPU here" in capsys.readouterr().err


class Model(nn.Module):
    """A model as users have them: token numbers in, two layers with dropout, a second result."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.layers = nn.GRU(6, 7, num_layers=2, dropout=0.5)
        self.readout = nn.Linear(7, 3)

    def forward(self, tokens):
        y, h = self.layers(self.embedding(tokens))
        return self.readout(y), h


@pytest.mark.parametrize("train", [False, True])
def test_compare_takes_a_model_and_leaves_it_alone(train):
    model = Model()
    found = timing.compare(model, torch.randint(10, (5, 4)), train=train, seconds=0.01)
    assert type(model.layers) is nn.GRU and model.training and model.readout.weight.grad is None
    assert found.times.keys() == {"torch.nn", "fastrnn"} and found.error < 1e-5
    assert found.speed_up["p20"] <= found.speed_up["median"] <= found.speed_up["p80"]
    assert str(found).startswith("training step: torch.nn " if train else "inference: torch.nn ")


def test_compare_takes_packed_sequences_and_states():
    layer = nn.LSTM(3, 4)
    packed = pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 2]))
    states = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    assert timing.compare(layer, packed, states, train=True, seconds=0.01).error < 1e-5


def test_compare_finds_a_wrong_gradient(monkeypatch):
    """fastrnn's copy gets other weights in one place, which only one gradient shows."""

    def broken(module):
        own = fastrnn.convert(module)
        own.bias_ih_l0.register_hook(lambda gradient: 1.1 * gradient)
        return own

    monkeypatch.setattr(timing, "convert", broken)
    with pytest.raises(RuntimeError, match=r"^grad bias_ih_l0: fastrnn's differs from torch.nn's by 0\.1 "):
        timing.compare(nn.GRU(3, 4), torch.randn(5, 2, 3), train=True, seconds=0.01)


def test_a_comparison_says_whether_its_times_are_steady():
    def taken(low: float, high: float) -> dict:
        return {"p20": low, "median": low, "p80": high}

    ratio = {"p20": 1.5, "median": 2.0, "p80": 2.5}
    steady = timing.Comparison("infer", {"torch.nn": taken(0.02, 0.021), "fastrnn": taken(0.01, 0.0125)}, ratio, 0.0)
    assert str(steady) == "inference: torch.nn 20.0 ms, fastrnn 10.0 ms: 2.00x as fast (1.50x to 2.50x)"
    for theirs, ours in (((0.02, 0.03), (0.01, 0.01)), ((0.02, 0.02), (0.01, 0.02))):
        unsteady = timing.Comparison("infer", {"torch.nn": taken(*theirs), "fastrnn": taken(*ours)}, ratio, 0.0)
        assert str(unsteady).splitlines() == [str(steady), timing.NOT_STEADY]


def test_compare_refuses_a_module_without_recurrent_layers():
    with pytest.raises(ValueError, match=r"^module: expected a layer that fastrnn has, or a model with one, got Linear$"):
        timing.compare(nn.Linear(2, 3), torch.zeros(1, 2))


def test_compare_takes_a_model_that_was_converted():
    layer, x = fastrnn.GRU(3, 4), torch.zeros(5, 2, 3)
    assert timing.compare(layer, x, seconds=0.01).error < 1e-5
    assert type(layer) is fastrnn.GRU


def test_the_package_does_not_import_the_command():
    assert python("import sys, fastrnn; print('fastrnn.timing' in sys.modules, 'fastrnn.machine' in sys.modules)") == (
        "False False\n"
    )
