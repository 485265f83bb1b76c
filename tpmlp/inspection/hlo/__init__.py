"""The compiled program, read from its HLO text.

XLA's memory and cost statistics are structures that JAX exposes; its collectives and its schedule
are not, so they are read from text: here, and nowhere else in the package.
"""
