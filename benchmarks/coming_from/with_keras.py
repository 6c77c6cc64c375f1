"""The digits in Keras, on its torch backend: accuracy, validation, a schedule, saved weights."""

import os

os.environ["KERAS_BACKEND"] = "torch"  # before keras is imported

import keras
import numpy as np
from keras import layers

from nbdev_trainer import digits

keras.utils.set_random_seed(0)
images, labels = (tensor.numpy() for tensor in digits())
order = np.random.default_rng(0).permutation(len(images))
images, labels = images[order].transpose(0, 2, 3, 1), labels[order]  # channels last
train, valid = (images[360:], labels[360:]), (images[:360], labels[:360])

model = keras.Sequential([
    layers.Input((8, 8, 1)), layers.Conv2D(32, 3, padding="same", activation="relu"), layers.Flatten(), layers.Dense(10)
])
n_steps = 5 * -(-len(labels[360:]) // 64)
schedule = keras.optimizers.schedules.CosineDecay(
    initial_learning_rate=4e-4, warmup_target=1e-2, warmup_steps=n_steps // 4, decay_steps=n_steps - n_steps // 4)
model.compile(
    optimizer=keras.optimizers.AdamW(schedule),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
model.fit(*train, batch_size=64, epochs=5, validation_data=valid)
model.save_weights("digits.weights.h5")

loss, valid_accuracy = model.evaluate(*valid, verbose=0)
print(f"validation accuracy: {valid_accuracy:.4f}")
