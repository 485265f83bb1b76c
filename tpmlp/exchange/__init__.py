"""Weights in and out: files that other programs read, and a hash that says what is in them."""
