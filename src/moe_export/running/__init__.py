"""One artifact that runs: sessions of onnxruntime, engines on their GPU, inputs, times."""
