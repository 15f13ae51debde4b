"""The report of one training run: its journal read back, and the page that is made of it."""
