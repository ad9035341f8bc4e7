"""Layers run by the Triton kernels themselves, below dispatch: on a GPU, or on CPU tensors in Triton's interpreter.

Imported by tests and by the processes that interpret for them: triton must not be imported before TRITON_INTERPRET is set.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import _make_layer, weight_names
from contract import FACTOR, SLACK, Error
from torch import Tensor

from fastrnn import cells, features
from fastrnn.cells import (
    Gate,
    Hidden,
    Input,
    State,
    Weight,
    erf,
    exp,
    expm1,
    gelu,
    log,
    log1p,
    maximum,
    minimum,
    relu,
    sigmoid,
    softplus,
    sqrt,
    tanh,
    where,
)
from fastrnn.kernels import gradients
from fastrnn.kernels.cells import CELLS, Cell
from fastrnn.kernels.gpu import meetings_of
from fastrnn.kernels.gpu.plan import Device, Plan, Sizes, choose, plans
from fastrnn.kernels.layer import Inputs, Needs, Outer, Steps
from fastrnn.kernels.layer import Layer as Description

H100 = Device("cuda", 90, 132, 227 * 1024)


@cells.cell
def every_function(a: Gate, b: Input, e: Hidden, c: State, w: Weight):
    """Each of the elementary functions, which are written out for Triton, or are its own."""
    c = where((a > 0) & ~(b >= 1) | (c == w), log(1 + abs(c)), minimum(log1p(exp(-abs(a))), sqrt(b * b + 1)))
    return maximum(tanh(a) - sigmoid(e), relu(b)) + gelu(c) * expm1(-abs(b)) + softplus(e) / (3 + erf(w)), c


@dataclass(frozen=True)
class Layer:
    """A call, and how it runs.

    cell:  a built-in one, else `every_function`, or one that comes with fastrnn, or one of test_cells.py's.
    tiles: single, resident (weights kept), or streamed: split (its sums shared by warps) or wide.
    chunk: of the sums; small, so that a small layer has several. 0 for what the chooser takes.
    marks: resets, restarts (to other states than it begins with), lengths (of dense input), both of the last two, or none.
    noise: a mask, zoneout of all states, both of them, or zoneout in evaluation: one number for all rows and steps.
    norm:  with layer norm.
    dc_steps: gradients come in for the states but h after each step.
    together: in the interpreter, one launch whose programs meet at barriers, and not a launch a step.
    sizes: T, B, I, and H of a head.
    layers: so many at once, with spans of two steps where they are interpreted.
    """

    cell: str = "lstm"
    tiles: str = "split"
    chunk: int = 32
    heads: int = 1
    directions: int = 1
    reverse: bool = False
    layout: str = "time"
    bias: bool = True
    project: bool = False
    save: bool = True
    incoming: str = "all"
    dtype: torch.dtype = torch.float32
    marks: str = "none"
    noise: str = "none"
    norm: bool = False
    dc_steps: bool = False
    together: bool = False
    precision: str = "ieee"
    sizes: tuple[int, int, int, int] = (4, 3, 5, 19)
    layers: int = 1

    def __str__(self) -> str:
        default = Layer()
        fields = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        return " ".join([self.cell, self.tiles] + [f"{k}={v}" for k, v in fields.items() if k not in ("cell", "tiles")])

    @property
    def kind(self) -> Cell:
        plain = self.plain
        zoned = self.noise not in ("none", "mask")
        states = [zoned and (state != "h" or not self.project) for state in features.state_names(plain)]
        return CELLS[features.derived(plain.name, self.norm, None, tuple(states))]

    @property
    def plain(self) -> Cell:
        """The cell without layer norm and zoneout."""
        if self.cell in CELLS:
            return CELLS[self.cell]
        if self.cell == "every_function":
            return every_function.definition
        if self.cell in cells.SHIPPED:
            return getattr(cells, self.cell).definition
        import test_cells

        return getattr(test_cells, self.cell).definition

    def arguments(self, seed: int = 0) -> dict:
        torch.manual_seed(seed)
        T, B, I, H = self.sizes
        made = _make_layer(
            self.kind.name,
            self.directions,
            self.bias,
            self.project,
            self.layout == "packed",
            self.layout == "batch",
            self.reverse,
            (T, B, I, H * self.heads),
            heads=self.heads,
        )
        for _ in range(self.layers - 1):
            above = _make_layer(self.kind.name, 1, self.bias, sizes=(T, B, H, H))
            made["weights"] = made["weights"] + above["weights"]
            made |= {name: None if made[name] is None else torch.cat([made[name], above[name]]) for name in ("h0", "c0")}
        if not self.kind.mode:  # far from zero, which some divide by
            made |= {name: made[name].abs() + 0.5 for name in ("h0", "c0") if made[name] is not None}
        kinds = made["layer"].kinds()  # as torch.nn scales them: else the state is chaotic, and rounding decides
        made["weights"] = [
            weight / self.sizes[3] ** 0.5 if kinds[k % len(kinds)] in ("w_ih", "w_hh") else weight
            for k, weight in enumerate(made["weights"])
        ]
        if self.layout == "packed":  # a row that ends early, one that ends in the middle
            lengths = sorted((max(1, T - b * T // B) for b in range(B)), reverse=True)
            steps = torch.tensor([sum(t < length for length in lengths) for t in range(T)])
            made |= {"batch_sizes": steps, "x": torch.randn(int(steps.sum()), self.sizes[2], dtype=torch.float64)}
        if self.marks in ("lengths", "both"):
            made["lengths"] = torch.arange(self.sizes[1]) * 5 % (self.sizes[0] + 1)  # a row without steps first, no order
            where = torch.arange(self.sizes[0]).unsqueeze(1) >= made["lengths"]
            made["x"][where.T if self.layout == "batch" else where] = torch.nan  # which nobody may read
        if self.marks in ("resets", "restarts", "both"):
            made["resets"] = torch.rand(made["x"].shape[:-1]) < 0.4
        if self.noise in ("mask", "both"):
            made["mask"] = (torch.rand(made["h0"].shape, dtype=torch.float64) < 0.7) * 1.375
        if self.marks in ("restarts", "both"):
            made["layer"] = made["layer"]._replace(restarts=True)
            states = {name: made[name] for name in ("h0", "c0") if made[name] is not None}
            made |= {name: torch.cat((state, state.flip(1) / 2), 1) for name, state in states.items()}
        if count := self.kind.noise * H * self.heads:
            width, leading = self.directions * count, made["x"].shape[:-1]
            if self.noise == "evaluation":
                made["noise"] = torch.linspace(0.25, 1, width, dtype=torch.float64).expand(*leading, -1)
            else:  # drawn in [T, B, ...], whatever the layout
                batch = self.layout == "batch"
                drawn = (torch.rand(*leading[:: -1 if batch else 1], width) < 0.7).double()
                made["noise"] = drawn.transpose(0, 1) if batch else drawn
        names = (*Inputs._fields, "weights", "layer")
        return cast({name: made.get(name) for name in names}, self.dtype)

    def plan(self, forward: bool, device: Device, interpreted: bool) -> Plan:
        T, B, _, H = self.sizes
        R = 1 if self.project else H
        precision = "tf32" if device.backend == "cuda" and self.dtype is not torch.float32 else "ieee"
        sizes = Sizes(T, B, H, R, self.directions * self.heads, self.kind.gates, self.dtype.itemsize, precision)
        if self.norm:
            sizes = replace(sizes, meetings=meetings_of(self.kind), heads=self.heads)
        if self.layers > 1:
            known = replace(sizes, T=1000, bytes_=2, layers=self.layers)  # of which there is a plan whatever is to be tested
            chosen = choose(device, known, forward, "wavefront")
            if not interpreted:
                return chosen
            return replace(chosen, chunk=32, stages=2, span=2, feed=(16, 16, 16, 2))
        if self.tiles == "single":
            return choose(device, sizes, forward, "single")
        of_both = [replace(sizes, precision="tf32"), replace(sizes, precision="ieee", bytes_=4)]  # each has kinds of its own
        if self.precision == "tf32x3":
            of_both = [replace(sizes, precision="tf32x3")]
        chosen = next(
            plan
            for each in of_both
            for plan in plans(device, each, forward)
            if plan.schedule != "single"
            and plan.resident == (self.tiles == "resident")
            and (plan.resident or (plan.split > 1) == (self.tiles == "split"))
        )
        if self.chunk:
            warps = 2 if chosen.split > 1 else 8
            chosen = replace(chosen, chunk=self.chunk, split=2 if chosen.split > 1 else 1, warps=warps, stages=2)
        together = self.together or not interpreted or any(sizes.meetings)
        if together and device.backend == "cuda" and chosen.groups:
            return replace(chosen, schedule="persistent")
        return replace(chosen, schedule="stepwise")


def cast(arguments: dict, dtype: torch.dtype, device: str = "cpu") -> dict:
    def one(value, name=""):
        if isinstance(value, list):
            return [one(each) for each in value]
        if not isinstance(value, Tensor) or name == "batch_sizes":
            return value
        shape = value.shape  # what is the same in all rows stays one number
        value = value[tuple(slice(None if step else 1) for step in value.stride())]
        return value.to(device, dtype if value.is_floating_point() else value.dtype).expand(shape)

    return {name: one(value, name) for name, value in arguments.items()}


def incoming(layer: Layer, outputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Gradients of the outputs that carry weight, rounded to the layer's dtype."""
    torch.manual_seed(1)
    made = {f"d{name}": torch.randn_like(outputs[name]).to(layer.dtype) for name in ("y", "h_n", "c_n")}
    return {
        name: None if not made[name].numel() or layer.incoming not in ("all", name) else made[name]
        for name in ("dy", "dh_n", "dc_n")
    }


