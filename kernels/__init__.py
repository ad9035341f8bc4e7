"""Engines and the one definition of each cell. They know tensors and sizes, not modules and autograd."""
