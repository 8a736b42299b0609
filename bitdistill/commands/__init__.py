"""One file for each command of `bitdistill`, or for two that belong together. cli.py lists them."""
