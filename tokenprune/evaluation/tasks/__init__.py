"""Tasks of ours for lmms-eval, and what they need."""
