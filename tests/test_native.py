"""Calls that the native runtime takes from Python, past torch's dispatcher: a module's, a cell's, and `step`."""

import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastrnn
from fastrnn import dispatch, ops

I, H, B, T = 5, 7, 3, 6
LAYERS = ("RNN", "LSTM", "GRU")


def state_of(name, *states):
    return states if name == "LSTM" else states[0]


def never(*args):
    raise AssertionError("the fallback was taken")


def parts(state):
    return list(state) if isinstance(state, tuple) else [state]


VARIANTS = [{}, {"num_layers": 3, "bidirectional": True}, {"bias": False}, {"batch_first": True}]


@pytest.mark.parametrize("steps", [1, 2, 70])
@pytest.mark.parametrize("options", [*VARIANTS, {"proj_size": 3, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_same_bits_as_with_gradients(name, options, steps):
    if "proj_size" in options and name != "LSTM":
        options = {"num_layers": 2}
    module = getattr(fastrnn, name)(I, H, **options)
    x = torch.randn(B, steps, I) if module.batch_first else torch.randn(steps, B, I)
    depth = module.num_layers * (1 + module.bidirectional)
    states = state_of(name, torch.randn(depth, B, module.proj_size or H), torch.randn(depth, B, H))
    for state in (None, states, list(states) if name == "LSTM" else states):
        expected, last = module(x, state)
        with torch.no_grad():
            found, found_last = module(x, state)
        assert torch.equal(found, expected)
        assert all(torch.equal(a, b) for a, b in zip(parts(found_last), parts(last), strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cell_has_same_bits_as_with_gradients(name, bias):
    module = getattr(fastrnn, name)(I, H, bias=bias)
    x, state = torch.randn(B, I), state_of(name[:-4], torch.randn(B, H), torch.randn(B, H))
    for given in (None, state):
        expected = module(x, given)
        with torch.no_grad():
            found = module(x, given)
        assert all(torch.equal(a, b) for a, b in zip(parts(found), parts(expected), strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_one_call_of_the_engine_and_no_more(name, monkeypatch):
    module = getattr(fastrnn, name)(I, H, 2)
    monkeypatch.setattr(nn.RNNBase, "check_input", never)
    module(torch.randn(T, B, I))  # with gradients neither
    with torch.no_grad():
        module(torch.randn(T, B, I))


def trained(module, x, state, of):
    """What a module, or a cell, gives for leaves like x and state, and the gradients of all there are, of a loss of `of`."""
    x = x.clone().requires_grad_()
    state = [part.clone().requires_grad_() for part in state]
    module.zero_grad()
    given = x if x.dim() == 3 or isinstance(module, nn.RNNCellBase) else PackedSequence(x, torch.tensor([3, 3, 2, 1]))
    hx = None if not state else tuple(state) if len(state) > 1 else state[0]
    outputs = [out for out in tree_leaves(module(given, hx)) if isinstance(out, torch.Tensor) and out.dtype.is_floating_point]
    torch.manual_seed(1)
    chosen = {"output": outputs[:1], "states": outputs[1:] or outputs, "all": outputs, "expanded": outputs[:1]}[of]
    loss = sum(out.sum() if of == "expanded" else (out * torch.randn_like(out)).sum() for out in chosen)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return outputs, gradients | {"x": x.grad} | {f"state {index}": part.grad for index, part in enumerate(state)}


def assert_trains_alike(module, x, states, of, monkeypatch):
    """Through the dispatcher, and without it, with and without given states: to the same bits."""
    for state in ([], states):
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "native", None)
            outputs, gradients = trained(module, x, state, of)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "forward", never)
            if of != "expanded":
                patch.setattr(ops, "backward", never)
            found, found_gradients = trained(module, x, state, of)
        for one, other in zip(found, outputs, strict=True):
            assert torch.equal(one, other)
        assert found_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (gradient is None) == (found_gradients[name] is None), name
            assert gradient is None or torch.equal(found_gradients[name], gradient), name


TRAINED = [*VARIANTS, {"bidirectional": True}, {"proj_size": 4, "num_layers": 2}, {"dtype": torch.bfloat16}, {"packed": True}]
TRAINED += [{"compressed": True, "bidirectional": True}, {"dtype": torch.bfloat16, "bias": False, "num_layers": 2}]


@pytest.mark.parametrize("of", ["output", "states", "all", "expanded"])
@pytest.mark.parametrize("options", TRAINED, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_trains_as_through_the_dispatcher(name, options, of, monkeypatch):
    options = dict(options)
    packed, compressed, dtype = options.pop("packed", False), options.pop("compressed", False), options.get("dtype")
    if name != "LSTM":
        options.pop("proj_size", None)
    hidden = 8 if dtype or compressed else H
    module = getattr(fastrnn, name)(I, hidden, **options)
    if compressed:
        fastrnn.compress(module)
    depth, width = module.num_layers * (1 + module.bidirectional), module.proj_size or hidden
    x = torch.randn(9, I, dtype=dtype) if packed else torch.randn(*((B, T) if module.batch_first else (T, B)), I, dtype=dtype)
    states = [torch.randn(depth, B, width, dtype=dtype), torch.randn(depth, B, hidden, dtype=dtype)][: 1 + (name == "LSTM")]
    assert_trains_alike(module, x, states, of, monkeypatch)


@pytest.mark.parametrize("of", ["output", "states", "all", "expanded"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_cells_train_as_through_the_dispatcher(name, bias, of, monkeypatch):
    module, x = getattr(fastrnn, f"{name}Cell")(I, H, bias), torch.randn(B, I)
    assert_trains_alike(module, x, [torch.randn(B, H), torch.randn(B, H)][: 1 + (name == "LSTM")], of, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["time first", "batch first", "packed", "one step", "one unit", "cell"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_gradient_that_is_one_number_again_and_again(name, form, dtype, monkeypatch):
    """As a sum's and a mean's are. The same bits as of one that has memory for each, without a copy; and where none arrives."""
    units = 1 if form == "one unit" and dtype is not torch.bfloat16 else 8
    if form == "cell":
        module = getattr(fastrnn, name + "Cell")(I, units).to(dtype)
    else:
        module = getattr(fastrnn, name)(I, units, batch_first=form == "batch first", bidirectional=True).to(dtype)
    steps = 1 if form == "one step" else T
    x = torch.randn(*((B,) if form == "cell" else (B, steps) if form == "batch first" else (steps, B)), I).to(dtype)
    if form == "packed":
        x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([T, 2, 1]))

    def outputs():
        found = module(x)
        if form == "cell":
            return parts(found)
        y, states = found
        return [y.data if form == "packed" else y, *parts(states)]

    def gradients(expanded, which):
        given = [
            torch.full((), 0.3 + index).to(dtype).expand(output.shape) for index, output in enumerate(outputs()) if which[index]
        ]
        given = given if expanded else [each.clone(memory_format=torch.contiguous_format) for each in given]
        chosen = [output for output, wanted in zip(outputs(), which) if wanted]
        return torch.autograd.grad(chosen, list(module.parameters()), given)

    seen, usual = [], dispatch.native.layer_backward

    def layer_backward(outer, *more):
        found = usual(outer, *more)
        seen.append(found is not None)
        return found

    for which in ((True, True, True), (True, False, False), (False, True, True)):
        if form == "cell" and which == (False, True, True) and name != "LSTM":
            continue  # there is one output
        expected = gradients(False, which)
        monkeypatch.setattr(dispatch.native, "layer_backward", layer_backward)
        found = gradients(True, which)
        monkeypatch.setattr(dispatch.native, "layer_backward", lambda *args: None)
        by_the_op = gradients(True, which)
        monkeypatch.undo()
        for one, two, right in zip(found, by_the_op, expected, strict=True):
            assert torch.equal(one, right) and torch.equal(two, right)
    assert all(seen) and len(seen) >= 2


def test_part_of_the_gradients():
    """Of frozen parameters, of the input alone, of one state."""
    for leaves in ({"x"}, {"h"}, {"c"}, {"weight_hh_l0"}, {"x", "bias_ih_l0", "c"}, set()):
        results = []
        for library in (fastrnn, nn):
            torch.manual_seed(0)
            module = library.LSTM(I, H)
            tensors = {"x": torch.randn(T, B, I), "h": torch.randn(1, B, H), "c": torch.randn(1, B, H)}
            tensors |= dict(module.named_parameters())
            for name, tensor in tensors.items():
                tensor.requires_grad_(name in leaves)
            y, state = module(tensors["x"], (tensors["h"], tensors["c"]))
            assert y.requires_grad == bool(leaves)
            if leaves:
                (y.sin().sum() + state[1].sum()).backward()
            results.append({name: tensor.grad for name, tensor in tensors.items()})
        for name, expected in results[1].items():
            assert (expected is None) == (results[0][name] is None) == (name not in leaves)
            if expected is not None:
                torch.testing.assert_close(results[0][name], expected)


@pytest.mark.parametrize("cell", [False, True])
def test_results_too_large_for_the_fast_path(cell):
    """From 32 MiB on the operators make them, in memory that stays."""
    rows, results = (32 << 20) // (8 * 4 * 8), []
    for library in (fastrnn, nn):
        torch.manual_seed(0)
        module = (library.LSTMCell if cell else library.LSTM)(1, 8, dtype=torch.float64)
        x = torch.randn(*([] if cell else [1]), rows, 1, dtype=torch.float64, requires_grad=True)
        h, *_ = tree_leaves(module(x))
        if cell:
            h.mul_(0.5)
        (h * torch.randn(8)).sum().backward()
        results.append([h, x.grad, *(parameter.grad for parameter in module.parameters())])
    for found, expected in zip(*results, strict=True):
        # float64, but weights' gradients are sums over 131,072 rows in another order than torch.nn's
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_a_state_of_a_cell_may_be_changed_in_place(name):
    """As those of torch.nn's LSTM and GRU may, for an episode that ends."""
    results = []
    for library in (fastrnn, nn):
        torch.manual_seed(0)
        cell, x = getattr(library, f"{name}Cell")(I, H), torch.randn(B, I, requires_grad=True)
        state, going_on = cell(x), torch.ones(B, 1)
        going_on[0] = 0
        if library is nn:
            state = state_of(name, *(part * going_on for part in parts(state)))
        else:
            for part in parts(state):
                part.mul_(going_on)
        sum(part.sin().sum() for part in parts(cell(x.detach(), state))).backward()
        results.append([x.grad, *(parameter.grad for parameter in cell.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def kept_numbers(call):
    """Numbers in all tensors that autograd keeps of a call, but for parameters, which are there anyway."""
    numbers = 0

    def pack(tensor):
        nonlocal numbers
        numbers += 0 if tensor.is_leaf and tensor.requires_grad else tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return numbers


def test_who_wants_to_keep_less():
    x, module, cell = torch.randn(T, B, I), fastrnn.LSTM(I, H), fastrnn.LSTMCell(I, H)
    always = type("Always", (fastrnn.LSTM,), {"recompute": True})(I, H)
    most, least, of_cell = (kept_numbers(call) for call in (lambda: module(x), lambda: always(x), lambda: cell(x[0])))
    assert most - least == T * B * 5 * H  # gates and cell states
    module.recompute = False
    assert kept_numbers(lambda: module(x)) == most
    with fastrnn.recompute():
        assert kept_numbers(lambda: module(x)) == least
        assert of_cell - kept_numbers(lambda: cell(x[0])) == B * 5 * H


def test_lower_layers_without_gradients_keep_nothing():
    x, module = torch.randn(T, B, I), fastrnn.LSTM(I, H, 2)
    all_layers = kept_numbers(lambda: module(x))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("l0" not in name)
    assert kept_numbers(lambda: module(x)) < 0.7 * all_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
def test_inside_a_checkpoint_of_torch(kind, dtype):
    """Which lets each saved tensor be taken out once."""
    module = getattr(fastrnn, kind)(I, 8, dtype=dtype)
    x = torch.randn(*([] if kind.endswith("Cell") else [T]), B, I, dtype=dtype, requires_grad=True)
    results = []
    for inside in (False, True):
        y = checkpoint(module, x, use_reentrant=False) if inside else module(x)
        y = tree_leaves(y)[0]
        results.append([y, *torch.autograd.grad((y * torch.arange(8)).sum(), (x, *module.parameters()))])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_a_cell_has_second_derivatives(name):
    """Also where each gradient is taken of many vectors at once."""
    cell = getattr(fastrnn, f"{name}Cell")(2, 3, dtype=torch.float64)
    states = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(1 + (name == "LSTM"))]
    inputs = torch.randn(2, 2, dtype=torch.float64, requires_grad=True), *states

    def function(x, *states):
        return cell(x, states if len(states) > 1 else states[0])

    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)
    weights = [parameter.requires_grad_(False) for parameter in cell.parameters()]
    assert len(weights) == 4 and torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("bad", ["features", "state", "state dtype", "input dtype", "dimensions"])
@pytest.mark.parametrize("name", LAYERS)
def test_refused_with_the_words_of_torch(name, bad):
    x, h, c = torch.randn(T, B, I), torch.zeros(1, B, H), torch.zeros(1, B, H)
    if bad == "features":
        x = x[..., :-1]
    elif bad == "input dtype":
        x = x.double()
    elif bad == "dimensions":
        h = h[0]
    else:
        h = h.double() if bad == "state dtype" else torch.zeros(B, 1, H)
    errors = []
    for library in (nn, fastrnn):
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError)) as caught:
            getattr(library, name)(I, H)(x, state_of(name, h, c))
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("options", [{}, {"num_layers": 3}, {"bias": False}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize("name", LAYERS)
def test_steps_are_the_sequence(name, batch, options):
    torch.manual_seed(0)
    module = getattr(fastrnn, name)(I, H, dtype=torch.float64, **options)
    x = torch.randn(T, batch, I, dtype=torch.float64)
    expected, last = module(x.transpose(0, 1) if module.batch_first else x)
    expected = expected.transpose(0, 1) if module.batch_first else expected
    state = None
    for t in range(T):
        y, state = module.step(x[t], state)
        assert not y.requires_grad
        torch.testing.assert_close(y, expected[t].detach(), rtol=1e-12, atol=1e-13)
    for found, right in zip(parts(state), parts(last), strict=True):
        torch.testing.assert_close(found, right.detach(), rtol=1e-12, atol=1e-13)


def test_absent_states_are_zero_whatever_their_sizes():
    """The cell state may be far larger than a projected hidden one, and both larger than what lies ready."""
    module = fastrnn.LSTM(I, 150, 2, proj_size=9)
    x = torch.randn(2, 2000, I)
    zeros = torch.zeros(2, 2000, 9), torch.zeros(2, 2000, 150)
    with torch.no_grad():
        assert torch.equal(module(x)[0], module(x, zeros)[0])


def test_projection():
    module = fastrnn.LSTM(I, H, 2, proj_size=3, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    expected, last = module(x)
    state = None
    for t in range(T):
        y, state = module.step(x[t], state)
        torch.testing.assert_close(y, expected[t].detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(state, tuple(part.detach() for part in last), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_out_is_written_and_may_be_the_state_itself(name, layers):
    module = getattr(fastrnn, name)(I, H, layers)
    x = torch.randn(T, B, I)
    y = torch.full((B, H), torch.nan)
    state = state_of(name, torch.zeros(layers, B, H), torch.zeros(layers, B, H))
    expected_state = None
    for t in range(T):
        expected, expected_state = module.step(x[t], expected_state)
        found, found_state = module.step(x[t], state, out=(y, state))
        assert found is y
        assert all(a is b for a, b in zip(parts(found_state), parts(state), strict=True))
        assert torch.equal(y, expected)
        assert all(torch.equal(a, b) for a, b in zip(parts(state), parts(expected_state), strict=True))


def test_dropout_between_layers_is_drawn_in_training_alone():
    module = fastrnn.LSTM(I, H, 2, dropout=0.5)
    x = torch.randn(B, I)
    assert not torch.equal(module.step(x)[0], module.step(x)[0])
    module.eval()
    assert torch.equal(module.step(x)[0], module.step(x)[0])


def write_in_place(module):
    with torch.no_grad():
        module.weight_hh_l0.mul_(0.5)


def write_data(module):
    module.weight_hh_l0.data.mul_(0.5)


def swap_data(module):
    module.weight_hh_l0.data = module.weight_hh_l0.detach() * 0.5


def write_numpy(module):
    view = module.weight_hh_l0.detach().numpy()
    np.multiply(view, 0.5, out=view)


def reassign(module):
    module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach() * 0.5)


def load(module):
    module.load_state_dict({name: value * 0.5 for name, value in module.state_dict().items()})


def optimise(module):
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(module.parameters(), 0.5).step()


@pytest.mark.parametrize("change", [write_in_place, write_data, swap_data, write_numpy, reassign, load, optimise])
@pytest.mark.parametrize("name", LAYERS)
def test_every_change_of_a_weight_is_seen(name, change):
    module, twin = (getattr(library, name)(I, H) for library in (fastrnn, nn))
    x, state = torch.randn(B, I), state_of(name, torch.randn(1, B, H), torch.randn(1, B, H))
    before, _ = module.step(x, state)
    change(module)
    twin.load_state_dict(module.state_dict())
    with torch.no_grad():
        expected, _ = twin(x[None], state)
        for found in (module.step(x, state)[0], module(x[None], state)[0][0]):
            torch.testing.assert_close(found, expected[0])
    assert not torch.allclose(before, expected[0])


@pytest.mark.parametrize("name", LAYERS)
def test_autograd_notices_what_a_step_writes(name):
    module, x = getattr(fastrnn, name)(I, H), torch.randn(B, I)
    y, state = module.step(x)
    for written in (y, *parts(state)):
        weight = torch.ones(1, requires_grad=True)
        product = weight * written
        module.step(x, state, out=(y, state))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


@pytest.mark.parametrize("name", LAYERS)
def test_numbers_that_lie_negated_or_apart(name):
    """The imaginary part of a conjugate holds what its reader has to negate; views have gaps."""
    torch.manual_seed(0)
    for inputs, steps, batch in ((I, T, B), (1, T, B), (1, 1, 1)):
        module, twin = (getattr(library, name)(inputs, H) for library in (fastrnn, nn))
        twin.load_state_dict(module.state_dict())
        lying = torch.randn(steps, batch, inputs, dtype=torch.complex64).conj().imag
        gaps = torch.randn(steps, 2 * batch, 2 * inputs)[:, ::2, :inputs]
        alone = torch.randn(steps, batch, dtype=torch.complex64).conj().imag.unsqueeze(-1) if inputs == 1 else lying
        with torch.no_grad():
            for x in (lying, gaps, alone, lying.transpose(0, 1).contiguous().transpose(0, 1)):
                plain = x.resolve_neg().clone(memory_format=torch.contiguous_format)
                h = torch.randn(1, batch, H, dtype=torch.complex64).conj().imag
                given, solid = state_of(name, h, h), state_of(name, *(h.resolve_neg().contiguous(),) * 2)
                torch.testing.assert_close(module(x)[0], twin(plain)[0])
                torch.testing.assert_close(module(x, given)[0], twin(plain, solid)[0])
                torch.testing.assert_close(module.step(x[0], given)[0], twin(plain[:1], solid)[0][0])


@pytest.mark.parametrize("hidden", [7, 40])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_into_what_it_reads(name, layers, hidden):
    """Memory that a step, or a later layer, still has to read: y in the state's place or x's, states exchanged or shifted."""
    module = getattr(fastrnn, name)(hidden, hidden, layers)
    x, lstm = torch.randn(B, hidden), name == "LSTM"

    def fresh():
        torch.manual_seed(1)
        memory = torch.randn(2, layers + 1, B, hidden)
        return memory, memory[0, :layers].clone(), memory[1, :layers].clone()

    for case in ("y is h", "y is x", "states exchanged", "states shifted", "c is x"):
        memory, h, c = fresh()
        given, y, step_x = state_of(name, h, c), torch.empty(B, hidden), x.clone()
        expected, last = module.step(x, state_of(name, h.clone(), c.clone()))
        into = state_of(name, torch.empty_like(h), torch.empty_like(c))
        if case == "y is h":
            y, into = h[0], given
        elif case == "y is x":
            y = step_x
        elif case == "states exchanged":
            into = state_of(name, c, h)
        elif case == "states shifted":
            given, into = (state_of(name, *memory[:, at : at + layers]) for at in (0, 1))
        elif lstm and layers == 1:
            into = into[0], step_x[None]
        found, _ = module.step(step_x, given, out=(y, into))
        if case != "y is h":  # of one layer it is h_n, too
            torch.testing.assert_close(found, expected)
        if case != "states exchanged" or not lstm:
            for one, other in zip(parts(into), parts(last), strict=True):
                torch.testing.assert_close(one, other)


def test_batch_sizes_are_int64():
    weights = {name: [torch.randn(3 * H, width)] for name, width in (("w_ih", I), ("w_hh", H))}
    for wrong in (torch.tensor([2, 1], dtype=torch.int32), torch.tensor([[2, 1]])):
        with pytest.raises(ValueError, match="batch_sizes: expected int64"):
            fastrnn.functional.layer(torch.randn(3, I), torch.zeros(1, 2, H), cell="gru", batch_sizes=wrong, **weights)


def test_weights_replaced_by_another_thread():
    """While a call runs, or looks: it ends with the one weight or the other."""
    module = fastrnn.freeze(fastrnn.LSTM(64, 64).eval())
    state, x, stop = module.state_dict(), torch.randn(1, 64), threading.Event()
    expected, _ = module.step(x)

    def reload():
        while not stop.is_set():
            module.load_state_dict(state)

    thread = threading.Thread(target=reload)
    thread.start()
    try:
        for _ in range(3000):
            assert torch.equal(module.step(x)[0], expected)
    finally:
        stop.set()
        thread.join()


def test_a_profiler_sees_the_layer():
    module = fastrnn.LSTM(I, H)
    with torch.no_grad(), torch.profiler.profile(acc_events=True) as seen:
        module(torch.randn(T, B, I))
        module.step(torch.randn(B, I))
    assert sum(event.name == "fastrnn::layer_forward" for event in seen.events()) == 2


def test_a_profiler_sees_training():
    module, x = fastrnn.LSTM(I, H), torch.randn(T, B, I)
    y, _ = module(x)
    with torch.profiler.profile(acc_events=True) as seen:
        y.sum().backward()  # of a call that was made before
        module(x)[0].sum().backward()
    outer = [event.name for event in seen.events() if event.cpu_parent is None or event.cpu_parent.name != "LayerFunction"]
    for op, count in (("layer_forward", 1), ("layer_backward", 2)):  # autograd's kernel of layer_forward calls it once more
        assert outer.count(f"fastrnn::{op}") == count


def test_the_runtime_counts_its_arguments():
    with pytest.raises(TypeError, match="expected 4 arguments, got 1"):
        dispatch.native.cell({})
    with torch.no_grad():
        for kind in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "", "Linear"):
            assert dispatch.native.forward({}, kind, torch.zeros(2, 3, 4), None, False) is None
            assert dispatch.native.step({}, kind, torch.zeros(2, 3), None, None) is None
            assert dispatch.native.cell({}, kind, torch.zeros(2, 3), None) is None
            assert dispatch.native.pack({}, kind, torch.empty) is None
        assert dispatch.native.forward(fastrnn.LSTM(I, H).__dict__, "LSTM", None, None, False) is None


def test_refusals():
    module, x = fastrnn.LSTM(I, H), torch.randn(B, I)
    with pytest.raises(ValueError, match="bidirectional module needs the whole sequence"):
        fastrnn.LSTM(I, H, bidirectional=True).step(x)
    with pytest.raises(ValueError, match=r"expected x of shape \[batch, input_size\], got \(1, 3, 5\)"):
        module.step(x[None])
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 5, got 4"):
        module.step(x[:, :4])
    states = torch.zeros(1, B, H), torch.zeros(1, B, H)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 3, 7\), got \[1, 3, 6\]"):
        module.step(x, (states[0][..., :6], states[1]))
    with pytest.raises(ValueError, match=r"out's y must be torch.float32 of shape \(3, 7\), got torch.float32 \(3, 6\)"):
        module.step(x, None, out=(torch.empty(B, 6), states))
    with pytest.raises(ValueError, match=r"out's c must be torch.float32 of shape \(1, 3, 7\), got torch.float64"):
        module.step(x, None, out=(torch.empty(B, H), (states[0], states[1].double())))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_a_step_runs_no_hooks(name):
    """Whatever the strides of its input, and so the way that it takes."""
    module, x = getattr(fastrnn, name)(3, 4), torch.randn(3, 2).T
    module.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    torch.testing.assert_close(module.step(x), module.step(x.contiguous()))


def test_places_that_are_not_made_like_the_result():
    for name, shape in (("LSTM", r"\(y, \(h, c\)\)"), ("GRU", r"\(y, h\)")):
        module, x = getattr(fastrnn, name)(3, 4), torch.randn(2, 3)
        y, state = module.step(x)
        h = state[0] if name == "LSTM" else state
        for out in (5, (y,), (y, None), (y, (h,)), (y, (h, h, h)), (None, state), (y.to("meta"), state)):
            with pytest.raises(ValueError, match=f"step: expected out {shape} of tensors on cpu, got "):
                module.step(x, None, out=out)
