"""One training: the loop (train.py) and the spokes that it calls by name."""
