"""Triton kernels, each tested against its PyTorch reference. This file imports nothing: import the file that is needed."""
