"""Tables and heat map from bench/results/*.json: `python -m bench.report`.

Writes bench/results/heatmap.png, and puts the tables between the bench markers of README.md. Every ratio is the other's
median time over fastrnn's: above 1, fastrnn is faster.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import record
from bench.grid import CELLS, GROUPS, MODES, Point
from bench.memory import above

COLUMNS = tuple((cell, mode) for mode in MODES for cell in CELLS)
WORDS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN", "train": "train", "infer": "infer"}
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
FLOOR = 0.85  # no point of the grid is to be below

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
    return table(["against torch.nn", *(f"{WORDS[cell]} {mode}" for cell, mode in COLUMNS)], rows)


def by_place(results: Sequence[Result]) -> dict[tuple[str, str, str], float | None]:
    """Ratio to torch.nn by point, cell and mode; None of a wrong result."""
    places = [(point_name(result), result["cell"], result["mode"]) for result in results]
    return {place: result.get("ratios", {}).get("torch") for place, result in zip(places, results, strict=True)}


def apart_table(results: Sequence[Result]) -> str:
    """The points that belong to no class, each for itself."""
    names = dict.fromkeys(point_name(result) for result in results if result["point"]["group"] == "apart")
    found = by_place(results)
    rows = [[name, *(_times([r] if (r := found.get((name, *column))) else []) for column in COLUMNS)] for name in names]
    return table(["against torch.nn", *(f"{WORDS[cell]} {mode}" for cell, mode in COLUMNS)], rows)


def peer_table(results: Sequence[Result]) -> str:
    """Geometric means of inference against the other engines."""
    rows = []
    for rival in ("onnxruntime", "openvino"):
        for group, words in GROUPS.items():
            means = [_times(ratios(results, rival, group=group, cell=cell, mode="infer")) for cell in CELLS]
            if any(means):
                rows.append([f"{rival}, {words}", *means])
    return table(["inference against", *(WORDS[cell] for cell in CELLS)], rows)


def point_name(result: Result) -> str:
    """Name of the result's point."""
    sizes = dict(result["point"], modes=tuple(result["point"]["modes"]))
    return Point(**sizes).name


def worst(results: Sequence[Result], count: int = 5) -> str:
    """The points where fastrnn does least, and how many are below the floor."""
    sound = sorted((result for result in results if result.get("ratios")), key=lambda result: result["ratios"]["torch"])
    below = sum(result["ratios"]["torch"] < FLOOR for result in sound)
    listed = ", ".join(
        f"{WORDS[result['cell']]} {result['mode']} {point_name(result)} ({result['ratios']['torch']:.2f}x)"
        for result in sound[:count]
    )
    wrong = [result["name"] for result in results if result["faults"]]
    text = f"Of {len(sound)} points {below} are below {FLOOR}x. The least: {listed}."
    return text + f" **Wrong results, no time taken: {', '.join(wrong)}.**" * bool(wrong)


def packed(results: Sequence[Result]) -> str:
    """What a packed training step costs beside the padded one, ours and torch.nn's."""
    sentences = []
    for result in results:
        if result["mode"] == "train" and "fastrnn padded" in result.get("ratios", {}):
            medians = {name: taken["median"] for name, taken in result["times"].items()}
            own, other = (medians[name] / medians[f"{name} padded"] for name in ("fastrnn", "torch"))
            sentences.append(f"{WORDS[result['cell']]} {own:.2f} (torch.nn {other:.2f})")
            fill = result["point"]["fill"]
    return f"A packed training step at {fill:.0%} fill, in padded steps: {', '.join(sentences)}." if sentences else ""


