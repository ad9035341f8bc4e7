"""Heads, clipped cell states, learned initial states, recurrent dropout and zoneout, against plain loops from their papers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from contract import FACTOR, SLACK, Error, pairwise, same_bits, threads
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn import cells, dispatch
from fastrnn.kernels import cpu

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
        if rates and module.training:  # one number for each row of each step
            shape = (T, B) if len(rows) == T * B else (len(rows),)
            drawn = torch.rand(*shape, D, len(rates), H).view(-1, D, len(rates), H)
            drawn = torch.stack([(drawn[:, :, i] >= rate).to(x.dtype) for i, rate in enumerate(rates)], 2)
        elif rates:
            drawn = (1 - torch.tensor(rates).to(x.dtype)).view(1, 1, -1, 1).expand(len(rows), D, -1, H)
        outputs = []
        for d in range(D):
            suffix = f"_l{k}" + "_reverse" * d
            w_ih, w_hh = getattr(module, "weight_ih" + suffix), getattr(module, "weight_hh" + suffix)
            b_ih, b_hh = getattr(module, "bias_ih" + suffix, None), getattr(module, "bias_hh" + suffix, None)
            h, c = given[0][k * D + d], given[1][k * D + d] if lstm else None
            found: list = [None] * T
            for t in reversed(range(T)) if d else range(T):
                b = sizes[t]
                p, old_c, m = h[:b] * masks[d, :b], None if c is None else c[:b], None
                if heads > 1:
                    blocks = w_hh.view(-1, heads, H // heads, H // heads)
                    of_h = torch.einsum("bki,gkoi->bgko", p.view(b, heads, -1), blocks).flatten(1)
                    of_h = of_h if b_hh is None else of_h + b_hh
                else:
                    of_h = F.linear(p, w_hh, b_hh)
                of_x = F.linear(rows[offsets[t] : offsets[t + 1]], w_ih, b_ih)
                noise = list(drawn[offsets[t] : offsets[t + 1], d].unbind(1)) if rates else []
                if lstm:
                    i, f, g, o = (of_x + of_h).chunk(4, -1)
                    new_c = f.sigmoid() * old_c + i.sigmoid() * g.tanh()
                    if module.cell_clip is not None:
                        new_c = new_c.clamp(-module.cell_clip, module.cell_clip)
                    new_h = o.sigmoid() * new_c.tanh()
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
        if name.startswith("initial"):
            nn.init.uniform_(parameter, -0.5, 0.5)
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
