"""Measurements of this project, its peers and its models for the reports. Run from a checkout; not part of wheels."""
