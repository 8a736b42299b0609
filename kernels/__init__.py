"""Mathematics on arrays: quantizers, ternary products, packing. See docs/design.md.

Kept inert on purpose: with the repository root on sys.path, transformers imports this folder as the unrelated
third-party package ``kernels``, so nothing may be imported, registered or named here.
"""
