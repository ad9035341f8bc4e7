"""Engines and the one definition of each cell. They know tensors and sizes, never modules or autograd."""
