"""What compressing writes to disk: the bundle, the journal for resuming a run, and the mark of its own directories."""
