"""For each file of kernels/gpu, how its kernels are launched in production: what bench/gpu_compile.py compiles."""