def by_reference(layer: Layer, dtype: torch.dtype, seed: int = 0, sides: Tensor | None = None) -> dict[str, Tensor]:
    """The reference's results in a dtype.

    sides: outputs of relu that gradients take for zero, or not, as they are here: what is near zero lands there by rounding.
    """
    made = cast(layer.arguments(seed), dtype)
    *tensors, weights, own = made.values()
    inputs = Inputs(*tensors)
    outputs, passes = gradients.layers_forward(inputs, weights, own)
    results = dict(zip(("y", "h_n", "c_n", "saved"), outputs))
    given = cast(incoming(layer, cast(results, torch.float64)), dtype)
    y = results["y"]
    if sides is not None and layer.cell in ("rnn_relu", "indrnn"):
        y = torch.where(sides > 0, y.clamp(min=torch.finfo(dtype).tiny), 0)
    *of_inputs, _, saved, _ = passes[-1]
    if layer.layers == 1:
        grads = gradients.layer_backward(Outer(**given), *of_inputs, y, saved, own, Needs(), of_steps(layer, saved))
    else:
        grads = gradients.layers_backward(Outer(**given), [*passes[:-1], (*of_inputs, y, saved, own)])
    results["saved"] = slots(layer, within(own, inputs, results["saved"]))
    return results | named(layer.layers, own, grads)


