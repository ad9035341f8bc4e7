"""What is timed: a recurrent module of some library with the data of a case, and the peers that only infer."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bench.grid import Case
from fastrnn import timing
from fastrnn.timing import Runner

ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}  # ONNX's gates (iofc, zrh) in torch's order (ifgo, rzn)


class Subject(timing.Subject):
    """A module of `library` (torch.nn, fastrnn), with weights and data that depend on the case and the seed alone."""

    module: nn.RNNBase

    def __init__(self, case: Case, library: ModuleType, seed: int = 0):
        point = case.point
        torch.manual_seed(seed)
        sizes = {"num_layers": point.layers, "bidirectional": point.directions == 2}
        module: nn.RNNBase = getattr(library, case.cell.upper())(point.input_size, point.hidden, **sizes)
        lengths = torch.tensor(point.lengths())
        batch_sizes = (lengths > torch.arange(point.steps)[:, None]).sum(1)  # [T]
        rows = (int(lengths.sum()),) if point.packed else (point.steps, point.batch)
        x, dy = torch.randn(*rows, point.input_size), torch.randn(*rows, point.hidden * point.directions)
        super().__init__(module, PackedSequence(x, batch_sizes) if point.packed else x, case.mode, dy)


def onnx_model(module: nn.RNNBase, steps: int, batch: int) -> bytes:
    """One layer of one direction as an ONNX model: x [T, B, I] to Y [T, 1, B, H] and the final states [1, B, H]."""
    from onnx import TensorProto, checker, helper, numpy_helper

    cell = module.mode.split("_")[0].lower()
    hidden = module.hidden_size

    def gates(name: str) -> Tensor:
        value = module.get_parameter(name).detach()
        return value.unflatten(0, (-1, hidden))[list(ORDER[cell])].flatten(0, 1)

    bias = torch.cat((gates("bias_ih_l0"), gates("bias_hh_l0")))
    weights = {"W": gates("weight_ih_l0"), "R": gates("weight_hh_l0"), "B": bias}
    states = ["Y_h", "Y_c"] if cell == "lstm" else ["Y_h"]
    flags: dict[str, Any] = {"linear_before_reset": 1} if cell == "gru" else {}  # torch's GRU resets after the product
    node = helper.make_node(cell.upper(), ["x", *weights], ["Y", *states], hidden_size=hidden, **flags)

    def value_info(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        [node],
        cell,
        [value_info("x", steps, batch, module.input_size)],
        [value_info("Y", steps, 1, batch, hidden), *(value_info(name, 1, batch, hidden) for name in states)],
        [numpy_helper.from_array(value[None].contiguous().numpy(), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    checker.check_model(model)
    return model.SerializeToString()


def onnxruntime(subject: Subject, threads: int) -> tuple[Runner, Tensor]:
    """A runner of the subject's layer in onnxruntime, and its y."""
    import onnxruntime as ort

    x = subject.x.detach()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Its threads wait busily within a run, as they do for its users, but not after it, beside others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = onnx_model(subject.module, *x.shape[:2])
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", x.numpy())
    for output in session.get_outputs():
        binding.bind_output(output.name)

    def run(loops: int) -> None:
        for _ in range(loops):
            session.run_with_iobinding(binding)

    run(1)
    return run, torch.from_numpy(binding.copy_outputs_to_cpu()[0])[:, 0]


def openvino(subject: Subject, threads: int) -> tuple[Runner, Tensor]:
    """A runner of the subject's layer in openvino, and its y."""
    import openvino as ov

    x = subject.x.detach()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    core = ov.Core()
    compiled = core.compile_model(core.read_model(onnx_model(subject.module, *x.shape[:2])), "CPU", settings)
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))

    def run(loops: int) -> None:
        for _ in range(loops):
            request.infer()

    run(1)
    return run, torch.from_numpy(request.get_output_tensor(0).data.copy())[:, 0]


PEERS: dict[str, Callable[[Subject, int], tuple[Runner, Tensor]]] = {"onnxruntime": onnxruntime, "openvino": openvino}
