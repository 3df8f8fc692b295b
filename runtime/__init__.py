"""Runs engines: pages, packing, scheduling, sampling, text."""
