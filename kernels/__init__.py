"""Mathematics on arrays: quantizers, ternary products, packing. See docs/design.md.

This file does nothing on purpose. With the repository root on sys.path, transformers imports this folder as the unrelated
third-party package ``kernels``, so nothing may be imported, registered or named here.
"""
