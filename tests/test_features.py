"""Layer norm, heads, clipped cell states, learned initial states and noise, against plain loops from their papers."""

from __future__ import annotations

import copy
import io
import pickle
import statistics

import pytest
import torch
import torch.nn.functional as F
from contract import bound, pairwise, relative, same_bits, threads
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn import cells, dispatch, fallback, features

LAYERS = {
    "rnn": (fastrnn.RNN, {}),
    "relu": (fastrnn.RNN, {"nonlinearity": "relu"}),
    "lstm": (fastrnn.LSTM, {}),
    "gru": (fastrnn.GRU, {}),
    "own lstm": (fastrnn.recurrent(cells.lstm), {}),
    "own gru": (fastrnn.recurrent(cells.gru), {}),
}


def loop(module, input, hx=None) -> list[Tensor]:
    """What the docs say of a layer, one step at a time: the output (of a packed sequence its data), then each state."""
    sizes, x = None, input
    if isinstance(input, PackedSequence):
        assert input.sorted_indices is None
        x, sizes = input.data, input.batch_sizes.tolist()
    elif module.batch_first:
        x = x.transpose(0, 1)
    D, H, heads = 1 + module.bidirectional, module.hidden_size, module.num_heads
    R = getattr(module, "proj_size", 0) or H
    lstm = isinstance(module, nn.LSTM) or module.__class__.__name__ == "Lstm"
    gru = isinstance(module, nn.GRU) or module.__class__.__name__ == "Gru"
    T, B = (len(sizes), sizes[0]) if sizes else x.shape[:2]
    sizes = sizes or [B] * T
    offsets = [sum(sizes[:t]) for t in range(T + 1)]
    zoneout = module.zoneout if isinstance(module.zoneout, tuple) else (module.zoneout, 0.0)
    if hx is None and module.learn_initial_state:
        kinds = ("h", "c") if lstm else ("h",)
        names = [f"_l{k}{end}" for k in range(module.num_layers) for end in ("", "_reverse")[:D]]
        given = [torch.stack([getattr(module, f"initial_{kind}{name}") for name in names]) for kind in kinds]
        given = [state.unsqueeze(1).expand(-1, B, -1) for state in given]
    elif hx is None:
        given = [x.new_zeros(module.num_layers * D, B, size) for size in (R, H)]
    else:
        given = list(hx) if lstm else [hx]
    rows, lasts = x.reshape(-1, x.shape[-1]), []
    for k in range(module.num_layers):
        masks = x.new_ones(D, B, R)
        if module.training and module.recurrent_dropout:
            p = module.recurrent_dropout
            masks = (torch.rand(D, B, R) >= p).to(x.dtype) / (1 - p)
        rates = [p for p in zoneout if p]
        if rates and module.training:  # 16 bits for each row of each step
            words = torch.empty(1, dtype=torch.int64).random_(-(2**63), None)
            words = words + torch.arange(1, -(-len(rows) * D * len(rates) * H // 4) + 1) * (0x9E3779B97F4A7C15 - 2**64)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
                words = (words ^ ((words >> shift) & (2 ** (64 - shift) - 1))) * factor
            drawn = words.view(torch.int16)[: len(rows) * D * len(rates) * H].view(-1, D, len(rates), H)
            drawn = torch.stack([(drawn[:, :, i] >= rate * 2**16 - 2**15).to(x.dtype) for i, rate in enumerate(rates)], 2)
        elif rates:
            drawn = (1 - torch.tensor(rates, dtype=x.dtype)).view(1, 1, -1, 1).expand(len(rows), D, -1, H)
        outputs = []
        for d in range(D):
            suffix = f"_l{k}" + "_reverse" * d
            w_ih, w_hh = getattr(module, "weight_ih" + suffix), getattr(module, "weight_hh" + suffix)
            b_ih, b_hh = getattr(module, "bias_ih" + suffix, None), getattr(module, "bias_hh" + suffix, None)
            norms = [getattr(module, f"norm_{kind}{suffix}", None) for kind in ("ih", "hh", "c", "c_bias")]
            h, c = given[0][k * D + d], given[1][k * D + d] if lstm else None
            found: list = [None] * T
            for t in reversed(range(T)) if d else range(T):
                b = sizes[t]
                p, old_c, m = h[:b] * masks[d, :b], None if c is None else c[:b], None
                if heads > 1:
                    blocks = w_hh.view(-1, heads, H // heads, H // heads)
                    of_h = torch.einsum("bki,gkoi->bgko", p.view(b, heads, -1), blocks).flatten(1)
                else:
                    of_h = F.linear(p, w_hh)
                of_x = F.linear(rows[offsets[t] : offsets[t + 1]], w_ih)
                if module.layer_norm:
                    of_x, of_h = (F.layer_norm(v, v.shape[1:], g) for v, g in zip((of_x, of_h), norms[:2], strict=True))
                of_x, of_h = of_x if b_ih is None else of_x + b_ih, of_h if b_hh is None else of_h + b_hh
                noise = list(drawn[offsets[t] : offsets[t + 1], d].unbind(1)) if rates else []
                if lstm:
                    i, f, g, o = (of_x + of_h).chunk(4, -1)
                    new_c = f.sigmoid() * old_c + i.sigmoid() * g.tanh()
                    if module.cell_clip is not None:
                        new_c = new_c.clamp(-module.cell_clip, module.cell_clip)
                    inner = F.layer_norm(new_c, (H,), *norms[2:]) if module.layer_norm else new_c
                    new_h = o.sigmoid() * inner.tanh()
                elif gru:
                    (r, z, n), (h_r, h_z, h_n) = of_x.chunk(3, -1), of_h.chunk(3, -1)
                    z = (z + h_z).sigmoid()
                    new_h = (1 - z) * (n + (r + h_r).sigmoid() * h_n).tanh() + z * h[:b]
                else:
                    new_h = getattr(torch, getattr(module, "nonlinearity", "tanh"))(of_x + of_h)
                if zoneout[0]:
                    m = noise.pop(0)
                    new_h = m * new_h + (1 - m) * h[:b]
                if lstm and len(zoneout) > 1 and zoneout[1]:
                    m = noise.pop(0)
                    new_c = m * new_c + (1 - m) * old_c
                if R != H:
                    new_h = new_h @ getattr(module, "weight_hr" + suffix).T
                h = torch.cat((new_h, h[b:]))
                c = c if c is None else torch.cat((new_c, c[b:]))
                found[t] = new_h
            outputs.append(torch.cat(found))
            lasts.append([h, c] if lstm else [h])
        rows = torch.cat(outputs, -1)
        if module.training and module.dropout and k < module.num_layers - 1:
            packed = isinstance(input, PackedSequence)
            rows = F.dropout(rows if packed else rows.view(T, B, -1), module.dropout).view(len(rows), -1)
    if not isinstance(input, PackedSequence):
        rows = rows.view(T, B, -1)
        rows = rows.transpose(0, 1) if module.batch_first else rows
    return [rows, *map(torch.stack, zip(*lasts, strict=True))]


def run(module, input, hx=None) -> list[Tensor]:
    output, state = module(input, hx)
    return [output.data if isinstance(output, PackedSequence) else output, *(state if isinstance(state, tuple) else [state])]


def make(cell: str, inputs: int = 5, hidden: int = 12, dtype=torch.float64, **settings) -> nn.Module:
    made, more = LAYERS[cell]
    module = made(inputs, hidden, dtype=dtype, **more, **settings)
    for name, parameter in module.named_parameters():
        if name.startswith(("initial", "norm_c_bias")):
            nn.init.uniform_(parameter, -0.5, 0.5)
        elif name.startswith("norm"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return module


def sample(module, steps: int = 4, batch: int = 3, packed: bool = False, hx: bool = False):
    """(input, leaves of it, states or None)."""
    dtype = module.weight_ih_l0.dtype
    x = torch.randn(batch, steps, module.input_size).to(dtype)
    depth, H = module.num_layers * (1 + module.bidirectional), module.hidden_size
    shapes = [(depth, batch, getattr(module, "proj_size", 0) or H)]
    if isinstance(module, nn.LSTM) or module.__class__.__name__ == "Lstm":
        shapes.append((depth, batch, H))
    states = [torch.randn(shape).to(dtype) for shape in shapes] if hx else []
    x = x if module.batch_first else x.transpose(0, 1)
    return x, states


def results(function, module, x, states, lengths=None, seed: int = 3) -> dict[str, Tensor]:
    """Outputs and all gradients of a random combination of them, by name; noise from one seed."""
    leaves = {"x": x.clone().requires_grad_()} | {f"state {k}": s.clone().requires_grad_() for k, s in enumerate(states)}
    given = leaves["x"]
    if lengths is not None:
        given = pack_padded_sequence(given, lengths, batch_first=module.batch_first)
    hx = [leaves[f"state {k}"] for k in range(len(states))]
    torch.manual_seed(seed)
    outputs = function(module, given, None if not hx else tuple(hx) if len(hx) > 1 else hx[0])
    draw = torch.Generator().manual_seed(1)
    loss = sum((each * torch.randn(each.shape, generator=draw).to(each)).sum() for each in outputs)
    leaves |= dict(module.named_parameters())
    grads = torch.autograd.grad(loss, [*leaves.values()], allow_unused=True)
    grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves.values(), grads, strict=True)]
    found = {f"output {k}": each.detach() for k, each in enumerate(outputs)}
    return found | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


GRID = {
    "cell": tuple(LAYERS),
    "layer_norm": (False, True),
    "num_heads": (1, 3),
    "cell_clip": (None, 0.1),
    "learn_initial_state": (False, True),
    "recurrent_dropout": (0.0, 0.4),
    "zoneout": (0.0, 0.3, (0.0, 0.2), (0.3, 0.2)),
    "num_layers": (1, 2),
    "bidirectional": (False, True),
    "bias": (True, False),
    "layout": ("time", "batch", "packed"),
    "dropout": (0.0, 0.3),
    "proj_size": (0, 5),
    "training": (True, False),
    "hx": (False, True),
    "recompute": (False, True),
}


def possible(row: dict) -> bool:
    lstm = "lstm" in row.get("cell", "lstm")
    projected, zoneout = row.get("proj_size", 0) > 0, row.get("zoneout", 0.0)
    fits = lstm or (row.get("cell_clip") is None and not isinstance(zoneout, tuple))
    of_h = zoneout[0] if isinstance(zoneout, tuple) else zoneout
    alone = not projected or (row.get("cell", "lstm") == "lstm" and row.get("num_heads", 1) == 1 and not of_h)
    return fits and alone and (row.get("num_layers", 2) > 1 or row.get("dropout", 0.0) == 0)


ROWS = pairwise(GRID, possible)


def module_of(row: dict, **more) -> nn.Module:
    row = dict(row)
    layout, training, hx = row.pop("layout"), row.pop("training"), row.pop("hx")
    if row["proj_size"] == 0:
        del row["proj_size"]
    module = make(row.pop("cell"), batch_first=layout == "batch", **row, **more)
    return module.train(training), hx, torch.tensor([6, 4, 4, 1]) if layout == "packed" else None


def name_of(row: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in row.items() if value not in (False, None, 0.0))


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_the_definition_is_the_plain_loop(row, monkeypatch):
    monkeypatch.setattr(dispatch, "forced", "reference")
    module, hx, lengths = module_of(row)
    x, states = sample(module, 6, 4, hx=hx)
    found, truth = (results(function, module, x, states, lengths) for function in (run, loop))
    assert found.keys() == truth.keys()
    for key, value in truth.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


COMPILED = [
    {"cell": "lstm", "layer_norm": True, "recurrent_dropout": 0.4},
    {"cell": "lstm", "cell_clip": 0.1, "zoneout": (0.3, 0.2), "recurrent_dropout": 0.4},
    {"cell": "gru", "zoneout": 0.3, "recurrent_dropout": 0.4, "num_heads": 3},
    {"cell": "lstm", "recurrent_dropout": 0.4, "proj_size": 5, "learn_initial_state": True},
    {"cell": "relu", "recurrent_dropout": 0.4, "num_heads": 3, "dropout": 0.3},
]
NORMED = [  # with each other feature
    {"cell": "lstm", "layer_norm": True, "cell_clip": 0.5, "zoneout": (0.3, 0.2), "num_heads": 3},
    {"cell": "gru", "layer_norm": True, "zoneout": 0.3, "num_heads": 3, "learn_initial_state": True},
    {"cell": "relu", "layer_norm": True, "recurrent_dropout": 0.4, "num_heads": 3, "dropout": 0.3},
    {"cell": "lstm", "layer_norm": True, "proj_size": 5, "dropout": 0.3},
]
SHAPES = [
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"num_layers": 2, "packed": True},
    {"bias": False, "recompute": True},
]
# The first three have cells whose kernels are compiled here: some in one dtype are enough for every day.
DAILY, SLOWLY = [*COMPILED[:2], *COMPILED[3:]], [COMPILED[2], *NORMED]


def each(daily: list[dict], slowly: list[dict]):
    slow = [pytest.param(settings, marks=pytest.mark.slow) for settings in slowly]
    return pytest.mark.parametrize("settings", [*daily, *slow], ids=name_of)


@each(DAILY, SLOWLY)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiled_kernels_are_within_the_contract(settings, training, monkeypatch):
    """Each number in float32 against the loop in float64, and what plain operations make of it.

    With layer norm by the median of some draws: a row of little variance makes much of its roundings, whoever has rounded.
    """
    for shape, hidden, steps, batch in zip(SHAPES, (33, 66, 18), (5, 6, 9), (7, 50, 1), strict=True):
        errors: dict[str, list[tuple[float, float]]] = {}
        for seed in range(5 if settings.get("layer_norm") else 1):
            own = {**settings, **shape}
            packed = own.pop("packed", False)
            if own.get("dropout") and own.get("num_layers", 1) == 1:
                del own["dropout"]
            torch.manual_seed(seed)
            module = make(own.pop("cell"), hidden=hidden, **own).train(training)
            lengths = torch.arange(batch).flip(0) % steps + 1 if packed else None
            lengths = None if lengths is None else lengths.sort(descending=True).values
            x, states = sample(module, steps, batch)
            truth = results(loop, module, x, states, lengths)
            single = copy.deepcopy(module).float()
            assert fastrnn.explain(single, x.float()).engine == "cpu"
            found = results(run, single, x.float(), states, lengths)
            monkeypatch.setattr(dispatch, "forced", "reference")
            plain = results(run, single, x.float(), states, lengths)
            monkeypatch.undo()
            for key, value in truth.items():
                errors.setdefault(key, []).append((relative(found[key], value), relative(plain[key], value)))
        for key, pairs in errors.items():
            own_error, of_plain = map(statistics.median, zip(*pairs, strict=True))
            allowed = bound(torch.float32, of_plain)
            assert own_error <= allowed, f"{shape}: {key}: {own_error:.2g} > {allowed:.2g}"


@each(COMPILED[3:], [*COMPILED[:3], *NORMED])
def test_float64_kernels_are_the_loop(settings):
    module = make(hidden=33 if settings.get("num_heads") else 34, num_layers=2, bidirectional=True, **settings)
    x, states = sample(module, 5, 7, hx=True)
    found, truth = (results(function, module, x, states) for function in (run, loop))
    for key, value in truth.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("settings", COMPILED[1:], ids=name_of)
def test_gradients_of_any_order(settings, monkeypatch):
    """Through the operators' reference, in float64: numerical gradients, second ones, and forward mode."""
    monkeypatch.setattr(dispatch, "forced", "reference")
    settings = {"hidden": 6 if settings.get("num_heads") else 7, **settings}
    module = make(settings.pop("cell"), 2, settings.pop("hidden"), bidirectional=True, **{**settings, "dropout": 0.0})
    x, states = sample(module, 3, 2, hx=True)

    def call(x, *states):
        torch.manual_seed(0)
        return tuple(run(module, x, states if len(states) > 1 else states[0]))

    leaves = [each.requires_grad_() for each in (x, *states)]
    torch.autograd.gradcheck(call, leaves, check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_second_derivatives_of_the_kernels_are_those_of_the_loop():
    for settings in COMPILED[3:]:
        settings = {**settings, "dropout": 0.0}
        module = make(hidden=6, **settings)
        x, states = sample(module, 3, 2, hx=True)
        found = []
        for function in (run, loop):
            leaves = [each.clone().requires_grad_() for each in (x, *states)] + list(module.parameters())
            torch.manual_seed(0)
            n = len(states)
            outputs = function(module, leaves[0], tuple(leaves[1 : 1 + n]) if n > 1 else leaves[1])
            first = torch.autograd.grad(sum(y.pow(3).sum() for y in outputs), leaves, create_graph=True, allow_unused=True)
            total = sum(gradient.pow(2).sum() for gradient in first if gradient is not None)
            found.append(torch.autograd.grad(total, leaves, allow_unused=True))
        for one, other in zip(*found, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_noise_is_the_same_for_a_seed():
    """On any number of threads, and in either layout; and another for another seed."""
    module = make("lstm", 20, 64, dtype=torch.float32, num_layers=2, recurrent_dropout=0.3, dropout=0.2)
    x = torch.randn(9, 16, 20)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            torch.manual_seed(5)
            found.append(run(module, x))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            same_bits(one, two)
    by_batch = make("lstm", 20, 64, dtype=torch.float32, num_layers=2, recurrent_dropout=0.3, dropout=0.2, batch_first=True)
    by_batch.load_state_dict(module.state_dict())
    torch.manual_seed(5)
    same_bits(run(by_batch, x.transpose(0, 1))[0].transpose(0, 1), found[0][0])
    assert not torch.equal(run(module, x)[0], found[0][0])


@pytest.mark.parametrize("settings", COMPILED[3:], ids=name_of)
def test_resets_and_lengths_beside_noise(settings, monkeypatch):
    module = make(hidden=33 if settings.get("num_heads") else 34, num_layers=2, bidirectional=True, **settings)
    x, states = sample(module, 7, 5, hx=True)
    resets, lengths = torch.rand(7, 5) < 0.3, torch.tensor([7, 3, 0, 6, 1])

    def call(module, x, hx):
        y, state = module(x, hx, resets=resets, lengths=lengths)
        return [y, *(state if isinstance(state, tuple) else [state])]

    found = results(call, module, x, states)
    monkeypatch.setattr(dispatch, "forced", "reference")
    for key, value in results(call, module, x, states).items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rates", [(0.2,), (0.3, 0.3), (0.0001, 0.9), (1 - 1e-9, 0.5)], ids=str)
def test_zones_are_the_same_whoever_makes_them(rates, dtype, monkeypatch):
    """The runtime, on any number of threads, and torch's operations."""
    for shape in ((3, 5, 2, len(rates), 33), (70, 32, 1, len(rates), 100), (1, 1, len(rates), 1)):
        found = []
        for native, count in ((dispatch.native, 1), (dispatch.native, 3), (None, 1)):
            monkeypatch.setattr(dispatch, "native", native)
            torch.manual_seed(2)
            with threads(count):
                found.append(features.zones(shape, rates, dtype, torch.device("cpu")))
        assert found[0].shape == (*shape[:-3], shape[-3] * shape[-2] * shape[-1])
        assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2]) and found[2].dtype is dtype
    torch.manual_seed(2)
    zones = features.zones((300, 40, 1, len(rates), 50), rates, dtype, torch.device("cpu"))
    for rate, own in zip(rates, zones.view(300, 40, len(rates), 50).unbind(2), strict=True):
        nearest = min(round(rate * 65536), 65535) / 65536
        assert abs(1 - own.double().mean().item() - nearest) < 4.5 * (nearest * (1 - nearest) / own.numel()) ** 0.5


@pytest.mark.skipif(dispatch.native is None, reason="there is no compiled runtime")
@pytest.mark.parametrize("hx", [False, True], ids=["fresh", "given"])
@pytest.mark.parametrize(
    "settings",
    [
        {"cell": "lstm", "layer_norm": True, "num_layers": 2, "bidirectional": True},
        {"cell": "lstm", "recurrent_dropout": 0.4, "learn_initial_state": True, "bias": False},
        {"cell": "relu", "num_heads": 3, "num_layers": 2, "batch_first": True},
        {"cell": "own gru", "recurrent_dropout": 0.4, "num_heads": 3, "bidirectional": True, "batch_first": True},
    ],
    ids=name_of,
)
def test_one_call_of_the_runtime_does_what_python_does(settings, hx, monkeypatch):
    """To the bit, and draws as much; a call that it declines has drawn nothing before."""
    module = make(dtype=torch.float32, **settings)
    x, states = sample(module, 5, 7, hx=hx)
    x, states = x.float(), [state.float() for state in states]
    run(module, x)  # compiles kernels
    usual, taken, found = fallback._by_runtime, [], []
    for by_runtime in (lambda *given: taken.append(usual(*given)) or taken[-1], lambda *given: None):
        monkeypatch.setattr(fallback, "_by_runtime", by_runtime)
        found.append(results(run, module, x, states) | {"generator": torch.get_rng_state().view(torch.int64)})
        assert taken[0] is not None
        torch.manual_seed(3)
        with torch.no_grad():
            found[-1] |= {f"alone {k}": each for k, each in enumerate(run(module, x))}
        found[-1]["then"] = torch.get_rng_state().view(torch.int64)
    assert (taken[-1] is None) == ("recurrent_dropout" in settings) and len(taken) == 2
    for key, value in found[1].items():
        same_bits(found[0][key], value)


def test_evaluation_draws_nothing():
    module = make("lstm", recurrent_dropout=0.5).eval()
    plain = fastrnn.LSTM(5, 12, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    x, _ = sample(module)
    before = torch.get_rng_state()
    same_bits(run(module, x)[0], plain(x)[0])
    assert torch.equal(before, torch.get_rng_state())


def test_unused_settings_leave_torch_nns_attributes():
    plain, stock = fastrnn.LSTM(3, 4, num_heads=1, zoneout=(0, 0.0), cell_clip=None), nn.LSTM(3, 4)
    assert plain.__dict__.keys() == stock.__dict__.keys() and repr(plain) == repr(stock)
    plain.recurrent_dropout = 0.5
    assert plain._fastrnn_fast_path is None
    plain.recurrent_dropout = 0
    assert plain._fastrnn_fast_path == "LSTM" and plain.__dict__.keys() == stock.__dict__.keys()


@pytest.mark.parametrize(
    ("cell", "settings", "error", "words"),
    [
        ("lstm", {"num_heads": 5}, ValueError, "num_heads: expected a divisor of hidden_size 12, got 5"),
        ("lstm", {"num_heads": 0}, ValueError, "num_heads: expected a divisor of hidden_size 12, got 0"),
        ("own gru", {"num_heads": 2.0}, ValueError, "num_heads: expected a divisor of hidden_size 12, got 2.0"),
        ("lstm", {"num_heads": 2, "proj_size": 3}, ValueError, "num_heads: expected 1 with proj_size 3, got 2"),
        ("lstm", {"cell_clip": -1}, ValueError, "cell_clip: expected a positive finite number or None, got -1"),
        ("lstm", {"cell_clip": float("nan")}, ValueError, "got nan"),
        ("lstm", {"cell_clip": float("inf")}, ValueError, "got inf"),
        ("lstm", {"cell_clip": "1"}, TypeError, "cell_clip: expected a positive number or None, got '1'"),
        ("gru", {"cell_clip": 1.0}, ValueError, "cell_clip: expected None, because GRU has no cell state c, got 1.0"),
        ("own gru", {"cell_clip": 1.0}, ValueError, "cell_clip: expected None, because Gru has no cell state c, got 1.0"),
        ("rnn", {"learn_initial_state": 1}, TypeError, "learn_initial_state should be a bool, got 1"),
        ("own gru", {"layer_norm": "c"}, TypeError, "layer_norm should be a bool, got 'c'"),
        ("gru", {"recurrent_dropout": 1}, ValueError, "recurrent_dropout: expected a probability p, 0 <= p < 1, got 1"),
        ("gru", {"recurrent_dropout": float("nan")}, ValueError, "got nan"),
        ("gru", {"recurrent_dropout": True}, TypeError, "recurrent_dropout: expected a number p, 0 <= p < 1, got True"),
        ("lstm", {"zoneout": 1.0}, ValueError, "zoneout: expected a probability p, 0 <= p < 1, got 1.0"),
        ("lstm", {"zoneout": (0.1, -0.1)}, ValueError, "zoneout: expected a probability p, 0 <= p < 1, got -0.1"),
        ("lstm", {"zoneout": (0.1,)}, ValueError, "zoneout: expected a probability, or one for each of h, c, got (0.1,)"),
        ("gru", {"zoneout": (0.1, 0.1)}, ValueError, "zoneout: expected a probability, or one for each of h, got (0.1, 0.1)"),
        ("lstm", {"zoneout": 0.1, "proj_size": 3}, ValueError, "zoneout: expected 0 for h with proj_size 3, got 0.1"),
    ],
)
def test_bad_settings(cell, settings, error, words):
    with pytest.raises(error) as caught:
        make(cell, **settings)
    assert words in str(caught.value)


def test_settings_are_checked_when_they_are_changed():
    for module in (make("lstm", num_heads=2), make("own lstm", num_heads=2)):
        module.zoneout = (0.0, 0.5)
        with pytest.raises(ValueError, match="zoneout: expected a probability"):
            module.zoneout = 2
        assert module.zoneout == (0.0, 0.5)
        with pytest.raises(AttributeError, match="learn_initial_state: only the constructor sets it"):
            module.learn_initial_state = True
        del module.zoneout
        assert module.zoneout == 0.0 and "zoneout" not in repr(module)


@pytest.mark.parametrize("cell", ["lstm", "own lstm"])
def test_copies_pickles_and_state_dicts(cell, monkeypatch):
    monkeypatch.setattr(dispatch, "forced", "reference")
    settings = {"layer_norm": True, "num_heads": 3, "cell_clip": 0.1, "learn_initial_state": True, "recurrent_dropout": 0.4}
    settings |= {"zoneout": (0.3, 0.2)}
    module = make(cell, num_layers=2, bidirectional=True, **settings)
    assert repr(module).endswith(
        "layer_norm=True, num_heads=3, cell_clip=0.1, learn_initial_state=True, recurrent_dropout=0.4, zoneout=(0.3, 0.2))"
    )
    assert module.weight_hh_l1_reverse.shape == (48, 4) and module.initial_c_l1_reverse.shape == (12,)
    x, _ = sample(module)
    torch.manual_seed(0)
    expected = run(module, x)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    fresh = make(cell, num_layers=2, bidirectional=True, **settings)
    fresh.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False), fresh):
        torch.manual_seed(0)
        for one, other in zip(run(twin, x), expected, strict=True):
            same_bits(one, other)
    module.reset_parameters()
    assert (module.norm_hh_l1 == 1).all() and not module.initial_h_l0.any() and module.weight_hh_l0.abs().max() <= 12**-0.5


