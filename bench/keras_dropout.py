"""fastrnn.keras against keras.layers on torch with recurrent dropout: `python -m bench.keras_dropout --help`.

A training step of LSTM and GRU, for which Keras draws a mask for each gate. Both draw the same masks. Results are checked
first, then both are timed in turns.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from rich.console import Console

from bench import keras_calls, record, timing
from bench.keras_layers import TOLERANCE, repeated
from fastrnn.timing import difference

SIZES = ((1, 64), (32, 64), (32, 256), (128, 512))  # rows and units
STEPS, RATE = 50, 0.2
DEFAULT_OUTPUT = record.result_file("dropout")


def measure(cell: str, size: tuple[int, int], seconds: float, most: int, steps: int = STEPS) -> dict[str, Any]:
    """Record one case: the times of both, and keras.layers' over ours."""
    import keras

    import fastrnn.keras

    (batch, hidden), generator = size, np.random.default_rng(0)
    x, dy = (generator.standard_normal((batch, steps, hidden), "float32") for _ in range(2))
    calls, results, weights = {}, {}, None
    for name, layers in (("fastrnn", fastrnn.keras), ("torch", keras.layers)):
        layer = getattr(layers, keras_calls.LAYERS[cell])(hidden, return_sequences=True, recurrent_dropout=RATE, seed=0)
        layer.build((None, None, hidden))
        weights = weights or layer.get_weights()
        layer.set_weights(weights)
        calls[name] = keras_calls.on_torch(layer, x, dy, True)
        results[name] = calls[name]()
    apart = max(difference(a, b) for a, b in zip(*results.values(), strict=True))
    result: dict[str, Any] = {"cell": cell, "batch": batch, "hidden": hidden, "steps": steps, "faults": []}
    if not apart <= TOLERANCE:
        return result | {"faults": [f"torch differs by {apart:.2g}"]}
    times = timing.interleave({name: repeated(call) for name, call in calls.items()}, seconds, most)
    return result | {"ratios": {"torch": times["torch"]["median"] / times["fastrnn"]["median"]}, "times": times}


def main(argv: list[str] | None = None) -> int:
    os.environ["KERAS_BACKEND"] = "torch"
    options = timing.parser("bench.keras_dropout", __doc__ or "", DEFAULT_OUTPUT).parse_args(argv)
    record.one_tree()
    console, results = Console(highlight=False, soft_wrap=True), []
    for cell in ("lstm", "gru"):
        for size in SIZES:
            results.append(measure(cell, size, options.seconds, options.repeats))
            ratios = results[-1].get("ratios")
            told = f"{ratios['torch']:.2f}x" if ratios else f"[red]{results[-1]['faults']}"
            console.print(f"{cell} {size[0]} x {size[1]}: keras.layers takes {told}")
    record.write_cases(options, results)
    return any(result["faults"] for result in results)


if __name__ == "__main__":
    raise SystemExit(main())
