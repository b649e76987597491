"""In the project this file makes products of few rows faster, and shows how a norm is written.

Here it changes nothing.
"""
MATRICES = ("qkv", "o", "gate_up", "down")               # of a layer


def is_x86(device):
    return False


def has_arithmetic(dtype):
    return False


def choose_form(device, dtype):
    return lambda linear: linear


def pack(model):
    return model


def choose_threads(model):
    pass