def memory(content: dict[str, Any]) -> str:
    """Peak memory of a training step against torch.nn's."""
    results, resolution = content["cases"], content["settings"]["resolution"]
    pairs = [(result["median"]["fastrnn"]["later"], result["median"]["torch"]["later"]) for result in results]
    told = [own / other for own, other in pairs if min(own, other) > 4 * resolution]
    mean = f"{geomean(told):.2f} of torch.nn's" if told else "too small to tell"
    names = ", ".join(result["name"] for result in results if above(result, resolution))
    least = f"{4 * resolution / 2**20:.0f} MiB"
    text = f"Peak memory of a training step: {mean} (geometric mean of the {len(told)} points above {least}); "
    return text + (f"above torch.nn's at {names}." if names else "above torch.nn's at none.")


def startup(content: dict[str, Any]) -> str:
    """Import and first call of a fresh process."""
    extra = statistics.median(content["import"]["import library"]) * 1e3
    first = {
        name: [statistics.median(row["seconds"]) * 1e3 for row in content["first call"] if row["library"] == name]
        for name in ("fastrnn", "torch")
    }
    return (
        f"In a fresh process `import fastrnn` takes {extra:.0f} ms after `import torch`, "
        f"the first call {max(first['fastrnn']):.0f} ms at most (torch.nn {max(first['torch']):.0f} ms)."
    )


def half(content: dict[str, Any]) -> str:
    """bfloat16 against torch.nn's, and against our own float32."""

    def mean(mode: str, rival: str, rows: str = "") -> str:
        found = [
            case for case in content["cases"] if case["mode"] == mode and rows in case["name"] and " T1 " not in case["name"]
        ]
        return _times([case["ratios"][rival] for case in found if "ratios" in case])

    return (
        f"bfloat16 layers against torch.nn's: inference {mean('infer', 'torch')}, training {mean('train', 'torch')}. Against "
        f"our own float32, in inference: {mean('infer', 'fastrnn float32', 'B1 ')} at one row and H 512 to 1024, "
        f"{mean('infer', 'fastrnn float32', 'B32 ')} at 32 rows; in training {mean('train', 'fastrnn float32')}."
    )


def origin(content: dict[str, Any]) -> str:
    """Where and when the figures were taken."""
    machine, versions, settings = content["machine"], content["versions"], content["settings"]
    return (
        f"{settings['threads']} threads of {machine['processor']} ({machine['torch']}, "
        f"L2 {machine['caches'].get('L2', '?')}), {settings['dtype']}, medians of interleaved runs, "
        + ", ".join(f"{name} {versions[name]}" for name in ("torch", "onnxruntime", "openvino"))
        + f", {content['date'][:10]}, commit {content['commit'][:10] or 'none'}."
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


def markdown(contents: dict[str, dict[str, Any]]) -> str:
    """The report of the result files, by name."""
    parts = []
    if grid := contents.get("grid"):
        results = grid["cases"]
        parts += [class_table(results), worst(results), "![Heat map of the grid](bench/results/heatmap.png)"]
        parts += [apart_table(results), packed(results), peer_table(results)]
    if "memory" in contents:
        parts.append(memory(contents["memory"]))
    if "startup" in contents:
        parts.append(startup(contents["startup"]))
    if "half" in contents:
        parts.append(half(contents["half"]))
    if grid:
        parts.append(origin(grid))
    return "\n\n".join(part for part in parts if part)


def insert(text: str, page: str) -> str:
    """The page with `text` between its markers. ValueError: it has none."""
    if BEGIN not in page or END not in page:
        raise ValueError(f"no {BEGIN} ... {END} to put the report between")
    before, rest = page.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder (default %(default)s)")
    parser.add_argument("--page", type=Path, default=record.ROOT / "README.md", help="(default %(default)s)")
    options = parser.parse_args(argv)
    files = {name: options.results / f"{name}.json" for name in ("grid", "memory", "startup", "half")}
    contents = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    report = markdown(contents)
    print(report)
    if "grid" in contents:
        heatmap(contents["grid"]["cases"], options.results / "heatmap.png")
    if options.page.exists():
        options.page.write_text(insert(report, options.page.read_text()))


if __name__ == "__main__":
    main()