def test_a_learned_state_is_where_hx_is_missing(monkeypatch):
    monkeypatch.setattr(dispatch, "forced", "reference")
    for cell in ("lstm", "gru", "own lstm"):
        module = make(cell, learn_initial_state=True, num_layers=2)
        x, states = sample(module, hx=True)
        names = ("h", "c")[: len(states)]
        learned = [torch.stack([getattr(module, f"initial_{name}_l{k}") for k in (0, 1)]) for name in names]
        given = [state.unsqueeze(1).expand(-1, 3, -1).contiguous() for state in learned]
        hx = tuple(given) if len(given) > 1 else given[0]
        same_bits(module(x)[0], module(x, hx)[0])
        same_bits(module(x[:, 0])[0], module(x[:, :1])[0][:, 0])  # without a batch
        same_bits(module.step(x[0])[0], module.step(x[0], hx)[0])


@pytest.mark.parametrize("settings", [{"learn_initial_state": True}, {"zoneout": (0.1, 0.3), "bidirectional": True}], ids=str)
def test_compiles_exports_and_recomputes(settings):
    module = make("lstm", dtype=torch.float32, num_heads=3, recurrent_dropout=0.4, num_layers=2, **settings)
    x = torch.randn(6, 4, 5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = {}
    for name, function in (("eager", module), ("compiled", compiled)):
        torch.manual_seed(0)
        y = function(x)[0]
        found[name] = [y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other)
    module.eval()
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x)[0], module(x)[0])


