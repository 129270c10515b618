"""Pictures of every kind are read as they look; the cache is whole or absent; augmentation."""

import hashlib
import io
import itertools
import multiprocessing
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_photos
from PIL import Image, ImageFile

from sources import augment as augmenting
from sources import pictures
from sources.augment import Augmentation, augment, resize
from sources.pictures import cached_pixels, decode
from support.command import UserError

RED, GREEN, BLUE, WHITE = (200, 30, 30), (30, 160, 60), (30, 60, 200), (240, 240, 240)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def assert_flat(data: bytes, colour, within: int = 1):
    pixels = decode(data, 8)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - np.array(colour)).max() <= within


# -------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP"])
def test_plain_rgb(kind):
    assert_flat(saved(Image.new("RGB", (20, 13), RED), kind, lossless=True), RED)


def test_jpeg_and_path(tmp_path):
    (tmp_path / "a.jpg").write_bytes(saved(Image.new("RGB", (900, 700), RED), "JPEG"))
    assert np.abs(decode(tmp_path / "a.jpg", 8).astype(int) - RED).max() <= 3


def test_the_whole_picture_is_squashed_to_a_square():
    left, right = Image.new("RGB", (60, 10), RED), Image.new("RGB", (60, 10), BLUE)
    wide = Image.new("RGB", (120, 10))
    wide.paste(left, (0, 0))
    wide.paste(right, (60, 0))
    pixels = decode(saved(wide, "PNG"), 12)
    assert (pixels[:, :4] == RED).all() and (pixels[:, 8:] == BLUE).all()


def test_cmyk():
    assert_flat(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF"), (255, 0, 0))
    assert_flat(saved(Image.new("CMYK", (16, 16), (0, 0, 0, 255)), "TIFF"), (0, 0, 0))
    jpeg = saved(Image.new("CMYK", (64, 64), (255 - 200, 255 - 30, 255 - 30, 0)), "JPEG")
    assert Image.open(io.BytesIO(jpeg)).mode == "CMYK"
    assert_flat(jpeg, RED, within=4)


def test_grey_and_one_bit():
    assert_flat(saved(Image.new("L", (9, 9), 77), "PNG"), (77, 77, 77))
    assert_flat(saved(Image.new("1", (9, 9), 1), "PNG"), (255, 255, 255))


@pytest.mark.parametrize(
    ("value", "grey"), [(0, 0), (200, 0), (257 * 90, 90), (32768, 127), (65535, 255)]
)
def test_16_bit_grey(value, grey):
    data = saved(Image.fromarray(np.full((12, 10), value, np.uint16)), "PNG")
    assert Image.open(io.BytesIO(data)).mode.startswith("I;16")
    assert_flat(data, (grey,) * 3)


def test_32_bit_integers():
    for value, grey in ((90, 90), (257 * 90, 90)):
        ramp = np.full((12, 10), value, np.int32)
        assert_flat(saved(Image.fromarray(ramp), "TIFF"), (grey,) * 3)


@pytest.mark.parametrize(("value", "grey"), [(0.25, 64), (1.0, 255), (100.0, 100), (-3.0, 0)])
def test_float_tiff(value, grey):
    data = saved(Image.fromarray(np.full((12, 10), value, np.float32)), "TIFF")
    assert Image.open(io.BytesIO(data)).mode == "F"
    assert_flat(data, (grey,) * 3)


def test_float_tiff_with_a_hole():
    values = np.full((16, 16), 0.5, np.float32)
    values[:8] = np.nan
    pixels = decode(saved(Image.fromarray(values), "TIFF"), 16)
    assert np.abs(pixels[10:].astype(int) - 127).max() <= 1 and pixels[:6].max() == 0


def test_palette_with_and_without_transparency():
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([*BLUE, *RED])
    assert_flat(saved(palette, "PNG"), RED)
    palette.paste(0, (0, 0, 16, 8))
    pixels = decode(saved(palette, "PNG", transparency=0), 16)
    assert (pixels[:6] == 255).all() and (pixels[10:] == RED).all()
    shades = bytes([255, 128])  # a half transparent entry
    pixels = decode(saved(palette, "PNG", transparency=shades), 16)
    assert (pixels[:6] == BLUE).all()
    assert np.abs(pixels[10:].astype(int) - [228, 142, 142]).max() <= 2


def test_alpha_is_laid_on_white():
    assert_flat(saved(Image.new("RGBA", (9, 9), (*RED, 255)), "PNG"), RED)
    assert_flat(saved(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), "PNG"), (255, 255, 255))
    assert_flat(saved(Image.new("RGBA", (9, 9), (255, 0, 0, 128)), "PNG"), (255, 127, 127))
    assert_flat(saved(Image.new("LA", (9, 9), (0, 0)), "PNG"), (255, 255, 255))
    assert_flat(saved(Image.new("LA", (9, 9), (100, 255)), "PNG"), (100, 100, 100))
    assert_flat(saved(Image.new("RGB", (9, 9), RED), "PNG", transparency=RED), (255, 255, 255))


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (12, 12), colour) for colour in (GREEN, RED, BLUE)]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(data)).n_frames == 3
        assert_flat(data, GREEN)


