MIN_RESOLUTION = 32


def perceptual_hash(image):
    return 0


def near_duplicate_groups(h, i):
    import numpy as np

    return np.arange(len(h))


def join_groups(p, g):
    return p


def report(a, b):
    return {"groups": [], "images": 0}
