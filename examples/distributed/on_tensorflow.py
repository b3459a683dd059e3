"""Normalize a batch that lies in parts on several processes, with tf.distribute and without Keras.

TF_CONFIG says who takes part; each process has an index of its own. Without it one process holds the whole batch.

    export TF_CONFIG='{"cluster": {"worker": ["localhost:12345", "localhost:12346"]},
                       "task": {"type": "worker", "index": 0}}'
    python examples/distributed/on_tensorflow.py
"""

import numpy as np
import tensorflow as tf

from evennorm.tensorflow import synchronized

# A process that has lost the others ends with an error after this time, and does not wait for ever.
options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=60)
strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
x = np.random.default_rng(0).normal([5.0, 1e4], 2.0, (25, 2)).astype("float32")


def own(context):
    return tf.constant(x[context.replica_id_in_sync_group :: context.num_replicas_in_sync])


@tf.function
def normalized(x):
    return strategy.run(lambda x: synchronized.batch_norm(x, activation="relu"), (x,))


y, moments = normalized(strategy.experimental_distribute_values_from_function(own))
print("samples here", *strategy.experimental_local_results(y)[0].shape[:1])
for name in ("count", "mean", "variance"):
    (value,) = strategy.experimental_local_results(getattr(moments, name))
    print(name, *np.ravel(value))
