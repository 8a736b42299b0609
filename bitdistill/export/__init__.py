"""Files that a trained student leaves this project in, and the proof that they hold what was trained.

packed.py writes and reads the packed file; parity.py loads one back and compares it with the model of training.
"""
