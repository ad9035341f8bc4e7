"""What a feature of a layer costs beside the plain layer: `python -m bench.features --help`.

A training step of both, timed in turns, as in bench.run: layers of one cell, size and seed, with and without the feature.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console

import fastrnn
from bench import record, timing
from fastrnn.timing import Subject

FEATURES: dict[str, dict[str, Any]] = {
    "layer_norm": {"layer_norm": True},
    "num_heads=4": {"num_heads": 4},
    "cell_clip": {"cell_clip": 1.0},
    "learn_initial_state": {"learn_initial_state": True},
    "recurrent_dropout": {"recurrent_dropout": 0.2},
    "zoneout": {"zoneout": 0.2},
}
CELLS = "LSTM", "GRU", "RNN"
SIZES = (64, 8, 128), (64, 16, 256), (32, 32, 512)  # steps, rows, units, and as many inputs
DEFAULT_OUTPUT = record.result_file("features")


def measure(cell: str, feature: str, sizes: tuple[int, int, int], train: bool, seconds: float, most: int) -> dict[str, Any]:
    """Record one case: the times of both layers, and what the feature's is over the other's."""
    (T, B, H), made = sizes, getattr(fastrnn, cell)
    x, outer = torch.randn(T, B, H), torch.randn(T, B, H)
    mode = "train" if train else "infer"
    rivals = {"with": Subject(made(H, H, **FEATURES[feature]), x, mode, outer).run,
              "without": Subject(made(H, H), x, mode, outer).run}  # fmt: skip
    times = timing.interleave(rivals, seconds, most)
    ratio = times["with"]["median"] / times["without"]["median"]
    return {"cell": cell, "feature": feature, "sizes": sizes, "train": train, "ratio": ratio, "times": times, "faults": []}


def main(argv: list[str] | None = None) -> None:
    parser = timing.parser("bench.features", __doc__ or "", DEFAULT_OUTPUT)
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=list(FEATURES), help="(default: all)")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="(default: all)")
    parser.add_argument("--infer", action="store_true", help="inference, in the place of training")
    options = parser.parse_args(argv)
    record.one_tree()
    console, results = Console(highlight=False, soft_wrap=True), []
    for feature in options.features:
        for cell in options.cells:
            if feature == "cell_clip" and cell != "LSTM":
                continue
            for sizes in SIZES:
                results.append(measure(cell, feature, sizes, not options.infer, options.seconds, options.repeats))
                T, B, H = sizes
                console.print(f"{feature} {cell:4} {T} steps, B {B}, H {H}: {results[-1]['ratio']:.3f}x the plain layer's time")
    record.write_cases(options, results)


if __name__ == "__main__":
    main()
