"""Who gets which width: targets, what each width would cost, the integer program, experts to drop, and estimates."""
