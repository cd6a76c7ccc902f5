"""The parts of a layer: one file per kind of attention or MLP, with its values, its tensors and its arithmetic.

Two of these values describe a layer of a model (`runtime/config.py`'s Layer); the families in `runtime/models` choose
them. The arithmetic is that of the reference forward pass, in plain arrays.
"""
