"""Experiments, one question a file; `python -m experiments.train --help` shows the main job."""
