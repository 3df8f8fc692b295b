"""Turns any operator of the project into a TensorRT plugin."""
