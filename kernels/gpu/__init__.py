"""Triton kernels, each beside its PyTorch reference. Inert: import the file that is needed."""
