"""What fastrnn looks like in use."""
