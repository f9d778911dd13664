"""What a pruned model answers: evaluation, metrics, and the check that pruning is exact."""
