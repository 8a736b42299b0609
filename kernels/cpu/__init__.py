"""Compiled kernels for processors: Numba only, no compiler needed. Inert: import the modules."""
