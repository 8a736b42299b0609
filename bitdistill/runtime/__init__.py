"""Inference from a packed file. Nothing here but cuda.py needs torch."""
