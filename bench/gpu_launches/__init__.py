"""How the kernels of kernels/gpu are launched in production, one file here for each file there. bench/gpu_compile.py
compiles these launches."""
