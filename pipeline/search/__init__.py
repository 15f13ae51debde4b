"""Searching for the best settings of a run: what may be drawn, what was drawn, what came of it."""
