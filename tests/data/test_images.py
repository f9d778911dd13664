"""Pictures keep their grey levels, their orientation and their colours, or are refused."""

from __future__ import annotations

import io
import re
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from readers import READERS

from tokenprune.cli import main as cli
from tokenprune.data import FolderDataset, HubDataset
from tokenprune.data.images import read_image
from tokenprune.data.sample import Sample

RAMP = np.arange(65536).reshape(256, 256).astype("u2")


def encoded(picture: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def levels(data: bytes) -> np.ndarray:
    """The red channel of a file, int (rows, columns); a grey picture has no other."""
    picture = read_image(io.BytesIO(data))
    assert picture.mode == "RGB"
    return np.asarray(picture)[..., 0].astype(int)


def tiff(
    values: list, code: str, bits: int, *, kind: int = 1, photometric: int = 1, order: str = "<"
) -> bytes:
    """A TIFF file of one row: kind 1 is unsigned, 2 signed, 3 floating-point."""
    data = struct.pack(f"{order}{len(values)}{code}", *values)
    data += b"\0" * (len(data) % 2)
    fields = {256: len(values), 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1}
    fields |= {278: 1, 279: len(data), 339: kind}
    whole = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data)) + data
    whole += struct.pack(f"{order}H", len(fields))
    for tag, value in fields.items():
        whole += struct.pack(f"{order}HHII", tag, 4, 1, value)
    return whole + b"\0" * 4


def png(width: int, height: int, bits: int, colours: int, data: bytes = b"") -> bytes:
    """A PNG file; colours 0 is grey, 2 is RGB, 4 is grey with alpha."""

    def chunk(name: bytes, own: bytes) -> bytes:
        return struct.pack(">I", len(own)) + name + own + struct.pack(">I", zlib.crc32(name + own))

    head = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def fits(values: list[int]) -> bytes:
    """A FITS file of one row, whose 16 bits are signed."""
    cards = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": len(values), "NAXIS2": 1}
    head = "".join(f"{name:8}= {value:>20}".ljust(80) for name, value in cards.items())
    data = struct.pack(f">{len(values)}h", *values)
    return (head + "END").ljust(2880).encode() + data.ljust(2880, b"\0")


# ---------------------------------------------------------------------------------- grey levels, e1

SIXTEEN = {
    "png": partial(encoded, form="PNG"),
    "tiff": partial(encoded, form="TIFF"),
    "packed tiff": partial(encoded, form="TIFF", compression="tiff_deflate"),
    "jpeg 2000": partial(encoded, form="JPEG2000"),
    "pgm": partial(encoded, form="PPM"),
}


