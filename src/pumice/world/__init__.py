"""A rendered world with an exact scene graph, written in public file formats.

Imports `core` only; nothing but the command line and the tests imports it, so no library code can
know that the data is synthetic.
"""
