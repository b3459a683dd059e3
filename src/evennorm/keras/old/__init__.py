"""Convert files of Keras 1 and 2 to Keras 3 models with the same predictions, with a report of every layer."""
