"""A run: its config, its folder, its model, its devices, and the sweep that it belongs to."""
