"""Calibration text on its way through a model: the text, the streams of hidden states, a layer forward and back."""
