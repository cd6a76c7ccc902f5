"""From float32 matrices to codes: round to nearest, GPTQ, and whole layers through the model so far."""
