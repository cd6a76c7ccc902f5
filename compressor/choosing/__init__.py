"""Choosing the widths: size targets, the cost of each width, the integer program, experts to drop, and estimates."""
