"""Where weights come from: checkpoints, their formats, and the files that bundles take over. Nothing here writes."""
