"""How good a model is: scores with intervals, speed, and int4 models to compare with."""
