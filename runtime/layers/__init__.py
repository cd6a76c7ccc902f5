"""What a layer is made of: one file a kind of attention or MLP, with its values, its tensors and its arithmetic.

A layer of a model is described by two of these values (`runtime/config.py`'s Layer); which family of models puts them
together how is in `runtime/models`. The arithmetic is the reference forward pass's part, in plain arrays.
"""