def of_steps(layer: Layer, saved: Tensor) -> Tensor | None:
    """Gradients of the states but h after each step, in the dtype and on the device of what is saved."""
    if not layer.dc_steps:
        return None
    torch.manual_seed(2)
    made = torch.randn(*saved.shape[:2], layer.kind.states * layer.heads * layer.sizes[3], dtype=torch.float64)
    return made.to(saved.device, layer.dtype).to(saved.dtype)


def slots(layer: Layer, saved: Tensor) -> Tensor:
    """Those that have a value, [D, rows, slots, H]."""
    kind, count = layer.kind, layer.kind.slots + layer.project
    own = saved.view(*saved.shape[:2], count, layer.heads * layer.sizes[3])
    return own[:, :, [*range(kind.kept), *range(kind.slots - kind.states, count)]]


def within(own: Description, inputs: Inputs, saved: Tensor) -> Tensor:
    """What is saved with zeros past the lengths, where anything may stand."""
    rows = Steps(own, inputs).within()
    return saved if rows is None else torch.where(rows, saved, 0.0)


def named(layers: int, layer: Description, grads: Sequence) -> dict[str, Tensor]:
    """Gradients by name."""
    *of_inputs, dw = grads
    names = [f"d{name}" + f" of layer {index}" * (layers > 1) for index in range(layers) for name in weight_names(layer)]
    return dict(zip(("dx", "dh0", "dc0"), of_inputs)) | dict(zip(names, dw, strict=True))


