"""Calibrating the rules by which a request may leave out a token's lighter experts."""
