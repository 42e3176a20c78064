"""graphopt: a compiler for exported ONNX models."""
