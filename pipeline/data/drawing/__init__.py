"""The hand that draws the procedural portraits."""
