"""What one device does: layers, the recursion over them, and what they cost."""
