"""Picture files of every kind that Pillow reads: which they are, and one as it should be seen.

sources/pictures.py decodes what is opened here; layouts and searches ask for EXTENSIONS.
"""

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

with contextlib.suppress(ImportError):  # then the pictures of iPhones are read as well
    import pillow_heif

    pillow_heif.register_heif_opener()

# What Pillow knows by name alone, or hands to another program: Ghostscript runs what an EPS says.
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}
EXTENSIONS = {x for x, kind in Image.registered_extensions().items() if kind not in NO_PICTURES}
HEIC = {".heic", ".heif"}  # of iPhones; where pillow-heif is not installed they cannot be read
HOW_TO_HEIC = ".heic needs pip install pillow-heif"
KINDS = [kind for kind in Image.ID if kind not in NO_PICTURES]
MAX_PIXELS = 100_000_000  # a larger picture is a decompression bomb, or no picture for 224 px
MAX_REDUCED = 400_000_000  # but for a telephone's JPEG, which can be decoded at 1/8 of its sides
Image.MAX_IMAGE_PIXELS = MAX_REDUCED // 2  # Pillow's own refusal comes at twice this


def open_picture(source: Path | bytes, near: int | None = None) -> Image.Image:
    """Reads a picture as it should be seen, in RGB; a JPEG in a size not below `near` pixels.

    EXIF rotation is applied, transparency laid on white, 16 bits scaled to 8, of an animation the
    first frame taken. Raises ValueError or OSError with a short reason when it cannot be read.
    """
    data = source if isinstance(source, bytes) else source.read_bytes()
    if not data:
        raise ValueError("empty file")
    with warnings.catch_warnings():  # Pillow's on odd metadata; the size is checked here
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=KINDS) as image:
            shown = f"{image.width} x {image.height} pixels"
            if image.width * image.height > MAX_PIXELS:
                if not isinstance(image, JpegImageFile):
                    raise ValueError(f"{shown} are too many")
                if image.info.get("progressive"):  # which is held whole while it is decoded
                    raise ValueError(f"{shown} are too many for a progressive JPEG")
                near = near or 2048
            if near:
                image.draft("RGB", (near, near))
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{shown} are too many")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode that Pillow reads to RGB without losing what is to be seen."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, np.float32))
        deep = image.mode.startswith("I;") or values.max() > 255
        top = 1 if image.mode == "F" and values.max() <= 1 else 65535 if deep else 255
        return Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def thumbnail(path: Path, size: int = 256) -> Image.Image:
    """A picture for a figure: as it should be seen, in its proportions, `size` pixels at most."""
    image = open_picture(path, size)
    image.thumbnail((size, size))
    return image
