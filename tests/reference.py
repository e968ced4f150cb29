"""Slow and obvious versions that several test files compare with."""


def jaccard_overlap(box, other):
    """Compute the Jaccard overlap of two boxes, number by number."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    if width <= 0 or height <= 0:
        return 0.
    areas = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
    return width * height / (areas - width * height)