def test_compiled_zoneout_beside_resets_and_lengths():
    """The noise of an eager call, in a graph: the same for a seed, with its gradients."""
    module = make("lstm", cell_clip=0.1, zoneout=(0.3, 0.2), recurrent_dropout=0.4, num_layers=2, dtype=torch.float32)
    x, resets, lengths = torch.randn(6, 4, 5), torch.rand(6, 4) < 0.3, torch.tensor([6, 0, 3, 5])
    compiled = torch.compile(module, backend="aot_eager")
    found = {}
    for name, function in (("eager", module), ("compiled", compiled)):
        torch.manual_seed(0)
        y, state = function(x, resets=resets, lengths=lengths)
        outputs = [y, *state]
        found[name] = [*outputs, *torch.autograd.grad(sum(each.square().sum() for each in outputs), [*module.parameters()])]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other)


def test_what_torch_nn_has_not_is_not_reverted_or_scripted():
    model = nn.Sequential(make("gru", zoneout=0.1))
    with pytest.raises(RuntimeError, match=r"revert: torch.nn's GRU has no zoneout=0.1"):
        fastrnn.revert(model)
    with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile a GRU with zoneout=0.1"):
        torch.jit.script(model)
    assert type(fastrnn.freeze(make("lstm", num_heads=2).eval())) is fastrnn.LSTM


