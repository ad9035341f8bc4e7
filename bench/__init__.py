"""fastrnn beside torch.nn, onnxruntime and openvino: `python -m bench.run`, `.memory`, `.startup`, then `.report`."""
