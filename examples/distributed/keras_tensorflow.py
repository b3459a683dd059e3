"""Train over processes with tf.distribute: each replica normalizes its part by the statistics of the whole batch.

TF_CONFIG says who takes part; each process has an index of its own. Without it one process trains alone, to the same
weights.

    export TF_CONFIG='{"cluster": {"worker": ["localhost:12345", "localhost:12346"]},
                       "task": {"type": "worker", "index": 0}}'
    python examples/distributed/keras_tensorflow.py
"""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf

from evennorm.keras import BatchNormalization

BATCH = 16

# A process that has lost the others ends with an error after this time, and does not wait for ever.
options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=60)
strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
keras.utils.set_random_seed(1)
rng = np.random.default_rng(0)
x = rng.normal(5.0, 2.0, (61, 8)).astype("float32")
y = np.sin(x.sum(1, keepdims=True)).astype("float32")

with strategy.scope():
    norm = BatchNormalization(momentum=0.5, activation="relu", synchronized=True)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4), norm, keras.layers.Dense(1)])
    optimizer = keras.optimizers.SGD(0.05)
    optimizer.build(model.trainable_variables)


def part(context):
    """Every process reads what is its own of each batch of 16; the last batch has 13."""
    everything = tf.data.Dataset.from_tensor_slices((x, y))
    own = everything.shard(context.num_input_pipelines, context.input_pipeline_id)
    return own.batch(context.get_per_replica_batch_size(BATCH))


@tf.function
def step(x, y):
    def on_replica(x, y):
        weights = [variable.value for variable in model.trainable_variables]
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((model(x, training=True) - y) ** 2) / BATCH
        optimizer.apply(tape.gradient(loss, weights), model.trainable_variables)
        return loss

    return strategy.reduce("sum", strategy.run(on_replica, (x, y)), axis=None)


for _ in range(2):
    for x_part, y_part in strategy.distribute_datasets_from_function(part):
        loss = step(x_part, y_part)
print("loss", float(loss))
for variable in (norm.gamma, norm.moving_mean, norm.moving_variance):
    print(variable.name, *np.asarray(variable))
