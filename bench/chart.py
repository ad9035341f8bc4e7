"""Draw the README's chart from the newest results of bench.run: `python -m bench.chart`.

Writes bench/results/speedup.png, and the picture with its origin between the chart markers of README.md.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import record
from bench.grid import CELLS
from bench.report import WORDS, insert

PICTURE = record.RESULTS / "speedup.png"
PANELS = {"train": "Training step", "infer": "Inference"}
BATCHES = (1, 32, 128)
COLOURS = {"lstm": "#0072b2", "gru": "#d55e00", "rnn": "#009e73"}  # told apart by colour-blind readers too
MARKERS = {"lstm": "o", "gru": "s", "rnn": "^"}


def newest(folder: Path) -> dict[str, Any]:
    """Read the grid that was measured last; FileNotFoundError: the folder holds none."""
    grids = [json.loads(path.read_text()) for path in folder.glob("**/grid*.json")]
    if not grids:
        raise FileNotFoundError(f"no grid*.json in {folder}: python -m bench.run makes one")
    return max(grids, key=lambda content: content["date"])


def speed_ups(results: Sequence[dict[str, Any]], cell: str, mode: str, batch: int) -> dict[int, float]:
    """Find the speed-up over torch.nn by hidden size: one layer, one direction, input size equal to hidden size."""
    found = {}
    for result in results:
        point = result["point"]
        plain = point["layers"] == point["directions"] == point["fill"] == 1 and point["input"] == 0 and point["steps"] > 1
        if plain and point["group"] != "apart" and (result["cell"], result["mode"], point["batch"]) == (cell, mode, batch):
            if ratio := result.get("ratios", {}).get("torch"):
                found[point["hidden"]] = ratio
    return dict(sorted(found.items()))


def chart(content: dict[str, Any]) -> bytes:
    """Draw the speed-up over torch.nn by cell and size, training beside inference, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = content["cases"]
    figure, panels = plt.subplots(1, len(PANELS), figsize=(11, 3.9), sharey=True, layout="constrained")
    for axes, (mode, title) in zip(panels, PANELS.items(), strict=True):
        places: dict[tuple[int, int], int] = {}  # of a batch and a hidden size, from left to right
        start, labels = 0, []
        for batch in BATCHES:
            sizes = sorted({hidden for cell in CELLS for hidden in speed_ups(results, cell, mode, batch)})
            places |= {(batch, hidden): start + index for index, hidden in enumerate(sizes)}
            if sizes:
                labels.append((start + (len(sizes) - 1) / 2, f"batch {batch}"))
            start += len(sizes) + 1
        for cell in CELLS:
            for batch in BATCHES:
                found = speed_ups(results, cell, mode, batch)
                across = [places[batch, hidden] for hidden in found]
                label = WORDS[cell] if batch == BATCHES[0] else None
                axes.plot(across, list(found.values()), marker=MARKERS[cell], color=COLOURS[cell], label=label)
        axes.axhline(1, color="black", linewidth=1)
        axes.set_yscale("log", base=2)
        axes.set_xticks(list(places.values()), [str(hidden) for _, hidden in places], fontsize=7)
        for place, label in labels:
            axes.annotate(label, (place, 0), (0, -20), ("data", "axes fraction"), "offset points", ha="center", va="top")
        axes.set_xlabel("units of the layer", labelpad=22)
        axes.set_title(title, fontsize=11)
        axes.grid(axis="y", alpha=0.3)
    top = max(ratio for result in results for name, ratio in result.get("ratios", {}).items() if name == "torch")
    ticks = [2**power for power in range(-3, 8) if 0.75 <= 2**power <= 1.5 * top]
    panels[0].set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    panels[0].set_ylabel("times as fast as torch.nn")
    panels[-1].legend(loc="upper right")
    with io.BytesIO() as file:
        figure.savefig(file, dpi=150)
        plt.close(figure)
        return file.getvalue()


def origin(content: dict[str, Any]) -> str:
    """Say what the chart shows, and on which machine and when it was measured."""
    machine, settings = content["machine"], content["settings"]
    processor = machine.get("name", machine["processor"])
    cache = machine["caches"].get("L2", "unknown")
    return (
        "Each point is the time of torch.nn over the time of fastrnn, so fastrnn is faster above 1x. Measured on "
        f"{content['date'][:10]} with {settings['threads']} threads of {processor} ({machine['torch']}, {cache} of L2 cache a "
        f"core), in float32, with torch {content['versions']['torch'].split('+')[0]}."
    )


def block(content: dict[str, Any]) -> str:
    """The lines between the chart markers."""
    picture = PICTURE.relative_to(record.ROOT).as_posix()
    return f"![Speed-up over torch.nn by cell and size, in training and inference]({picture})\n\n{origin(content)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.chart", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder (default %(default)s)")
    parser.add_argument("--page", type=Path, default=record.ROOT / "README.md", help="(default %(default)s)")
    options = parser.parse_args(argv)
    content = newest(options.results)
    PICTURE.write_bytes(chart(content))
    options.page.write_text(insert(block(content), options.page.read_text(), "chart"))
    print(f"written: {PICTURE}, from the results of {content['date'][:10]}")


if __name__ == "__main__":
    main()
