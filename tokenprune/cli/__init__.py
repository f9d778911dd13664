"""The `tokenprune` command."""
