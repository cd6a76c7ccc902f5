"""What measures this project, its peers and its models for the reports. Run from a checkout; no wheel has it."""
