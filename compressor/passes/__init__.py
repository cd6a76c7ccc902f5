"""Running calibration text through a model: the text, its hidden states, and a layer's forward and backward pass."""
