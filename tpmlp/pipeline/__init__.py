"""Pipelines: schedules as tables of tasks, what they cost, and what running them takes."""
