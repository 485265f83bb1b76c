"""Graphs whose blocks repeat, in a pipeline: cut, placed, and run a part at a time."""
