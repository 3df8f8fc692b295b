"""The model as an ONNX graph, and its weights in the layout kernels read."""
