"""Large JPEG files, decoded at a reduced scale."""

from utils import open_image, read_image, to_rgb

# A reduced image is at least this many times as large as what it is resized to. Then the result
# differs by up to 0.2 of a level on average from that of the full image, by more than 1 in 0.2 %
# of the values (measured: benchmarks.md).
MIN_REMAINING_FACTOR = 4


class LargeJpeg:
    """A JPEG file in place of its PIL image, which is only decoded when it is resized.

    libjpeg decodes to a half, a quarter or an eighth of the size in a fraction of the time. How
    much the image may be reduced is only known when it is resized, and for which window.
    """

    def __init__(self, path, size):
        self.path, self.size = path, size   # width and height

    def resize(self, size, resample, box):
        """Resize a box (x_min, y_min, x_max, y_max) of the image, as `PIL.Image.resize()`."""
        factors = [(high - low) / side for low, high, side in zip(box[:2], box[2:], size)]
        reduction = max(1, int(min(factors) / MIN_REMAINING_FACTOR))

        def decode(image):
            """Decode at the smallest scale from 1 / reduction on."""
            image.draft(None, [max(1, side // reduction) for side in self.size])
            return to_rgb(image)

        image = open_image(self.path, decode)
        # The sizes are rounded up, so that the quotient is not the reduction itself.
        reduction = round(self.size[0] / image.width)
        return image.resize(size, resample, [corner / reduction for corner in box])

    def transform(self, *arguments):
        """Apply `PIL.Image.transform()`: without antialiasing single pixels count, so to all."""
        return read_image(self.path).transform(*arguments)


def read_or_postpone(path, size):
    """Read an RGB PIL image, or return a `LargeJpeg` if decoding it at a reduced scale may do.

    Args:
        path: the file.
        size: width and height that the image will be resized to.

    Raises:
        BrokenImageError: the file cannot be read; of a `LargeJpeg`, when it is resized.
    """
    def read(image):
        """Decide by the header."""
        is_jpeg = image.format in ('JPEG', 'MPO')   # many phones write MPO, with a preview
        is_large = min(image.size) >= 2 * MIN_REMAINING_FACTOR * size
        return LargeJpeg(path, image.size) if is_jpeg and is_large else to_rgb(image)
    return open_image(path, read)
