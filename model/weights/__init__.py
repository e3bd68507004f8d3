"""Loading of models: from a hub id, a directory or a .gguf file to weights on the device."""
