"""Tables and pictures of every processor measured, from bench/results/*.json: `python -m bench.report`.

The results of a benchmark on a processor are in a file of their own, such as grid-zen-4.json: to show another processor, add
its files. Tables go between the markers "bench", "roofline", "crowded" and "gpu" of README.md or docs/*.md, wherever these
are; heat maps and rooflines are drawn beside the results. Every ratio is the other's median time over fastrnn's: above 1,
fastrnn is faster.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import record
from bench.crowded import GOALS
from bench.gpu_resources import TARGETS
from bench.grid import CELLS, GATES, GROUPS, MODES, Point
from bench.memory import above
from bench.roofline import forward_operations, least_seconds
from fastrnn.kernels.gpu import plan

COLUMNS = tuple((cell, mode) for mode in MODES for cell in CELLS)
WORDS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN", "train": "train", "infer": "infer"}
HEADS = [f"{WORDS[cell]} {mode}" for cell, mode in COLUMNS]
BENCHMARKS = (  # of a CPU
    "grid", "memory", "startup", "half", "roofline", "stream", "penalty", "resets", "features", "keras", "dropout", "crowded"
)  # fmt: skip
# What the rows of each table mean.
ROWS = {
    "processors": "Each row is a processor that was measured, and how fastrnn does there at the sizes of the grid.",
    "classes": (
        "Each row is a class of sizes: few rows are batches of 1 to 8 sequences, middle are 32 and 64, large are 128, or "
        "layers of 1024 units and more. Each figure is the mean speed-up over torch.nn in that class."
    ),
    "apart": (
        "Each row is one size that belongs to no class: single steps (T1), layers x directions (2x2), a packed batch and how "
        "full it is (57%), an input of another size than the layer (I250). Each figure is the speed-up over torch.nn."
    ),
    "peers": (
        "Each row is another engine and a class of sizes. Each figure is the mean speed-up of a frozen fastrnn layer over that "
        "engine in inference. The fastest of three is the fastest of torch.nn, onnxruntime and openvino at each size."
    ),
    "stream": (
        "Each row is a cell and its units. Each figure is the time in microseconds that one step of one sequence takes: in "
        "torch.nn's module, in onnxruntime, in fastrnn's module, frozen module and `step` with `out`, and in the cells of both."
    ),
    "resets": (
        "Each row is a batch of 64 sequences of 128 steps and 256 units. Each figure is the time of the rival over fastrnn's: "
        "with resets at 5 % of the steps, from given states, of a call without resets, and of torch.nn called anew at each "
        "reset; with lengths at 57 % of the steps, of packed input."
    ),
    "features": (
        "Each row is a feature of docs/features.md and a size of the layer. Each figure is the time of a training step with it "
        "over that of the plain layer."
    ),
    "penalty": (
        "Each row is one size. Each figure is the speed-up over torch.nn of a training step with a gradient penalty, which "
        "needs a double backward."
    ),
    "keras": (
        "Each row is one size, and a call of a layer (infer), a call with all its gradients (train), or an epoch of `fit` of "
        "two layers and a Dense layer. The three figures are those of LSTM, GRU and SimpleRNN. They say how much faster "
        "fastrnn.keras is than keras.layers on each backend of Keras, and than fastrnn's own torch module."
    ),
    "dropout": (
        "Each row is a training step with recurrent dropout, of 50 steps and one thread. Each figure says how much faster "
        "fastrnn.keras is than keras.layers on torch."
    ),
    "crowded": (
        "Each row is one size, in inference or training, and each column something that disturbs its calls. The figures are "
        "the median times of a call in milliseconds: fastrnn's, and torch.nn's where it was measured. Calls that are "
        "disturbed only now and then (in bursts, or by a quota of 1.5 CPUs) have their mean times."
    ),
    "roofline": (
        "Each row is a class of sizes. Each figure is how much faster than torch.nn the roofline itself would be, and in "
        "brackets which share of the roofline's speed fastrnn reaches."
    ),
    "gpu": (
        "Each row is a group of layers that a paper or a library measures. Each figure is the mean speed-up over torch.nn with "
        "cuDNN, in a number format, forward alone or in training."
    ),
}
FLOOR = 1  # no point of the grid is to be below

Result = dict[str, Any]


def geomean(values: Iterable[float]) -> float:
    """Geometric mean."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def ratios(results: Sequence[Result], rival: str = "torch", **fields: str) -> list[float]:
    """Ratios to the rival of all sound results that have these fields, such as cell, mode, group."""
    return [
        result["ratios"][rival]
        for result in results
        if rival in result.get("ratios", {})
        and all((result["point"]["group"] if key == "group" else result[key]) == value for key, value in fields.items())
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _times(values: Sequence[float]) -> str:
    return f"{geomean(values):.2f}x" if values else ""


def class_table(results: Sequence[Result]) -> str:
    """Geometric means against torch.nn, a row per class of the grid."""
    rows = [
        [words, *(_times(ratios(results, group=group, cell=cell, mode=mode)) for cell, mode in COLUMNS)]
        for group, words in GROUPS.items()
        if group != "apart"
    ]
    return f"{ROWS['classes']}\n\n" + table(["speed-up over torch.nn", *HEADS], rows)


def by_place(results: Sequence[Result]) -> dict[tuple[str, str, str], float | None]:
    """Ratio to torch.nn by point, cell and mode; None of a wrong result."""
    places = [(point_name(result), result["cell"], result["mode"]) for result in results]
    return {place: result.get("ratios", {}).get("torch") for place, result in zip(places, results, strict=True)}


def apart_table(results: Sequence[Result]) -> str:
    """The points that belong to no class, each for itself."""
    names = dict.fromkeys(point_name(result) for result in results if result["point"]["group"] == "apart")
    found = by_place(results)
    rows = [[name, *(_times([r] if (r := found.get((name, *column))) else []) for column in COLUMNS)] for name in names]
    return f"{ROWS['apart']}\n\n" + table(["speed-up over torch.nn", *HEADS], rows)


def against_frozen(results: Sequence[Result], rivals: Sequence[str], group: str, cell: str) -> list[float]:
    """Times of the fastest of the rivals over those of frozen layers, whose weights are packed as the rivals' are."""
    timed = [
        {name: taken["median"] for name, taken in result["times"].items()}
        for result in results
        if result["point"]["group"] == group and result["cell"] == cell and "fastrnn frozen" in result.get("times", {})
    ]
    return [min(times[rival] for rival in rivals) / times["fastrnn frozen"] for times in timed if {*rivals} <= {*times}]


def peer_table(results: Sequence[Result]) -> str:
    """Geometric means of frozen layers' inference against the other engines, which hold packed weights too."""
    rows = []
    peers = ("onnxruntime", "openvino")
    for name, rivals in (*((peer, (peer,)) for peer in peers), ("the fastest of three", ("torch", *peers))):
        for group, words in GROUPS.items():
            means = [_times(against_frozen(results, rivals, group, cell)) for cell in CELLS]
            if any(means):
                rows.append([f"{name}, {words}", *means])
    head = ["speed-up, frozen, over", *(WORDS[cell] for cell in CELLS)]
    return f"{ROWS['peers']}\n\n{table(head, rows)}" if rows else ""


def _point(result: Result) -> Point:
    return Point(**dict(result["point"], modes=tuple(result["point"]["modes"])))


def point_name(result: Result) -> str:
    """Name of the result's point."""
    return _point(result).name


def worst(results: Sequence[Result], count: int = 5) -> str:
    """The points where fastrnn does least, and how many are below the floor."""
    sound = sorted((result for result in results if result.get("ratios")), key=lambda result: result["ratios"]["torch"])
    below = sum(result["ratios"]["torch"] < FLOOR for result in sound)
    listed = ", ".join(
        f"{WORDS[result['cell']]} {result['mode']} {point_name(result)} ({result['ratios']['torch']:.2f}x)"
        for result in sound[:count]
    )
    wrong = [result["name"] for result in results if result["faults"]]
    text = f"fastrnn is slower than torch.nn at {below} of {len(sound)} sizes. It gains least at these: {listed}."
    return text + f" **Results that were wrong, so that no time was taken: {', '.join(wrong)}.**" * bool(wrong)


def packed(results: Sequence[Result]) -> str:
    """What a packed training step costs beside the padded one, ours and torch.nn's."""
    sentences = []
    for result in results:
        if result["mode"] == "train" and "fastrnn padded" in result.get("ratios", {}):
            medians = {name: taken["median"] for name, taken in result["times"].items()}
            own, other = (medians[name] / medians[f"{name} padded"] for name in ("fastrnn", "torch"))
            sentences.append(f"{WORDS[result['cell']]} {own:.2f} (torch.nn {other:.2f})")
            fill = result["point"]["fill"]
    if not sentences:
        return ""
    return (
        f"A packed batch that is {fill:.0%} full takes this share of the time that the padded batch takes in training: "
        f"{', '.join(sentences)}."
    )


def memory(content: dict[str, Any]) -> str:
    """Peak memory of a training step against torch.nn's."""
    results, resolution = content["cases"], content["settings"]["resolution"]
    pairs = [(result["median"]["fastrnn"]["later"], result["median"]["torch"]["later"]) for result in results]
    told = [own / other for own, other in pairs if min(own, other) > 4 * resolution]
    mean = f"{geomean(told):.2f} of torch.nn's" if told else "too small to tell"
    names = ", ".join(result["name"] for result in results if above(result, resolution))
    least = f"{4 * resolution / 2**20:.0f} MiB"
    over = f"geometric mean over the {len(told)} sizes that take more than {least}"
    text = f"The peak memory of a training step is {mean} ({over}). "
    return text + (f"It is higher than torch.nn's at {names}." if names else "It is higher than torch.nn's at no size.")


def reached(results: Sequence[Result], rates: dict[str, Any], mode: str) -> list[float]:
    """Shares of the roofline, of the cases of at least 256 units and 32 rows."""
    return [
        least / result["times"]["fastrnn"]["median"]
        for result, least in rooflines(results, rates)
        if result["mode"] == mode and result["point"]["hidden"] >= 256 and result["point"]["batch"] >= 32
    ]


def rooflines(results: Sequence[Result], rates: dict[str, Any]) -> list[tuple[Result, float]]:
    """Those of one layer and direction that were timed, each with the seconds of its roofline."""
    timed = [result for result in results if "times" in result and _point(result).simple]
    return [(result, least_seconds(_point(result), result["cell"], result["mode"], rates)) for result in timed]


def roofline(results: Sequence[Result], rates: dict[str, Any]) -> str:
    """What is reached of the roofline, and how much faster than torch.nn the roofline itself would be."""
    stream = {int(kib): rate / 1e9 for kib, rate in rates["bytes_per_second"].items()}
    head = f"Products run at {rates['operations_per_second'] / 1e9:.0f} GFLOP/s. Weights are read at " + ", ".join(
        f"{rate:.0f} GB/s ({kib / 1024:g} MiB)" for kib, rate in stream.items()
    )
    shares = {mode: reached(results, rates, mode) for mode in MODES}
    told = ", ".join(
        f"{words} {geomean(shares[mode]):.0%} (least {min(shares[mode]):.0%})"
        for mode, words in (("infer", "inference"), ("train", "training"))
        if shares[mode]
    )
    timed, rows = rooflines(results, rates), []
    for group, words in GROUPS.items():
        cells = []
        for column in COLUMNS:
            found = [
                (result["times"], least)
                for result, least in timed
                if (result["point"]["group"], result["cell"], result["mode"]) == (group, *column)
            ]
            limit = _times([times["torch"]["median"] / least for times, least in found])
            share = f" ({geomean([least / times['fastrnn']['median'] for times, least in found]):.0%})" if found else ""
            cells.append(limit + share)
        if group != "apart":
            rows.append([words, *cells])
    limits = table(["roofline over torch.nn (reached)", *HEADS], rows)
    reach = f"From 256 units and 32 rows on, fastrnn reaches in the geometric mean: {told}"
    return f"{head}. {reach}.\n\n{ROWS['roofline']}\n\n{limits}"


def draw_roofline(results: Sequence[Result], rates: dict[str, Any], path: Path) -> None:
    """Rates reached in inference over operations per byte of recurrent weights, below what products and reading allow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    roof, stream = rates["operations_per_second"] / 1e9, rates["bytes_per_second"]
    batches = [0.7 * 1.05**step for step in range(120)]
    for kib, style in (("1024", "-"), ("16384", "--"), ("65536", ":")):
        heights = [min(roof, batch * stream[kib] / 1e9) for batch in batches]
        axes.plot(
            batches, heights, color="black", linestyle=style, linewidth=1, label=f"roof, weights of {int(kib) / 1024:g} MiB"
        )
    for cell, marker in (("lstm", "o"), ("gru", "s"), ("rnn", "^")):
        for hidden, colour in ((256, "tab:blue"), (512, "tab:green"), (1024, "tab:orange"), (2048, "tab:red")):
            at = [
                (point.batch, forward_operations(point, cell) / result["times"]["fastrnn"]["median"] / 1e9)
                for result in results
                if result["cell"] == cell and result["mode"] == "infer" and "times" in result
                for point in [_point(result)]
                if point.hidden == hidden and point.simple and point.steps > 1 and point.input_size == hidden
            ]
            if at:
                axes.plot(*zip(*at), marker, color=colour, label=f"{WORDS[cell]} H {hidden}", markersize=6)
    axes.set(
        xscale="log", yscale="log", xlabel="operations per byte of recurrent weights (rows of the batch)", ylabel="GFLOP/s"
    )
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], labels=["1", "2", "4", "8", "16", "32", "64", "128"])
    axes.set_title("Inference below the roofline", fontsize=11)
    axes.legend(fontsize=7, ncols=2, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def startup(content: dict[str, Any]) -> str:
    """Import and first call of a fresh process."""
    extra = statistics.median(content["import"]["import library"]) * 1e3
    first = {
        name: [statistics.median(row["seconds"]) * 1e3 for row in content["first call"] if row["library"] == name]
        for name in ("fastrnn", "torch")
    }
    return (
        f"In a fresh process `import fastrnn` takes {extra:.0f} ms after `import torch`. The first call takes at most "
        f"{max(first['fastrnn']):.0f} ms (torch.nn's {max(first['torch']):.0f} ms)."
    )


def half(content: dict[str, Any]) -> str:
    """bfloat16 against torch.nn's, and against our own float32."""

    def mean(mode: str, rival: str, rows: str = "") -> str:
        found = [
            case for case in content["cases"] if case["mode"] == mode and rows in case["name"] and " T1 " not in case["name"]
        ]
        return _times([case["ratios"][rival] for case in found if "ratios" in case])

    return (
        f"bfloat16 layers have a mean speed-up over torch.nn's of {mean('infer', 'torch')} in inference and "
        f"{mean('train', 'torch')} in training. Over fastrnn's own float32 layers it is, in inference, "
        f"{mean('infer', 'fastrnn float32', 'B1 ')} for one row and 512 or 1024 units, and "
        f"{mean('infer', 'fastrnn float32', 'B32 ')} for 32 rows; in training it is {mean('train', 'fastrnn float32')}."
    )


def penalty(content: dict[str, Any]) -> str:
    """Training with a gradient penalty against torch.nn's."""
    found = {(point_name(case), case["cell"]): case["ratios"]["torch"] for case in content["cases"] if case.get("ratios")}
    names = dict.fromkeys(point_name(case) for case in content["cases"])
    rows = [[name, *(_times([found[name, cell]] if (name, cell) in found else []) for cell in CELLS)] for name in names]
    return f"{ROWS['penalty']}\n\n" + table(["speed-up over torch.nn", *(WORDS[cell] for cell in CELLS)], rows)


def resets(content: dict[str, Any]) -> str:
    """What resets and lengths cost, and what is saved against torch.nn."""
    rows: dict[str, dict[str, str]] = {}
    for case in content["cases"]:
        for rival, ratio in case.get("ratios", {}).items():
            name = f"{case['kind']}, {rival}, {'training' if case['train'] else 'inference'}"
            rows.setdefault(name, {})[case["cell"]] = f"{ratio:.2f}x"
    found = [[name, *(figures.get(cell, "") for cell in CELLS)] for name, figures in rows.items()]
    return f"{ROWS['resets']}\n\n" + table(["resets and lengths", *(WORDS[cell] for cell in CELLS)], found)


def features(content: dict[str, Any]) -> str:
    """What features of a layer cost beside the plain one."""
    rows: dict[str, dict[str, str]] = {}
    for case in content["cases"]:
        steps, batch, units = case["sizes"]
        name = f"`{case['feature']}`, {steps} steps, B {batch}, H {units}"
        rows.setdefault(name, {})[case["cell"]] = f"{case['ratio']:.2f}x"
    names = [WORDS[cell] for cell in CELLS]
    found = [[name, *(figures.get(cell, "") for cell in names)] for name, figures in rows.items()]
    return f"{ROWS['features']}\n\n" + table(["time over the plain layer's", *names], found)


def keras(content: dict[str, Any]) -> str:
    """fastrnn.keras against keras.layers on each backend, and against the torch module."""
    rivals = {
        "torch": "keras.layers on torch",
        "tensorflow": "on TensorFlow",
        "jax": "on JAX",
        "module": "fastrnn's torch module",
    }
    by_row: dict[str, dict[str, Any]] = {}
    for case in content["cases"]:
        by_row.setdefault(f"{point_name(case)} {case['mode']}", {})[case["cell"]] = case.get("ratios", {})

    def figures(by_cell: dict[str, Any], rival: str) -> str:
        found = [by_cell.get(cell, {}).get(rival) for cell in CELLS]
        return ", ".join(f"{ratio:.2f}" if ratio else "-" for ratio in found) if any(found) else ""

    rows = [[name, *(figures(by_cell, rival) for rival in rivals)] for name, by_cell in by_row.items()]
    return f"{ROWS['keras']}\n\n" + table(["LSTM, GRU, SimpleRNN", *rivals.values()], rows)


def dropout(content: dict[str, Any]) -> str:
    """fastrnn.keras against keras.layers on torch with recurrent dropout."""
    by_row: dict[str, dict[str, float]] = {}
    for case in content["cases"]:
        by_row.setdefault(f"B{case['batch']} H{case['hidden']}", {})[case["cell"]] = case["ratios"]["torch"]
    rows = [[name, *(f"{ratios[cell]:.2f}" for cell in ("lstm", "gru"))] for name, ratios in by_row.items()]
    return f"{ROWS['dropout']}\n\n" + table(["recurrent dropout in Keras", "LSTM", "GRU"], rows)


def crowded(content: dict[str, Any]) -> str:
    """Milliseconds of a call in each situation that was measured."""
    figures: dict[tuple[str, str, str], float] = {}
    rows: dict[str, None] = {}
    columns: dict[str, None] = {}
    means = {goal.situation for goal in GOALS if goal.figure == "mean"}
    for case in content["cases"]:
        if "p50" in case["median"]:
            row = f"{case['point']} {case['mode']}"
            figure = "mean" if case["situation"] in means else "p50"
            figures[row, case["situation"], case["who"]] = case["median"][figure] / 1e3
            rows[row] = columns[case["situation"]] = None

    def cell(row: str, column: str) -> str:
        found = (figures.get((row, column, who)) for who in ("now", "torch.nn"))
        return ", ".join(f"{time:.3g}" for time in found if time is not None)

    name, machine = content["machine"]["name"], content["machine"]
    lines = [[row, *(cell(row, column) for column in columns)] for row in rows]
    origin = f"Measured on {machine['cores']} CPUs of {name} with {taken(content)}."
    return "\n\n".join((ROWS["crowded"], table(["ms", *columns], lines), origin))


def stream(content: dict[str, Any]) -> str:
    """Microseconds of one step of one row."""
    names = (
        ("torch", "torch.nn"),
        ("onnxruntime", "onnxruntime"),
        ("fastrnn", "module"),
        ("fastrnn frozen", "frozen"),
        ("fastrnn step", "step, out"),
        ("fastrnn frozen step", "frozen step, out"),
        ("torch cell", "torch.nn's cell"),
        ("fastrnn cell", "cell"),
    )
    rows = [
        [f"{WORDS[case['cell']]} H {case['hidden']}", *(f"{case['times'][name]['median'] * 1e6:.1f}" for name, _ in names)]
        for case in content["cases"]
        if "times" in case
    ]
    return f"{ROWS['stream']}\n\n" + table(["one step of one row, us", *(words for _, words in names)], rows)


def left_to_cudnn(point: dict[str, Any]) -> bool:
    """Is a point of bench.gpu one whose calls modules leave to cuDNN, on an H200?"""
    gates = GATES[point["cell"].lower()]
    dtype, bytes_, precision = {
        "fp16": ("float16", 2, "ieee"),
        "bf16": ("bfloat16", 2, "ieee"),
        "tf32": ("float32", 4, "tf32"),
        "fp32": ("float32", 4, "tf32x3"),
    }[point["format"]]
    H = point["H"]
    sizes = plan.Sizes(point["T"], point["B"], H, H, point["directions"], gates, bytes_, precision)
    return plan.cudnn_is_faster(TARGETS["sm_90"][1], sizes, point["layers"], dtype, point["fill"] < 1)


def gpu(content: dict[str, Any]) -> str:
    """Geometric means against cuDNN, a row per group of shapes, and the points where fastrnn does least."""
    points = [point for point in content["points"] if not point["faults"]]
    numbers = ["fp16", "bf16", "tf32"] + ["fp32"] * any(point["point"]["format"] == "fp32" for point in points)
    columns = [(number, mode) for number in numbers for mode in ("forward", "train")]
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    for point in points:
        for mode in ("forward", "train"):
            row = found.setdefault(point["point"]["group"], {})
            row.setdefault((point["point"]["format"], mode), []).append(point[mode]["ratio"])
    rows = [[group, *(_times(row.get(column, [])) for column in columns)] for group, row in found.items()]
    each = [(point[mode]["ratio"], mode, point) for point in points for mode in ("forward", "train")]
    kept = [(ratio, f"{mode} {point['name']}") for ratio, mode, point in each if not left_to_cudnn(point["point"])]
    below = [f"{name} ({ratio:.2f}x)" for ratio, name in sorted(kept) if ratio < FLOOR]
    wrong = ", ".join(point["name"] for point in content["points"] if point["faults"])
    device, versions = content["device"], content["versions"]
    return "\n\n".join(
        [
            ROWS["gpu"],
            table(["speed-up over cuDNN", *(f"{number} {mode}" for number, mode in columns)], rows),
            f"fastrnn's engine is slower than cuDNN in {sum(ratio < FLOOR for ratio, *_ in each)} of {len(each)} figures. In "
            "normal use, fastrnn leaves the shapes at which cuDNN was faster to cuDNN. The other shapes, which it runs itself, "
            f"have {len(kept)} figures: their geometric mean is {_times([ratio for ratio, _ in kept])}, and {len(below)} of "
            f"them are below {FLOOR}x{': ' * bool(below)}{', '.join(below)}."
            + f" **Results that were wrong, so that no time was taken: {wrong}.**"
            * bool(wrong),
            f"{device['name']}, CUDA {device['cuda']}, cuDNN {device['cudnn']}, torch {versions['torch']}, triton "
            f"{versions['triton']}, {content['date'][:10]}, commit {content['commit'][:10] or 'none'}.",
        ]
    )


def origin(content: dict[str, Any]) -> str:
    """Where and when the figures were taken."""
    versions, settings = content["versions"], content["settings"]
    return (
        f"Measured with {settings['threads']} threads in {settings['dtype']}, "
        + "".join(f"{name} {versions[name]}, " for name in ("onnxruntime", "openvino"))
        + f"{taken(content)}."
    )


def heatmap(results: Sequence[Result], path: Path) -> None:
    """Ratios to torch.nn as a picture: points down, cells and modes across, colours on the ratio's logarithm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = by_place(results)
    group_of = {point_name(result): result["point"]["group"] for result in results}
    names = list(group_of)
    limit = math.log2(4)
    logs = [[math.log2(r) if (r := found.get((name, *column))) else math.nan for column in COLUMNS] for name in names]

    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.3 * len(names)), layout="constrained")
    picture = axes.imshow(logs, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(COLUMNS)), [f"{WORDS[cell]}\n{mode}" for cell, mode in COLUMNS])
    axes.set_yticks(range(len(names)), names, family="monospace", fontsize=8)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    for row, values in enumerate(logs):
        for column, value in enumerate(values):
            if not math.isnan(value):
                colour = "white" if abs(value) > 0.7 * limit else "black"
                axes.text(column, row, f"{2**value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    for row in range(1, len(names)):
        if group_of[names[row]] != group_of[names[row - 1]]:
            axes.axhline(row - 0.5, color="black", linewidth=1)
    axes.axvline(len(CELLS) - 0.5, color="black", linewidth=1)
    scale = figure.colorbar(picture, ax=axes, shrink=0.5, extend="both")
    scale.set_ticks([-2, -1, 0, 1, 2], labels=["1/4", "1/2", "1", "2", "4"])
    axes.set_title("Times faster than torch.nn", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def overview(grids: Sequence[dict[str, Any]]) -> str:
    """List the processors measured: what each is, how many points are below the floor, when and at which commit."""
    rows = []
    for grid in grids:
        machine = grid["machine"]
        found = [result["ratios"]["torch"] for result in grid["cases"] if result.get("ratios")]
        rows.append(
            [
                f"{machine['name']} ({machine['processor']})",
                f"{machine['vectors']} bits",
                machine["caches"].get("L2", ""),
                f"{sum(ratio < FLOOR for ratio in found)} of {len(found)}",
                f"{min(found):.2f}x",
                f"{grid['date'][:10]}, {grid['commit'][:10] or 'none'}",
            ]
        )
    head = ["processor", "vectors", "L2 of a core", f"sizes below {FLOOR}x", "least speed-up", "date and commit"]
    return f"{ROWS['processors']}\n\n{table(head, rows)}"


def section(name: str, contents: dict[str, dict[str, Any]], pictures: str) -> str:
    """Write the tables of one processor. contents: its results by benchmark. pictures: the folder of the heat map."""
    parts, last = [f"### {name}"], ""
    if grid := contents.get("grid"):
        results = grid["cases"]
        parts += [class_table(results), worst(results), f"![Heat map of the grid]({pictures}/{picture('heatmap', name)})"]
        parts += [apart_table(results), packed(results), peer_table(results)]
        last = origin(grid)
    writers = {"stream": stream, "penalty": penalty, "resets": resets, "features": features}
    writers |= {"keras": keras, "dropout": dropout}
    writers |= {"memory": memory, "startup": startup, "half": half}
    for benchmark, write in writers.items():
        if content := contents.get(benchmark):
            parts.append(write(content))
            if taken(content) != taken(grid or {}):
                parts.append(f"(Measured with {taken(content)}.)")
    return "\n\n".join(part for part in (*parts, last) if part)


def taken(content: dict[str, Any]) -> str:
    """Say with which torch, when and at which commit a result was taken."""
    if not content:
        return ""
    return f"torch {content['versions']['torch']}, {content['date'][:10]}, commit {content['commit'][:10] or 'none'}"


def picture(kind: str, name: str) -> str:
    """Name the file of a processor's heat map or roofline."""
    return f"{kind}-{record.slug(name)}.png"


def markdown(processors: dict[str, dict[str, dict[str, Any]]], pictures: str) -> str:
    """Write the report of all processors, by name: a table of them, then the tables of each."""
    grids = [contents["grid"] for contents in processors.values() if "grid" in contents]
    return "\n\n".join([overview(grids), *(section(name, contents, pictures) for name, contents in processors.items())])


def rooflines_of_all(processors: dict[str, dict[str, dict[str, Any]]], pictures: str) -> str:
    """Write table and picture of each processor whose rates were measured."""
    parts = []
    for name, contents in processors.items():
        if {"grid", "roofline"} <= contents.keys():
            results, rates = contents["grid"]["cases"], contents["roofline"]
            parts += [f"### Roofline of {name}", roofline(results, rates)]
            parts.append(f"![Rates below the roofline]({pictures}/{picture('roofline', name)})")
    return "\n\n".join(parts)


def by_processor(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Read the results of each processor by benchmark, the processor whose grid is newest first."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for benchmark in BENCHMARKS:
        for path in sorted(folder.glob(f"{benchmark}-*.json")):
            content = json.loads(path.read_text())
            found.setdefault(content["machine"]["name"], {})[benchmark] = content

    def age(name: str) -> str:
        return found[name].get("grid", {"date": ""})["date"]

    return {name: found[name] for name in sorted(found, key=age, reverse=True)}


def insert(text: str, page: str, name: str = "bench") -> str:
    """The page with `text` between the markers of this name. ValueError: it has none."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in page or end not in page:
        raise ValueError(f"no {begin} ... {end} to put the report between")
    before, rest = page.split(begin, 1)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}"


def write_pages(root: Path, texts: dict[str, Callable[[str], str]]) -> list[Path]:
    """Put each text between the markers of its name, in whichever of README.md and docs/*.md has them.

    texts: by marker's name, a function of the folder of the pictures as the page sees it.

    Raises:
        ValueError: no page has the markers of a text.
    """
    pages = {path: path.read_text() for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if path.exists()}
    changed = []
    for name, write in texts.items():
        places = [path for path, page in pages.items() if f"<!-- {name}:begin -->" in page]
        if not places:
            raise ValueError(f"neither README.md nor docs/*.md has <!-- {name}:begin --> ... to put the report between")
        for path in places:
            pictures = Path(os.path.relpath(root / "bench" / "results", path.parent)).as_posix()
            pages[path] = insert(write(pictures), pages[path], name)
            changed.append(path)
    for path in changed:
        path.write_text(pages[path])
    return changed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=record.ROOT, help="holds README.md, docs/ and bench/results/")
    root = parser.parse_args(argv).root
    folder = root / "bench" / "results"
    processors = by_processor(folder)
    for name, contents in processors.items():
        if "grid" in contents:
            heatmap(contents["grid"]["cases"], folder / picture("heatmap", name))
            if "roofline" in contents:
                draw_roofline(contents["grid"]["cases"], contents["roofline"], folder / picture("roofline", name))
    texts: dict[str, Callable[[str], str]] = {}
    if processors:
        texts["bench"] = lambda pictures: markdown(processors, pictures)
        texts["roofline"] = lambda pictures: rooflines_of_all(processors, pictures)
    if found := [contents["crowded"] for contents in processors.values() if "crowded" in contents]:
        texts["crowded"] = lambda pictures: "\n\n".join(map(crowded, found))
    if (file := folder / "gpu.json").exists():
        texts["gpu"] = lambda pictures: gpu(json.loads(file.read_text()))
    for path in write_pages(root, texts):
        print(f"written: {path}")


if __name__ == "__main__":
    main()
