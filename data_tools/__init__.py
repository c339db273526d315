"""Making data sets: images to numbered PNGs, PNGs to latents, latents to packed files, and looking at the result.

source.py (what is read) and dest.py (what is written, whole or not at all) serve convert.py, encode.py, pack.py and inspect.py.
"""
