"""The network: arrays in, arrays out. Knows no requests, buckets or HTTP.

Axis letters: R rows, T tokens of one row, D hidden size, F MLP size, H query heads, K key/value heads,
G = H / K query heads per key/value head, E head size, V vocabulary, L layers, N pages, S tokens of a page,
P pages of one row's block table.
"""
