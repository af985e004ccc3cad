"""Models that are graphs of operators (ONNX): recurrent nodes found, compressed and replaced, all else as it was."""
