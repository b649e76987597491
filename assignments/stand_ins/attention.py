"""In the project this file has faster forms of attention, and shows how it is written.

Here there is none: packed.py asks for none.
"""
