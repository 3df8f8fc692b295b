"""Builders that turn a bundle into something a machine can run, and the memory planner."""