def test_explain():
    module, x = make("lstm", zoneout=0.1), torch.randn(2, 3, 5).double()
    found = fastrnn.explain(module, x)
    assert found.engine == "cpu" and found.declined["torch"] == "torch.nn has no zoneout=0.1"


@pytest.mark.parametrize("settings", [{"num_heads": 2}, {"cell_clip": 0.1, "zoneout": (0.3, 0.2)}], ids=["heads", "zoneout"])
def test_half_precision_and_compressed_layers(settings):
    module = make("lstm", 6, 16, dtype=torch.float32, recurrent_dropout=0.4, **settings)
    x = torch.randn(20, 8, 6)
    half = copy.deepcopy(module).bfloat16()
    torch.manual_seed(0)
    expected = run(module, x)
    torch.manual_seed(0)
    y, *_ = run(half, x.bfloat16())
    # bfloat16 has eight bits, and its roundings add up over twenty steps
    torch.testing.assert_close(y.float(), expected[0], rtol=0.1, atol=0.05)
    y.float().sum().backward()
    assert half.weight_hh_l0.grad.dtype is torch.bfloat16
    compressed = fastrnn.compress(copy.deepcopy(module))  # whose matrices have eight bits, and nothing else
    torch.manual_seed(0)
    torch.testing.assert_close(run(compressed, x)[0], expected[0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_heads_of_any_size_share_no_unit(name):
    """Threads whose heads end within a vector, with a mask, add to the gradient of their own units of the initial state."""
    layer = getattr(fastrnn, name)(3, 120, num_heads=8, recurrent_dropout=0.5)
    x, hx = torch.randn(17, 17, 3), [torch.rand(1, 17, 120, requires_grad=True) for _ in range(1 + (name == "LSTM"))]

    def gradients():
        torch.manual_seed(5)
        y, _ = layer(x, tuple(hx) if name == "LSTM" else hx[0])
        return torch.autograd.grad(y.square().sum(), [*layer.parameters(), *hx])

    with threads(1):
        expected = gradients()
    for _ in range(10):
        with threads(2):
            found = gradients()
        assert all(map(torch.equal, found, expected))
