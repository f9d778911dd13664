"""What touches a model: hooks that prune visual tokens inside an unmodified decoder."""
