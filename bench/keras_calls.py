"""Run keras.layers on one backend of Keras: bench.keras_layers starts this file in a process for each.

It reads a job a line from its standard input, as JSON, and answers each with a line of JSON. A job with a "cell" makes a layer,
or the model that is to be fitted; a job with "loops" runs it so many times. Weights and data come from a .npz file that the job
names. What a layer calculates goes into another, so that the other side can compare.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

LAYERS = {"lstm": "LSTM", "gru": "GRU", "rnn": "SimpleRNN"}
CLASSES = 10
Call = Callable[[], list]  # a layer's output, and in training the gradients of its input and of each weight


def make_layer(layers: Any, cell: str, hidden: int, input_size: int, weights: list | None = None) -> Any:
    """Make a layer of `layers`, keras.layers or fastrnn.keras, which returns all steps."""
    layer = getattr(layers, LAYERS[cell])(hidden, return_sequences=True)
    layer.build((None, None, input_size))
    if weights is not None:
        layer.set_weights(weights)
    return layer


def make_epoch(layers: Any, cell: str, hidden: int, x: Any, labels: Any, batch: int) -> Callable[[], float]:
    """Make a function that fits the textbook model for an epoch and returns the loss: two layers and a Dense layer."""
    import keras

    keras.utils.set_random_seed(0)
    recurrent = getattr(layers, LAYERS[cell])
    model = keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            recurrent(hidden, return_sequences=True),
            recurrent(hidden),
            keras.layers.Dense(CLASSES),
        ]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return lambda: float(model.fit(x, labels, batch_size=batch, verbose=0, shuffle=False).history["loss"][0])


def on_torch(layer: Any, x: Any, dy: Any, train: bool) -> Call:
    weights = [variable.value for variable in layer.trainable_variables]
    return torch_call(lambda x: layer(x, training=train), weights, x, dy, train)


def torch_call(forward: Callable[[Any], Any], weights: list, x: Any, dy: Any, train: bool) -> Call:
    """Make the call of a function of torch's tensors, with these weights."""
    import torch

    x, dy = torch.as_tensor(x).requires_grad_(train), torch.as_tensor(dy)
    leaves = [x, *weights]

    def infer() -> list:
        with torch.no_grad():
            return [forward(x)]

    def step() -> list:
        for leaf in leaves:
            leaf.grad = None
        y = forward(x)
        y.backward(dy)
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    return step if train else infer


def on_tensorflow(layer: Any, x: Any, dy: Any, train: bool) -> Call:
    import tensorflow as tf

    x, dy = tf.constant(x), tf.constant(dy)

    @tf.function
    def infer() -> list:
        return [layer(x)]

    @tf.function
    def step() -> list:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return [y, *tape.gradient(y, [x, *layer.trainable_variables], output_gradients=dy)]

    return step if train else infer


def on_jax(layer: Any, x: Any, dy: Any, train: bool) -> Call:
    import jax

    x, dy = jax.numpy.asarray(x), jax.numpy.asarray(dy)
    weights, others = ([v.value for v in of] for of in (layer.trainable_variables, layer.non_trainable_variables))

    def output(x: Any, weights: list) -> Any:
        return layer.stateless_call(weights, others, x, training=train)[0]

    @jax.jit
    def infer(x: Any, weights: list) -> list:
        return [output(x, weights)]

    @jax.jit
    def step(x: Any, weights: list) -> list:
        y, backward = jax.vjp(output, x, weights)
        dx, gradients = backward(dy)
        return [y, dx, *gradients]

    run = step if train else infer
    return lambda: jax.block_until_ready(run(x, weights))


BACKENDS: Mapping[str, Callable[[Any, Any, Any, bool], Call]] = {"torch": on_torch, "tensorflow": on_tensorflow, "jax": on_jax}


def set_threads(backend: str, threads: int) -> None:
    """Give the backend so many threads, as far as it can be told: JAX takes those of the machine."""
    if backend == "torch":
        import torch

        torch.set_num_threads(threads)
    if backend == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)


def main(backend: str, threads: int) -> None:
    set_threads(backend, threads)
    import keras

    answers, sys.stdout = sys.stdout, sys.stderr  # nothing that the libraries print comes between the answers

    def prepare(cell: str, mode: str, hidden: int, data: str, result: str, batch: int) -> Callable[[], Any]:
        with np.load(data) as stored:
            arrays = dict(stored)
        x = arrays["x"]
        if mode == "fit":
            run: Callable[[], Any] = make_epoch(keras.layers, cell, hidden, x, arrays["labels"], batch)
            np.savez(result, run())
            return run
        layer = make_layer(keras.layers, cell, hidden, x.shape[-1], [arrays[f"weight{k}"] for k in range(3)])
        run = BACKENDS[backend](layer, x, arrays["dy"], mode == "train")
        np.savez(result, *(np.asarray(each) for each in run()))
        return run

    run: Callable[[], Any] | None = None
    for line in sys.stdin:
        job = json.loads(line)
        if "cell" in job:
            run = prepare(**job)
        for _ in range(job.get("loops", 0)):
            assert run is not None
            run()
        print("{}", file=answers, flush=True)


if __name__ == "__main__":
    os.environ["KERAS_BACKEND"] = sys.argv[1]
    main(sys.argv[1], int(sys.argv[2]))
