"""What runs a model's networks: PyTorch as it is, and what is faster on some machine.

All compute the same `Comparison`; the resize before it and the map after it are one code for all. A calibration belongs
to the engine whose scores it was made of, and so decides which one inspects.
"""
