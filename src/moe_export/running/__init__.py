"""Running one artifact: onnxruntime sessions, engines on their GPU, inputs, timings."""
