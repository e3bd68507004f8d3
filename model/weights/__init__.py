"""Where a model's weights come from: a hub id, a directory or a .gguf file in, arrays by target path out.

Knows names, shapes and file formats; no module of the network, no device and no request lives here.
"""