def kernels(layer: Layer, device: str = "cpu", target: Device = H100, seed: int = 0) -> Callable[[], dict[str, Tensor]]:
    """What runs the layer by the kernels, always on the same arguments, and returns their results."""
    from fastrnn.kernels.gpu import layer as engine

    made, interpreted = cast(layer.arguments(seed), layer.dtype, device), device == "cpu"
    forward, backward = (layer.plan(which, target, interpreted) for which in (True, False))
    *tensors, weights, own = made.values()
    given: dict[str, Tensor | None] = {}

    def run() -> dict[str, Tensor]:
        call = engine.Call(own, Inputs(*tensors), weights)
        below = call.below()
        y, h_n, c_n, saved = engine.forward(call, layer.save, forward, layer.precision, below)
        results = {"y": y, "h_n": h_n, "c_n": c_n}
        if not layer.save:
            assert saved.numel() == 0
            return results
        if not given:
            given.update(cast(incoming(layer, cast(results, torch.float64, "cpu")), layer.dtype, device))
        call.dc_steps = of_steps(layer, saved)
        grads = engine.backward(call, Outer(**given), y, saved, Needs(), backward, layer.precision, below)
        return results | {"saved": slots(layer, within(own, call.inputs, saved))} | named(layer.layers, own, grads)

    return run


def faults(layer: Layer, device: str = "cpu", target: Device = H100) -> list[str]:
    """Results whose error against the reference in float64 passes 2 times the reference's own in that dtype and 4 eps."""
    wrong: list[str] = []
    errors: dict[str, tuple[Error, Error]] = {}
    for seed in range(1 if layer.dtype is torch.float32 else 3):  # what is rounded coarsely is wrong by chance
        with np.errstate(all="ignore"):  # exp of what is masked, quotients of zeros there
            found = kernels(layer, device, target, seed)()
        own = by_reference(layer, layer.dtype, seed)
        truth, truth_of_own = (by_reference(layer, torch.float64, seed, results["y"].cpu()) for results in (found, own))
        for name, value in found.items():
            if value.shape != truth[name].shape or value.dtype != layer.dtype:
                wrong.append(f"{name} is {tuple(value.shape)} {value.dtype}, expected {tuple(truth[name].shape)}")
                continue
            pair = errors.setdefault(name, (Error(), Error()))
            for error, values, right in zip(pair, (value.cpu(), own[name]), (truth[name], truth_of_own[name])):
                error.add(values, right)
    for name, (error, own_error) in errors.items():
        bound = FACTOR * own_error.relative + SLACK * torch.finfo(layer.dtype).eps
        if not error.relative <= bound:  # NaN is wrong too
            wrong.append(f"{name}: error {error.relative:.3g} > {bound:.3g}")
    return wrong


def elementary_errors(device: str = "cpu") -> dict[str, float]:
    """Largest relative error of the kernels' elementary functions in float32, by name."""
    import triton
    import triton.language as tl

    from fastrnn.kernels.gpu.cell import PLAIN, PTX

    @triton.jit
    def apply(x, y, FUNCTION: tl.constexpr, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(y + at, FUNCTION(tl.load(x + at)))

    functions = (PTX if device == "cuda" else PLAIN).by_name
    at = torch.logspace(-30, 1.9, 8192, base=10, device=device)
    errors = {}
    every = torch.sigmoid, torch.tanh, torch.exp, torch.expm1, torch.nn.functional.logsigmoid, torch.erf, torch.log1p
    exact = {function.__name__.replace("log_sigmoid", "logsigmoid"): function for function in (*every, torch.log, torch.sqrt)}
    for name, exact_of in exact.items():
        for sign in (1, -1)[: 1 if name in ("log", "sqrt") else 2]:
            x, y = sign * at, torch.empty(8192, device=device)
            if name == "log1p" and sign < 0:
                x = -1 / (1.001 + at)
            apply[(1,)](x, y, functions[name], 8192)
            truth = exact_of(x.double())
            errors[f"{name} {sign:+}"] = float(((y - truth) / truth).abs().max())
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0], device=device)
    for name, exact_of in {**exact, "relu": torch.relu, "abs": torch.abs}.items():
        y = torch.empty(4, device=device)
        apply[(1,)](special, y, functions[name], 4)
        torch.testing.assert_close(y, exact_of(special), equal_nan=True, msg=name)
    return errors


