"""Inference from a packed file. Only cuda.py needs torch."""
