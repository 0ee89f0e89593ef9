"""From a PyTorch network to files that a phone runs, and the proof that they compute the same.

`lowering` makes the plain network that everything here starts from; `tflite` and `onnx` convert it; `quantize` makes
int8, dynamic and float16 files; `runtimes` runs any of them; `inspect` counts what is inside; `metadata` is what a
file says about itself; `verify` compares files with the network and with each other.
"""