def seen(stored: np.ndarray, orientation: int) -> np.ndarray:
    """The EXIF standard's eight orientations, written out with numpy."""
    return {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),  # its right side is up: turn it clockwise
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored, 1),
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    corners = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8)
    stored = Image.fromarray(corners.repeat(48, 0).repeat(64, 1))  # 128 wide, 96 high
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(saved(stored, "JPEG", exif=exif, quality=95), 8)
    expected = seen(corners, orientation)
    got = pixels[[[1, 1], [6, 6]], [[1, 6], [1, 6]]]
    assert np.abs(got.astype(int) - expected).max() <= 12


@pytest.mark.parametrize(
    "exif", [b"garbage", b"II*\0\xff\xff\xff\xff", b"", b"MM\0*\0\0\0\x08\xff"]
)
def test_broken_exif_does_no_harm(exif):
    assert_flat(saved(Image.new("RGB", (32, 32), RED), "JPEG", exif=b"Exif\0\0" + exif), RED, 4)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60_000, 60_000), (12_000, 9_000), (1, 150_000_000)])
def test_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, size):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("unpacked"))
    path = tmp_path / "bomb.png"
    path.write_bytes(png_claiming(*size))
    pixels, reason = pictures.try_decode(path, 8)
    assert pixels is None and "pixels" in reason


