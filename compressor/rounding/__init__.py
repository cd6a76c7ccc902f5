"""Rounding float32 matrices to codes: round to nearest, GPTQ, and layer by layer on the compressed model's inputs."""
