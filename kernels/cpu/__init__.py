"""Compiled kernels for processors, by Numba alone; no compiler is needed. This file imports nothing: import the modules."""
