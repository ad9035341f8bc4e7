"""
The same in Keras
=================

The textbook LSTM in Keras: a subclassed model with two stacked layers, compiled and fitted. It reads the same digits as
:ref:`the first page <sphx_glr_gallery_basics_first_model.py>`, row by row. Then the model moves to PyTorch with its weights.

The layers come from ``fastrnn.keras`` instead of ``keras.layers``, and nothing else changes. They need Keras' torch backend.

The data are the 1797 digits of ``sklearn.datasets.load_digits`` (E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning
Repository, licence CC BY 4.0). A quarter is held out.
"""

# sphinx_gallery_thumbnail_path = "results/keras_model.png"
import functools
import os

os.environ["KERAS_BACKEND"] = "torch"  # before keras is imported

import keras
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from examples.keras_models import LSTMModel, to_pytorch
from examples.page import Page

page = Page(__file__, __doc__)
keras.utils.set_random_seed(page.seed)

# %%
# A picture as a sequence
# -----------------------

pictures, digits = load_digits(return_X_y=True)
x = torch.tensor(pictures, dtype=torch.float32).view(-1, 8, 8).to(page.device) / 16
y = torch.tensor(digits, device=page.device)
held_out, *rest = torch.randperm(len(x)).split(len(x) // 4)
known = torch.cat(rest)

# %%
# A digit that is shifted by a pixel is the same digit. With each picture come four shifted ones, so that there is more to learn
# from.

moves = [((0, 0), (1, 2)), ((1, 0), (1, 2)), ((-1, 0), (1, 2)), ((0, 1), (1, 2)), ((0, -1), (1, 2))]
x_train, y_train = torch.cat([x[known].roll(*move) for move in moves]), y[known].repeat(len(moves))

# %%
# Training
# --------


def build(model: keras.Model, epochs: int) -> keras.Model:
    """Compile a model for so many epochs."""
    rate = keras.optimizers.schedules.CosineDecay(4e-3, epochs * (1 + len(x_train) // 64))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    return model


epochs = page.pick(15, 1)
model = build(LSTMModel(hidden_size=128, num_classes=10), epochs)
curve = []
for _ in page.progress(range(epochs)):
    history = model.fit(x_train, y_train, batch_size=64, validation_data=(x[held_out], y[held_out]), verbose=0)
    curve += history.history["val_accuracy"]
# The baseline is fitted to the pictures as they are: shifted ones make it worse.
plain = LogisticRegression(max_iter=2000).fit(pictures[known.cpu()] / 16, digits[known.cpu()])
baseline = plain.score(pictures[held_out.cpu()] / 16, digits[held_out.cpu()])
page.result("accuracy", curve[-1], {"logistic regression": baseline}, unit="%")

# %%
# Beside Keras' own layers
# ------------------------
# The same model with the layers of ``keras.layers`` and the same weights has the same scores.

layers = [keras.layers.LSTM(128, return_sequences=True), keras.layers.LSTM(128), keras.layers.Dense(10)]
theirs = build(keras.Sequential(layers), 1)
theirs(x[:1])
theirs.set_weights(model.get_weights())
print(f"largest difference of a score from keras.layers: {(theirs(x[held_out]) - model(x[held_out])).abs().max():.0e}")
some = slice(page.pick(640, 64))
models = {"keras.layers": theirs, "fastrnn.keras": model}
fits = {
    name: functools.partial(one.fit, x_train[some], y_train[some], batch_size=64, verbose=0) for name, one in models.items()
}
a, b = (seconds * len(x_train) / some.stop for seconds in page.seconds(fits, 8.0).values())
print(f"seconds per epoch of fit: keras.layers {a:.2f}, fastrnn.keras {b:.2f}: {page.faster(a, b)}")

# %%
# To PyTorch
# ----------
# The twin of the model, in ``examples/models.py``, gets its weights.

twin = to_pytorch(model)
with torch.no_grad():
    print(f"largest difference of a score from PyTorch: {(twin(x[held_out]) - model(x[held_out])).abs().max():.0e}")

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
axes.plot(range(1, epochs + 1), [100 * value for value in curve], label="LSTM")
axes.axhline(100 * baseline, color="grey", linestyle="--", label="logistic regression")
axes.set(xlabel="epoch", ylabel="recognised (%)", title="Held-out digits", ylim=(80, 100))
axes.legend()
page.save(figure)
