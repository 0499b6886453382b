"""What TensorRT's ONNX parser would refuse, found without TensorRT: a table of operators and small
rules."""
