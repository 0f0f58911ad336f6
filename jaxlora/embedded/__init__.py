"""The embedded default: a tiny Qwen3 base, its tokenizer and its data, shipped with the package.

Configurations name these files with the prefix `embedded:` (see `jaxlora.runtime.remote.resolve`), so that
the tiny job needs no download. The modules here generate them.
"""
