"""Tensor parallel, pipeline parallel and their mixtures: the same model, batch and devices."""
