"""Training: fit, predict and evaluate, and what they are made of."""
