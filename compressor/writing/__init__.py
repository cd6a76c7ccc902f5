"""What compressing leaves on disk: the bundle, the journal of a run that can go on, and the mark of what is ours."""
