"""Trained networks as files: packed (`trainables.packed` reads them), ONNX, and torch's own programs.

Where to find what:

    what every export starts from    coded
    packed                           packed_writer, packed_header, packed_network, bit_packing
    ONNX                             onnx_file, onnx_graph, onnx_constants, onnx_quantizers, onnx_pruning
    torch                            program_file
"""