def interpret() -> None:
    """Make this process interpret kernels, and fill what torch.empty hands out with NaN."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        """The interpreter holds bfloat16 as bits, and multiplies them."""

        def widened(operand):
            if operand.dtype != interpreter.tl.bfloat16:
                return operand
            return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)

        return plain(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    interpreter.InterpreterBuilder.create_dot = create_dot
    plain_call, plain_rmw = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder.create_atomic_rmw
    running: list[Programs] = []

    def call(self, *args, **kwargs):
        if not kwargs.get("launch_cooperative_grid"):
            return plain_call(self, *args, **kwargs)
        alone, running[:] = self.fn, [Programs(self.fn, interpreter.interpreter_builder)]
        self.fn = running[0]
        try:
            return plain_call(self, *args, **kwargs)
        finally:
            self.fn = alone
            running.clear()

    def create_atomic_rmw(self, operation, pointer, value, mask, sem, scope):
        result = plain_rmw(self, operation, pointer, value, mask, sem, scope)
        if running and sem is interpreter._ir.MEM_SEMANTIC.ACQUIRE:  # who waits
            running[0].pause()
        return result

    interpreter.GridExecutor.__call__ = call
    interpreter.InterpreterBuilder.create_atomic_rmw = create_atomic_rmw


class Programs:
    """The programs of a cooperative launch in the interpreter: a thread each, of which one runs until it waits for others.

    It stands in the place of the kernel's function, which the interpreter calls for one program after another.
    """

    def __init__(self, function: Callable, builder) -> None:
        self.function, self.builder = function, builder
        self.__name__, self.__globals__ = function.__name__, function.__globals__  # which the interpreter looks at
        self.__signature__ = inspect.signature(function)
        self.calls: list[tuple] = []
        self.failures: list[Exception] = []
        self.own = threading.local()

    def __call__(self, **given) -> None:
        self.calls.append((self.builder.grid_idx, given))
        if len(self.calls) < math.prod(self.builder.grid_dim):
            return
        self.turns = [threading.Semaphore(0) for _ in self.calls]
        self.left = [*range(len(self.calls))]
        threads = [threading.Thread(target=self.run, args=(number,)) for number in self.left]
        for thread in threads:
            thread.start()
        self.turns[0].release()
        for thread in threads:
            thread.join()
        if self.failures:
            raise self.failures[0]

    def run(self, number: int) -> None:
        self.own.number = number
        self.take_turn(number)
        try:
            with np.errstate(all="ignore"):
                self.function(**self.calls[number][1])
        except Exception as error:
            self.failures.append(error)
        self.left.remove(number)
        self.hand_on(number)

    def pause(self) -> None:
        """Let another program run, as the one that calls waits for it."""
        number = self.own.number
        self.hand_on(number)
        self.take_turn(number)
        if self.failures:
            raise RuntimeError("another program failed")

    def hand_on(self, number: int) -> None:
        if self.left:
            self.turns[next((other for other in self.left if other > number), self.left[0])].release()

    def take_turn(self, number: int) -> None:
        self.turns[number].acquire()
        self.builder.grid_idx = self.calls[number][0]


class Alone(Programs):
    """The same, where none of them runs before the one ahead of it has ended: they wait for each other in vain."""

    def pause(self) -> None:
        pass


def faults_of_module(name: str, heads: int, settings: dict) -> list[str]:
    """What goes wrong where a module of a cell runs on the engine, whose operators are then a CPU's too, in every way.

    settings: of the module; noise comes from one seed.
    """
    import test_cells

    import fastrnn
    from fastrnn import dispatch
    from fastrnn.kernels import gpu
    from fastrnn.kernels.gpu import layer as engine

    started: list = []
    with_states: list = []
    forward, backward = gpu.layer_forward, gpu.layer_backward

    def layer_forward(*args):
        started.append(args[5])
        return forward(*args)

    def layer_backward(*args, dc_steps=None):
        with_states.append(dc_steps is not None)
        return backward(*args, dc_steps=dc_steps)

    library = torch.library.Library("fastrnn", "IMPL", "CPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there was another
        library.impl("layer_forward", layer_forward, allow_override=True)
        library.impl("layer_backward", gpu.layer_backward, allow_override=True)
    wrong: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "choose", lambda *given: choose(*given, "single"))
        patch.setattr(engine, "device_of", lambda device: H100)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(dispatch, "native", None)
        patch.setattr(gpu, "HERE", "is_cpu")
        patch.setattr(gpu, "layer_forward", layer_forward)
        patch.setattr(gpu, "layer_backward", layer_backward)
        patch.setattr(gpu, "device_of", lambda device: H100)
        patch.setattr(gpu, "off", lambda device: {})
        patch.setitem(dispatch._WHY_NOT, "triton", lambda *call: None)
        torch.manual_seed(0)
        truth = test_cells.layer_of(name, "plain", 3, 4 * heads, bidirectional=True, num_heads=heads, **settings)
        module = copy.deepcopy(truth).float()
        x, states = test_cells.sample(truth, 3, 2)
        given = module, x.float(), [state.float() for state in states]

        def second(module, x, states):
            x = x.requires_grad_()
            (first,) = torch.autograd.grad(test_cells.run(module, x, states)[0].square().sum(), x, create_graph=True)
            return {"second": torch.autograd.grad(first.square().sum(), x)[0]}

        def mapped(module, x, states):
            each = torch.func.vmap(lambda x: test_cells.run(module, x, states)[0], randomness="same")
            own = each(torch.stack([x, 2 * x]))
            return {"mapped": own.detach()}

        def after_steps(module, x, states):
            x = x.requires_grad_()
            found = module(x, states[0] if len(states) == 1 else tuple(states), all_states=True)[2]
            found = found if isinstance(found, tuple) else (found,)
            weighted = sum((number + 2) * state.square().sum() for number, state in enumerate(found))
            return {"of every state": torch.autograd.grad(weighted, x)[0]}

        def compiled(module, x, states):
            return {"compiled": torch.compile(module, fullgraph=True, backend="aot_eager")(x)[0].detach()}

        def recomputed(module, x, states):
            with fastrnn.recompute():
                return test_cells.results(test_cells.run, module, x, states)

        ways = {"plain": lambda *args: test_cells.results(test_cells.run, *args), "second": second, "mapped": mapped}
        ways |= {"compiled": compiled, "recomputed": recomputed, "after steps": after_steps}
        for way, function in ways.items():
            patch.setattr(dispatch, "forced", "reference")
            torch.manual_seed(1)
            expected = function(truth, x.detach(), states)
            patch.setattr(dispatch, "forced", "triton")
            started.clear()
            torch.manual_seed(1)
            with np.errstate(all="ignore"):
                found = function(*given)
            if not started or any(f"heads={heads}" not in text and heads > 1 for text in started):
                wrong.append(f"{way}: the engine ran {started}")
            for key, value in expected.items():
                if not torch.allclose(found[key].double(), value, rtol=1e-4, atol=1e-5):
                    wrong.append(f"{way}: {key}: {(found[key].double() - value).abs().max():.3g} off")
        if with_states.count(True) != (module.cell.definition.states > 0):
            wrong.append(f"gradients of every state were fused {with_states.count(True)} times")
        explained = str(fastrnn.explain(module, given[1]))
        if "engine: triton" not in explained or "layer 0: forward: single" not in explained:
            wrong.append(explained)
    library._destroy()
    return wrong
