"""What pruning saves, measured on random weights."""