@pytest.mark.parametrize("form", SIXTEEN)
def test_e1_grey_levels_of_16_bits_are_scaled(form):
    shown = levels(SIXTEEN[form](Image.fromarray(RAMP)))
    assert np.abs(shown - RAMP / 257).max() <= 0.5
    # A dark picture stays dark: the range is the file's, not the picture's.
    assert levels(SIXTEEN[form](Image.fromarray(RAMP // 16))).max() == 16


KNOWN = {
    "tiff": (tiff([0, 2570, 32768, 65535], "H", 16), [0, 10, 128, 255]),
    "big-endian": (tiff([0, 2570, 32768, 65535], "H", 16, order=">"), [0, 10, 128, 255]),
    "white is 0": (tiff([0, 2570, 32768, 65535], "H", 16, photometric=0), [255, 245, 127, 0]),
    "8 bits": (tiff([0, 10, 128, 255], "B", 8, photometric=0), [255, 245, 127, 0]),
    "floats": (tiff([0, 0.25, 0.5, 1], "f", 32, kind=3), [0, 64, 128, 255]),
    "big-endian floats": (tiff([0, 0.25, 1], "f", 32, kind=3, order=">"), [0, 64, 255]),
    "floats, white is 0": (tiff([0, 0.25, 1], "f", 32, kind=3, photometric=0), [255, 191, 0]),
    "pgm": (b"P5 4 1 4095\n" + struct.pack(">4H", 0, 1, 2048, 4095), [0, 0, 128, 255]),
    "plain pgm": (b"P2 4 1 1000\n0 1 500 1000\n", [0, 0, 128, 255]),
    "colours": (png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 65535, 0, 0, 2313, 0, 0)), [255, 9]),
    "alpha": (png(2, 1, 16, 4, b"\0" + struct.pack(">4H", 65535, 0, 2313, 0)), [255, 9]),
    "2 bits": (png(4, 1, 2, 0, b"\0\x1b"), [0, 85, 170, 255]),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_e1_levels_are_those_of_the_file(kind):
    data, shown = KNOWN[kind]
    assert levels(data).tolist() == [shown]


def test_e1_levels_of_12_bits_have_their_own_white():
    data = tiff([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x64], "B", 12)  # 0, 4095, 2048, 100
    narrow = data.replace(struct.pack("<HHII", 256, 4, 1, 6), struct.pack("<HHII", 256, 4, 1, 4))
    assert levels(narrow).tolist() == [[0, 255, 128, 6]]


UNKNOWN = {
    "signed": (tiff([0, 1, -5], "h", 16, kind=2), "signed grey levels"),
    "signed, 32 bits": (tiff([0, 1, -5], "i", 32, kind=2), "signed grey levels"),
    "signed, 8 bits": (tiff([0, 1, -5, 7], "b", 8, kind=2), "signed grey levels"),
    "32 bits": (tiff([0, 1, 70000], "I", 32), "mode I from 0 to 70000, of which it is unknown"),
    "bytes as floats": (tiff([0, 1, 255], "f", 32, kind=3), "levels from 0 to 255, of which"),
    "negative": (tiff([0, 1, -0.1], "f", 32, kind=3), "levels from -0.1 to 1, of which"),
    "no number": (tiff([0, float("nan")], "f", 32, kind=3), "levels from nan to nan"),
    "fits": (fits([0, 1, -5]), "FITS levels of mode I;16"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_e1_levels_without_a_known_white_are_refused(kind):
    data, told = UNKNOWN[kind]
    with pytest.raises(ValueError, match=told):
        read_image(io.BytesIO(data))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_e1_deep_pictures_are_turned_like_others(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    deep = np.array([[0, 65535, 0], [0, 0, 25700]], "u2")
    shown = levels(encoded(Image.fromarray(deep), form, exif=exif))
    plain = Image.fromarray((deep // 257).astype("u1"))
    assert shown.tolist() == levels(encoded(plain, form, exif=exif)).tolist()
    assert shown.shape == ((2, 3) if orientation < 5 else (3, 2))


ROWS = [{"image": "deep.png", "question": "q", "answer": "x"}]


@pytest.mark.parametrize("reader", READERS)
def test_e1_every_reader_scales(reader, tmp_path):
    folder = tmp_path / "d"
    inner = {"image folder of csv": "test", "image folder of lines": "test"}.get(reader, "")
    inner = "pictures" if reader.startswith("hub folder") else inner
    # `save_to_disk` wants its folder to itself.
    if reader == "saved":
        data = READERS[reader](folder, [ROWS[0] | {"image": "a.png"}])
        Image.fromarray(RAMP).save(folder / "a.png", "PNG")
    else:
        (folder / inner).mkdir(parents=True)
        Image.fromarray(RAMP).save(folder / inner / "deep.png")
        data = READERS[reader](folder, ROWS)
    shown = np.asarray(data[0].image).astype(int)
    assert np.abs(shown - RAMP[..., None] / 257).max() <= 0.5


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_e1_embedded_pictures_are_scaled(form, tmp_path):
    import datasets

    data = encoded(Image.fromarray(RAMP), form)
    kinds = {"image": datasets.Image(), "question": datasets.Value("string")}
    cells = {"image": [{"bytes": data, "path": None}, RAMP], "question": ["q"] * 2}
    whole = datasets.Dataset.from_dict(cells, datasets.Features(kinds))
    whole.add_column("answer", ["x"] * 2).to_parquet(tmp_path / "rows.parquet")
    for sample in HubDataset(str(tmp_path / "rows.parquet")):
        assert np.abs(np.asarray(sample.image)[..., 0] - RAMP / 257).max() <= 0.5


def test_e1_fetched_pictures_are_scaled(tmp_path, served):
    folder, address = served
    Image.fromarray(RAMP).save(folder / "deep.png")
    rows = [ROWS[0] | {"image": f"{address}/{name}"} for name in ("deep.png", "gone.png")]
    data = READERS["hub lines"](tmp_path / "d", rows)
    assert np.abs(np.asarray(data[0].image)[..., 0] - RAMP / 257).max() <= 0.5
    with pytest.raises(ValueError, match=r"row 2: expected an image that Pillow reads, got http"):
        data[1]


# ----------------------------------------------------------------------------------- other pictures


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "PA"])
def test_colours_are_as_pillow_converts_them(mode):
    generator = np.random.default_rng(0)
    colours = Image.fromarray(generator.integers(0, 256, (6, 5, 4), "u1"), "RGBA")
    picture = (
        colours.convert("RGB").convert(mode) if mode in ("1", "CMYK") else colours.convert(mode)
    )
    form = "TIFF" if mode in ("CMYK", "PA") else "PNG"
    data = encoded(picture, form)
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(opened.convert("RGB"))
    assert (np.asarray(read_image(io.BytesIO(data))) == expected).all()


def test_transparent_pixels_keep_the_colour_under_them():
    picture = Image.new("RGBA", (1, 1), (10, 20, 30, 0))
    assert read_image(io.BytesIO(encoded(picture, "PNG"))).getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_read(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    red, green, blue = read_image(io.BytesIO(data)).getpixel((4, 4))
    assert red > 240 > 15 > max(green, blue)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_cut_files_are_refused_wherever_they_end(form):
    generator = np.random.default_rng(0)
    data = encoded(Image.fromarray(generator.integers(0, 256, (23, 17, 3), "u1")), form)
    whole = levels(data)
    read = 0
    for end in range(0, len(data), 7):
        try:
            shown = levels(data[:end])
        except ValueError:
            continue
        read += 1
        assert (shown == whole).all()
    assert read < 5  # what may be left out of a file is a few bytes at its end


# --------------------------------------------------------------------------- pictures of no use, e7

BROKEN = {
    "bomb": (png(30000, 30000, 8, 0), "exceeds limit"),
    "deep bomb": (png(30000, 30000, 16, 2), "exceeds limit"),
    "empty": (b"", "cannot identify|empty"),
    "text": (b"no picture", "cannot identify"),
    "cut": (png(20, 20, 8, 0, bytes(21 * 5))[:-20], "truncated"),
    "signed": (tiff([0, -5], "i", 32, kind=2), "signed grey levels"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.share(3)
def test_e7_show_refuses_in_one_line(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data, told = BROKEN[kind]
    Path("picture.png").write_bytes(data)
    assert cli.main(["show", "picture.png", "What is this?"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "show: expected a picture, got 'picture.png'" in line
    assert re.search(told, line)


@pytest.mark.parametrize("kind", BROKEN)
def test_e7_data_sets_refuse_or_skip(kind, tmp_path, capsys):
    data, told = BROKEN[kind]
    (tmp_path / "bad.png").write_bytes(data)
    rows = [ROWS[0] | {"image": name} for name in ("a.png", "bad.png")]
    for reader in ("lines", "hub csv", "parquet"):
        with pytest.raises(ValueError, match=rf"row 2: expected an image.*({told})"):
            READERS[reader](tmp_path, rows)[1]
        assert len(READERS[reader](tmp_path, rows, skip_bad=True)) == 1
        assert "skipped 1 of 2 rows" in capsys.readouterr().err
        (tmp_path / "rows.csv").unlink(missing_ok=True)


def test_data_sets_open_pictures_as_show_does(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "question": "q", "answer": "x"}')
    assert read_image(tmp_path / "a.png") == FolderDataset(tmp_path)[0].image


def test_the_same_images_have_the_same_mark() -> None:
    """Whatever is asked about them, and whatever they are called."""
    one, other = Image.new("RGB", (4, 2), "red"), Image.new("RGB", (2, 4), "red")
    mark = Sample("a", (one,), ()).mark
    assert mark == Sample("b", (one.copy(),), ()).mark
    rest = [Sample("a", own, ()).mark for own in ((other,), (one, other), (other, one), ())]
    assert len({mark, *rest}) == 5
    assert rest[-1] is None
