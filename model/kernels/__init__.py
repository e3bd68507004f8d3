"""Optional kernels, one package per platform. Without them XLA's own code runs."""
