"""Files that Keras 1 and 2 wrote go in; Keras 3 models that predict the same come out, with a report of every layer."""
