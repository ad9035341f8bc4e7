"""fastrnn beside torch.nn, onnxruntime and openvino: programs that each write a file of results; `report` reads them."""
