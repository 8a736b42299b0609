"""What a model is worth: scores with intervals, speed, int4 to compare with."""
