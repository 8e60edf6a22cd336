"""What runs a model: PyTorch, ONNX Runtime, TensorRT, the evaluator of the ONNX project."""
