"""What packages of GPU kernels compute, as plain PyTorch with the same arguments, results and parameter names."""
