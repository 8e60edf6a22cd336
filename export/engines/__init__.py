"""TensorRT engines: built, and refusals told in the words of the model."""