def test_what_cannot_be_read_says_why(tmp_path):
    jpeg = saved(Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG")
    png = saved(Image.effect_noise((64, 64), 80), "PNG")
    broken = {
        "empty.jpg": (b"", "empty"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut.png": (png[: len(png) // 2], ""),
        "text.jpg": (b"<html>404 not found</html>", "not a picture"),
        "zeros.png": (bytes(500), "not a picture"),
        "header.gif": (b"GIF89a", ""),
        "damaged.png": (png[:60] + bytes(40) + png[100:], ""),
    }
    for name, (data, problem) in broken.items():
        (tmp_path / name).write_bytes(data)
        pixels, reason = pictures.try_decode(tmp_path / name, 8)
        assert pixels is None, name
        assert reason and problem in reason and "\n" not in reason and len(reason) <= 80, name
    pixels, reason = pictures.try_decode(tmp_path / "missing.jpg", 8)
    assert pixels is None and "No such file" in reason


# ----------------------------------------------------------------------------------- cache


@pytest.fixture
def files(tmp_path) -> list[Path]:
    folder = tmp_path / "pictures"
    return [folder / name for name in write_photos(folder, 6)]


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the files that have been decoded."""
    done, real = [], pictures.try_decode

    def count(path, size):
        done.append(path.name)
        return real(path, size)

    monkeypatch.setattr(pictures, "try_decode", count)
    return done


def test_cache_holds_the_decoded_pictures(tmp_path, files):
    files[2].write_bytes(b"no picture")
    cached = cached_pixels(files, 16, tmp_path / "cache", 0)
    assert cached.pixels.shape == (6, 16, 16, 3) and cached.pixels.dtype == np.uint8
    for row, path in enumerate(files):
        if row == 2:
            assert cached.digests[row] is None and cached.failed == {2: "not a picture"}
        else:
            assert np.array_equal(cached.pixels[row], decode(path, 16))
            assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(cached.digests[row])
            assert len(cached.digests[row]) >= 32


def test_each_picture_is_decoded_once(tmp_path, files, decoded):
    first = cached_pixels(files, 16, tmp_path / "cache", 0)
    assert decoded == [path.name for path in files]
    again = cached_pixels(files, 16, tmp_path / "cache", 0)
    assert len(decoded) == 6 and np.array_equal(first.pixels, again.pixels)
    assert again.digests == first.digests
    cached_pixels(files, 24, tmp_path / "cache", 0)
    assert len(decoded) == 12
    cached_pixels(files, 16, tmp_path / "cache", 0)  # the other size did not push it out
    assert len(decoded) == 12


def test_a_changed_file_is_decoded_again_even_with_its_old_size_and_time(tmp_path, files, decoded):
    first = cached_pixels(files, 16, tmp_path / "cache", 0)
    before, stat = np.array(first.pixels), files[1].stat()
    other = saved(Image.new("RGB", (20, 20), RED), "JPEG")
    assert len(other) < stat.st_size
    files[1].write_bytes(other + bytes(stat.st_size - len(other)))
    os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert files[1].stat().st_size == stat.st_size
    assert files[1].stat().st_mtime_ns == stat.st_mtime_ns
    second = cached_pixels(files, 16, tmp_path / "cache", 0)
    assert np.abs(second.pixels[1].astype(int) - RED).max() <= 4
    assert np.array_equal(np.delete(second.pixels, 1, 0), np.delete(before, 1, 0))
    assert second.digests[1] != first.digests[1]
    assert len(list((tmp_path / "cache").glob("pixels-16-*"))) == 1  # it replaced the old one


def test_worker_processes_give_the_same(tmp_path, files, monkeypatch):
    files[4].write_bytes(b"no picture")
    alone = cached_pixels(files, 16, tmp_path / "one", 0)
    monkeypatch.setattr(pictures, "DECODE_IN_PROCESS", 2)
    many = cached_pixels(files, 16, tmp_path / "two", 2)
    assert np.array_equal(alone.pixels, many.pixels)
    assert (alone.digests, alone.failed) == (many.digests, many.failed)


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), OSError(28, "full")])
def test_a_build_that_fails_leaves_nothing(tmp_path, files, monkeypatch, error):
    real, cache = pictures.try_decode, tmp_path / "cache"

    def fail(path, size):
        if path == files[3]:
            raise error
        return real(path, size)

    with monkeypatch.context() as patched:
        patched.setattr(pictures, "try_decode", fail)
        with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
            cached_pixels(files, 16, cache, 0)
    assert list(cache.iterdir()) == []
    assert cached_pixels(files, 16, cache, 0).pixels.shape[0] == 6


def test_a_killed_build_is_swept_away_a_day_later(tmp_path, files):
    cache = tmp_path / "cache"
    for name in ("old", "new", "other"):
        (cache / f".building-{name}").mkdir(parents=True)
    os.utime(cache / ".building-old", (1, 1))
    (cache / ".building-gone").symlink_to("nowhere")  # as one that vanishes while it is looked at
    cached_pixels(files, 16, cache, 0)
    left = {path.name for path in cache.glob(".building-*")}
    assert left == {".building-new", ".building-other", ".building-gone"}


def build_both(paths, cache, barrier, out):
    real = pictures.write_pixels

    def together(*words):
        barrier.wait(20)  # neither starts before the other has found no cache
        real(*words)
        barrier.wait(20)  # nor takes its place before the other is done

    pictures.write_pixels = together  # only in this forked process
    cached = cached_pixels(paths, 16, cache, 0)
    out.put((cached.pixels.tobytes(), cached.digests))


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_two_processes_build_the_same_at_once(tmp_path, files):
    context = multiprocessing.get_context("fork")
    barrier, out = context.Barrier(2), context.Queue()
    words = (files, tmp_path / "cache", barrier, out)
    both = [context.Process(target=build_both, args=words) for _ in range(2)]
    for process in both:
        process.start()
    results = [out.get(timeout=30) for _ in both]
    for process in both:
        process.join(30)
    assert [process.exitcode for process in both] == [0, 0]
    assert results[0] == results[1]
    assert results[0][0] == b"".join(decode(path, 16).tobytes() for path in files)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_unwritable_cache_is_a_user_error(tmp_path, files):
    (tmp_path / "file").write_text("here")
    places = [tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)]
    if Path("/proc/self").exists():
        places.append(Path("/proc/cache"))
    for cache in places:
        with pytest.raises(UserError, match=r"cannot write the cache .*--cache"):
            cached_pixels(files, 16, cache, 0)


def test_permission_denied_is_a_user_error(tmp_path, files, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        cached_pixels(files, 16, tmp_path / "cache", 0)


def test_full_disk_is_a_user_error(tmp_path, files, monkeypatch, decoded):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(pictures.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"MB free.*--cache") as caught:
        cached_pixels(files, 16, tmp_path / "cache", 0)
    assert str(tmp_path / "cache") in str(caught.value)
    assert decoded == [] and list((tmp_path / "cache").iterdir()) == []


# ------------------------------------------------------------------------------ whole batches


def noise(count: int, size: int) -> torch.Tensor:
    chosen = torch.Generator().manual_seed(9)
    return torch.randint(0, 256, (count, size, size, 3), generator=chosen, dtype=torch.uint8)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_resize_of_the_same_size_only_scales():
    pixels = noise(3, 12)
    out = resize(pixels, 12)
    assert out.shape == (3, 3, 12, 12) and out.dtype == torch.float32
    assert np.allclose(out.numpy(), pixels.numpy().transpose(0, 3, 1, 2) / 255, atol=1e-6)


@pytest.mark.parametrize("size", [8, 12, 31])
def test_resize_agrees_with_pillow(size):
    flat = torch.tensor(RED, dtype=torch.uint8).expand(2, 12, 12, 3)
    assert np.allclose(resize(flat, size).permute(0, 2, 3, 1), np.array(RED) / 255, atol=1e-5)
    pixels = noise(2, 20)
    out = resize(pixels, size).permute(0, 2, 3, 1).numpy() * 255
    for got, source in zip(out, pixels.numpy(), strict=True):
        expected = Image.fromarray(source).resize((size, size), Image.Resampling.BILINEAR)
        assert np.abs(got - np.asarray(expected)).max() <= 1.5


def test_augment_none_is_resize():
    pixels = noise(3, 16)
    for size in (16, 12):
        assert torch.equal(augment(pixels, size, "none", seeded()), resize(pixels, size))


@pytest.mark.parametrize("level", ["light", "strong"])
def test_augment_is_seeded_changes_and_stays_in_range(level):
    pixels = noise(8, 20)
    for size in (20, 16, 32):
        out = augment(pixels, size, level, seeded())
        assert out.shape == (8, 3, size, size) and out.dtype == torch.float32
        assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1
        assert torch.equal(out, augment(pixels, size, level, seeded()))
        assert not torch.equal(out, augment(pixels, size, level, seeded(2)))
        assert (out - resize(pixels, size)).abs().mean() > 0.02
    same = augment(pixels[:1].expand(8, -1, -1, -1), 20, level, seeded())
    assert all((a - b).abs().max() > 0.01 for a, b in itertools.combinations(same, 2))


def test_strong_changes_more_than_light():
    flat = torch.full((200, 8, 8, 3), 128, dtype=torch.uint8)
    light, strong = (augment(flat, 8, name, seeded()).std() for name in ("light", "strong"))
    assert strong > 1.5 * light > 0


@pytest.mark.parametrize("level", ["light", "strong"])
def test_about_half_are_mirrored(level):
    pixels = torch.zeros(600, 16, 16, 3, dtype=torch.uint8)
    pixels[:] = torch.linspace(20, 235, 16).to(torch.uint8)[None, None, :, None]
    out = augment(pixels, 16, level, seeded())
    mirrored = (out[..., :8].mean((1, 2, 3)) > out[..., 8:].mean((1, 2, 3))).sum().item()
    assert 240 < mirrored < 360


def with_draws(monkeypatch, level: Augmentation, draws: list[float]) -> None:
    """Level `fixed`, whose random numbers are `draws`: area, ratio, left, top, (flip,) angle."""
    monkeypatch.setitem(augmenting.AUGMENTATIONS, "fixed", level)
    left = iter(draws)
    monkeypatch.setattr(torch, "rand", lambda count, generator: torch.full((count,), next(left)))


def test_the_identity_map_gives_the_picture(monkeypatch):
    pixels = noise(3, 14)
    with_draws(monkeypatch, Augmentation(flip=True), [0.5] * 6)
    assert torch.allclose(augment(pixels, 14, "fixed", seeded()), resize(pixels, 14), atol=1e-4)


def test_the_mirrored_identity(monkeypatch):
    pixels = noise(3, 14)
    with_draws(monkeypatch, Augmentation(flip=True), [0.5] * 4 + [0.2, 0.5])
    expected = resize(pixels, 14).flip(-1)
    assert torch.allclose(augment(pixels, 14, "fixed", seeded()), expected, atol=1e-4)


@pytest.mark.parametrize(("left", "top"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_a_crop_of_a_quarter_is_those_pixels(monkeypatch, left, top):
    pixels = noise(2, 16)
    with_draws(monkeypatch, Augmentation(area=0.25), [0, 0.5, left, top, 0.5])
    out = augment(pixels, 8, "fixed", seeded())
    expected = resize(pixels, 16)[:, :, 8 * top : 8 * top + 8, 8 * left : 8 * left + 8]
    assert torch.allclose(out, expected, atol=1e-4)


def test_a_quarter_turn(monkeypatch):
    pixels = noise(2, 16)
    with_draws(monkeypatch, Augmentation(rotate=90), [0.5] * 4 + [1.0])
    out, plain = augment(pixels, 16, "fixed", seeded()), resize(pixels, 16)
    turns = [torch.rot90(plain, k, (2, 3)) for k in (1, 3)]
    assert any(torch.allclose(out, turn, atol=1e-3) for turn in turns)


def test_crops_never_leave_the_picture(monkeypatch):
    """Without rotation no border is made up: a bright frame around black is seen as it is."""
    monkeypatch.setitem(augmenting.AUGMENTATIONS, "crop", Augmentation(area=0.35))
    ramp = torch.arange(32, dtype=torch.uint8).mul(8)
    across = ramp[None, None, :, None].expand(300, 32, 32, 3).contiguous()
    out = augment(across, 32, "crop", seeded())
    step = out[..., 1:] - out[..., :-1]
    assert step.min() > -1e-5  # reflected pixels would turn the ramp around
    span = (out[..., -1] - out[..., 0]).mean((1, 2)) * 255 / 248  # the width of each crop
    assert 0.4 < span.min() < 0.65 and span.max() > 0.9


def test_tint():
    images, one, off = resize(noise(2, 8), 8), torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    assert torch.allclose(augmenting.tint(images, one, one, one), images, atol=1e-6)
    assert torch.allclose(augmenting.tint(images, one / 2, one, one), images / 2, atol=1e-6)
    grey = augmenting.tint(images, one, one, off)
    assert torch.allclose(grey[:, 0], grey[:, 2]) and grey[:, 0].std() > 0.05
    assert augmenting.tint(images, one, off, one).std((1, 2, 3)).max() < 1e-5


def test_mirror_shows_the_picture_or_its_mirror_image():
    pixels = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (40, 24, 24, 3)).astype("u1")
    )
    shown = augment(pixels, 24, "mirror", seeded())
    plain = resize(pixels, 24)
    mirrored = 0
    for image, expected in zip(shown, plain, strict=True):
        flipped = torch.allclose(image, expected.flip(2), atol=1e-5)
        assert flipped or torch.allclose(image, expected, atol=1e-5)
        mirrored += flipped
    assert 8 < mirrored < 32
