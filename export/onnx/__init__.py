"""From a trace to an ONNX model at the opset that was asked for, and from that to files."""
