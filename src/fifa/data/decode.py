"""Decoding and header checks: images are hostile until they are decoded.

A decoder that runs out of data may go on without a word: libjpeg fills the rest with mid-grey, and
Pillow leaves the rest of a PNG as it was, that is 0. So neither is shown the end of a file that has
one: as long as there may be more, a decoder waits for what it lacks, and Pillow tells. Only a JPEG
of several scans has to be read to its end. Where its last block says nothing it is decoded once
more, such that pixels without data must come out different. WEBP needs none of this: libwebp fails
when it runs out; and AVIF and HEIC say how many bytes each picture has.

Whoever walks through the bytes has a budget, whatever they say: Pillow's readers of JPEG and PNG
take a step of Python a segment, a chunk or a stray byte, and each step reads from `_Budgeted`. The
patterns here have a fixed width, so that a search is linear in the bytes. Pixels, scans and bytes
are few enough for a second of processor time and 200 MB beside a copy of the file.
"""

from __future__ import annotations

import io
import random
import re
import struct
import warnings
from collections.abc import Iterator

from PIL import Image, ImageFile

from fifa.data.avif import coded_pixels
from fifa.data.kinds import MISSING, kind_of, may_be_turned, orientation, readable, turned

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")
MAX_PIXELS = 36_000_000  # 4 bytes each
# pixels of which the decoder and Pillow hold several copies, libwebp and Pillow four
MAX_OTHERS = {"WEBP": 10_000_000, "AVIF": 10_000_000, "HEIF": 16_000_000}
MAX_SCANS = 14_000_000  # pixels of a JPEG of several scans: 6 bytes each, and two pictures
MAX_BYTES = 64 << 20
READS = 100_000  # by a decoder of one file: three a segment or chunk; 64 MB of PNG take 25,000
MAX_SPARE = 1 << 20  # bytes in the scans of a JPEG that are none of its pixels'
MAX_PER_PIXEL = 8  # bytes in them; noise at the best quality takes 4
MAX_SCANNED = 16 << 20  # bytes of several scans, which may be decoded twice
MAX_HEADER = 12 << 20  # bytes of a JPEG before its first scan
MAX_EXIF = 96 << 10  # bytes; a table of n entries may name the rest n times over
SEGMENTS = 10_000  # of a JPEG
CHUNKS = 200  # of a PNG, those with its pixels apart: each may unpack to a megabyte


# what Pillow says of an image's Exif, a line a tag, and of its size: who asks here is told once
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.(Tiff|Jpeg)ImagePlugin")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(Exception):  # noqa: N818 - it is passed on as a finding more than it is raised
    """An image that does not come in, and why.

    Parameters
    ----------
    reason
        One short sentence.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def open_image(data: bytes, least: int = 0) -> Image.Image:
    """Decode an image completely.

    With ``least`` a JPEG may come out at a half, a quarter or an eighth of its size, as long as no
    side is shorter than that: its decoder makes such a picture out of a part of the coefficients,
    in a part of the time (`PIL.Image.Image.draft`). 0 decodes every pixel.

    JPEG, PNG, WEBP, AVIF and (with pillow-heif) HEIC of at most `MAX_PIXELS` pixels (`MAX_OTHERS`,
    `MAX_SCANS`) and `MAX_BYTES` bytes. Refused as well: truncated files and headers that promise
    more pixels than there are data for, animations (nobody knows which frame a person judged),
    16-bit grey, and JPEGs that no browser shows (arithmetic coding). The image comes as people see
    it, turned as its Exif says; conversion to RGB is left to whoever looks at it.

    A lack of data is seen exactly but for this. The 7 bits that may be left over and the 64 ones
    behind them (17 a code) may do for one more unit, or for up to four blocks where a unit is a
    block (grey JPEGs). Of a JPEG of several scans as `_lacks_data` has it. A PNG may lack nothing.

    Raises `BadImage`.
    """
    try:
        image, scans = _header(data)
        pixels, turn = image.width * image.height, orientation(image)
        if least and image.format == "JPEG":
            image.draft(image.mode, (least, least))
        size = image.size
        image.load()
        if image.size != size:
            raise BadImage("its picture has not the size that its header says")
        if scans and _lacks_data(image, data, pixels):
            raise BadImage(PROMISE)
        return turned(image, turn)
    except BadImage:
        raise
    except Exception as error:  # a decoder fed with hostile bytes may raise anything
        raise _undecodable(error) from error


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width of an image as it is seen, by its header; `BadImage` as from `open_image`.

    What follows the header is not decoded: a truncated file passes.
    """
    try:
        with _header(data)[0] as image:
            size = image.height, image.width
            return size if orientation(image) < 5 else size[::-1]
    except BadImage:
        raise
    except Exception as error:
        raise _undecodable(error) from error


def turn_of(data: bytes) -> int:
    """The `fifa.data.kinds.orientation` of a file; 1 where it cannot be opened."""
    if not may_be_turned(data):
        return 1
    try:
        with _header(data)[0] as image:
            return orientation(image)
    except Exception:  # hostile bytes, as above
        return 1


class _Budgeted(io.BytesIO):
    """A file in memory that a decoder may read `READS` times; more is a `BadImage`.

    The header of a JPEG is `MAX_HEADER` bytes long at most, the Exif in it `MAX_EXIF`.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads = self.exif = 0
        self.in_header = data.startswith(b"\xff\xd8")

    def read(self, size: int | None = -1, /) -> bytes:
        """As the file's."""
        self.reads += 1
        found = super().read(size)
        if self.reads > READS or (self.in_header and self.tell() > MAX_HEADER):
            raise BadImage("too many segments or stray bytes before its pixels")
        if self.in_header and found.startswith(b"Exif\0\0"):
            self.exif += len(found)
            if self.exif > MAX_EXIF:
                raise BadImage(f"more than {MAX_EXIF:,} bytes of Exif")
        return found


def _open(data: bytes, *formats: str) -> ImageFile.ImageFile:
    """The image, opened; `BadImage` where that takes more than its budget.

    A JPEG's decoder gets all data at once: of a piece that ends in ff it takes nothing, and would
    look at a run of them again with each piece.
    """
    file = _Budgeted(data)
    image = Image.open(file, formats=formats)
    file.in_header = False
    if image.format != "PNG":
        image.decodermaxblock = max(image.decodermaxblock, len(data))
    return image


def _header(data: bytes) -> tuple[ImageFile.ImageFile, bool]:
    """The image, opened and looked at, not decoded; whether it is a JPEG of several scans."""
    if len(data) > MAX_BYTES:
        raise BadImage(f"more than {MAX_BYTES:,} bytes")
    if data.startswith(PNG):
        data = _without_end(data)
    other = kind_of(data)
    if other and other not in readable():
        raise BadImage(MISSING[other])
    image = _open(data, *readable())
    pixels = image.width * image.height
    most = MAX_OTHERS.get(image.format or "", MAX_PIXELS)
    if pixels > most:
        raise BadImage(f"more than {most:,} pixels")
    # an MPO is a JPEG with further pictures behind the one that everybody sees
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise BadImage("an animation")
    if image.format == "AVIF" and coded_pixels(data) > 3 * most:  # with alpha and thumbnail
        raise BadImage(f"more than {most:,} pixels are coded in it")
    if image.mode not in MODES:
        raise BadImage(f"mode {image.mode} is not supported")
    if image.format not in _JPEGS:
        return image, False
    kind, end = _coding(data, pixels)
    if kind not in HUFFMAN:
        raise BadImage("a JPEG with arithmetic or lossless coding is not supported")
    if not end:
        _check_scans(data, pixels)
    elif end < len(data):
        image.fp = io.BytesIO(b"".join([memoryview(data)[:end], _ONES]))
    return image, not end


def _undecodable(error: Exception) -> BadImage:
    brief = str(error).partition("\n")[0][:100] or type(error).__name__
    if brief.startswith("image file is truncated"):
        return BadImage(PROMISE)
    if "cannot identify" in brief:
        brief = "no JPEG, PNG, WEBP, AVIF or HEIC"
    return BadImage(f"cannot be decoded: {brief}")


def check_image(data: bytes) -> None:
    """Decode an image completely and forget it; raises `BadImage`."""
    open_image(data).close()


PROMISE = "its header promises more pixels than it has data for"
HUFFMAN = frozenset({0xC0, 0xC1, 0xC2})  # JPEG's baseline, extended and progressive frames
SCANS = 100  # in a JPEG; a progressive one has about ten
SCANNED = 200_000_000  # pixels times scans: each scan passes over all pixels

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length behind them
_JPEGS = ("JPEG", "MPO")
_PROGRESSIVE, _SCAN, _END, _INTERVAL = 0xC2, 0xDA, 0xD9, 0xDD
_MARKER = re.compile(rb"\xff([^\x00\xff])")  # more ff may stand before it, of any number
_AFTER_SCAN = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")  # no escaped ff, no restart
_ONES = 8 * b"\xff\0"  # no code is all ones: what a decoder reads ahead, and next to no picture
_STRIP = 256  # rows compared at a time

PNG = b"\x89PNG\r\n\x1a\n"
_CHUNK = struct.Struct(">I4s")  # bytes of its data, name

_BITS = [bytes(b % 255 for b in random.Random(n).randbytes(512)) for n in range(9)]


def _coding(data: bytes, pixels: int) -> tuple[int, int]:
    """How a JPEG is coded, and where the data of its only scan end.

    How is the last byte of its frame's marker, 0xC0 to 0xCF, 0 without one. Where is 0 in a JPEG
    of several scans, and its length where nothing follows the scan. `BadImage` for data that no
    picture of so many ``pixels`` needs.
    """
    kind, components, first = 0, b"", 0
    for marker, start, at in _markers(data, pixels):
        if first:
            return kind, start
        if marker in _FRAMES:
            kind, components = marker, data[at + 7 : at + 8]
        elif marker == _SCAN:
            if kind == _PROGRESSIVE or data[at + 2 : at + 3] != components:
                return kind, 0
            first = at
    return kind, len(data)


def _check_scans(data: bytes, pixels: int) -> None:
    """`BadImage` for a JPEG that decodes for long: each scan may be a few bytes."""
    if pixels > MAX_SCANS:
        raise BadImage(f"a JPEG of several scans with more than {MAX_SCANS:,} pixels")
    most = min(SCANS, SCANNED // pixels)
    starts = []
    for marker, at, _ in _markers(data, pixels):
        if marker == _SCAN:
            starts.append(at)
        if len(starts) > most:
            raise BadImage(f"a JPEG with more than {most} scans")
    if at - starts[0] > MAX_SCANNED:
        raise BadImage(f"a JPEG of several scans with more than {MAX_SCANNED:,} bytes of them")


def _lacks_data(image: ImageFile.ImageFile, data: bytes, pixels: int) -> bool:
    """True if the decoder of a JPEG of several scans ran out of data before it had all pixels.

    Parameters
    ----------
    image
        A loaded JPEG or MPO; it may be loaded at a part of its size.
    data
        The file that it was decoded from.
    pixels
        How many it has in full size.

    Not seen: a lack of less than one block, a lack in a scan of finer detail alone, and any lack
    in a picture that is mid-grey where its data end.
    """
    if not _ends_flat(image):
        return False
    more = _loaded(_with_more_data(data, pixels))
    return _differ(image if image.size == more.size else _loaded(data), more)


def _ends_flat(image: ImageFile.ImageFile) -> bool:
    """True if the last block of a JPEG may be what libjpeg makes of no data.

    All coefficients of such a block are 0, which is mid-grey; in a progressive JPEG the scan with
    its mean may be there and the others not. Chroma may be blended with the neighbours', luma is
    not. Bits that were left over may spoil the first block without data; it is the last one only
    in images one unit wide or high.
    """
    width, height = image.size
    side = 8 // (image.decoderconfig or (1,))[0]  # of a block, in pixels as they were loaded
    if min(width, height) <= 4 * side:  # four blocks, the largest unit
        return True
    block = image.crop(((width - 1) & -side, (height - 1) & -side, width, height))
    channels = block.split() if image.mode == "CMYK" else [block.convert("L")]
    for values in (channel.tobytes() for channel in channels):
        low, high = min(values), max(values)
        if high - low <= 4 and ("progressive" in image.info or 126 <= low <= high <= 130):
            return True
    return False


def _with_more_data(data: bytes, pixels: int) -> bytes:
    """The JPEG with more data at the end of every scan: one that has all it needs never looks.

    There are bits to read at once, and behind the restart markers that would come next.
    """
    pieces, at, scan = [], 0, 0
    for kind, start, after in _markers(data, pixels):
        if scan:
            start = scan + len(data[scan:start].rstrip(b"\xff"))  # before ff that fill up
            restarts = sum(data.count(bytes([0xFF, n]), scan, start) for n in range(0xD0, 0xD8))
            pieces += [data[at:start], _BITS[8]]
            for n in range(8):
                pieces += [bytes([0xFF, 0xD0 + (restarts + n) % 8]), _BITS[n]]
            at = start
        scan = after + int.from_bytes(data[after : after + 2]) if kind == _SCAN else 0
    return b"".join([*pieces, data[at:]])


def _loaded(data: bytes) -> Image.Image:
    image = _open(data, "JPEG")
    image.load()
    return image


def _differ(a: Image.Image, b: Image.Image) -> bool:
    for top in range(0, a.height, _STRIP):
        box = (0, top, a.width, min(a.height, top + _STRIP))
        if a.crop(box).tobytes() != b.crop(box).tobytes():
            return True
    return False


def _markers(data: bytes, pixels: int) -> Iterator[tuple[int, int, int]]:
    """The markers of a JPEG up to its end: the last byte, where it begins and what follows it.

    Restarts are a part of the scan, where there is an interval for them. `BadImage` after
    `SEGMENTS` markers, or after more than so many ``pixels`` can need since the first scan.
    """
    at, end, pattern, in_scan, first = 2, len(data), _MARKER, _MARKER, True
    for _ in range(SEGMENTS):
        found = pattern.search(data, at, end)
        if not found:
            break
        kind, at = found[1][0], found.end()
        yield kind, found.start(), at
        if kind == _END:
            return
        if kind == _INTERVAL:
            in_scan = _AFTER_SCAN if any(data[at + 2 : at + 4]) else _MARKER
        if kind == _SCAN and first:
            first, end = False, min(end, at + MAX_SPARE + MAX_PER_PIXEL * pixels)
            if data.count(b"\xff", at, end) > MAX_SPARE + (end - at) // 8:
                raise BadImage("its pixels are mostly bytes that fill up")
        if kind not in _ALONE:
            at += int.from_bytes(data[at : at + 2])
        pattern = in_scan if kind == _SCAN else _MARKER
    else:
        raise BadImage(f"more than {SEGMENTS:,} segments")
    if end < len(data):
        raise BadImage("far more data than its pixels need")


def _without_end(data: bytes) -> bytes:
    """The PNG without the last byte of its pixels' stream, which belongs to a checksum.

    `BadImage` where there are more than `CHUNKS` chunks beside those with pixels.
    """
    at, others, all_chunks, last = len(PNG), 0, 0, 0
    while at + 12 <= len(data):
        size, name = _CHUNK.unpack_from(data, at)
        if name == b"IEND":
            break
        if name == b"IDAT" and size:
            last = at
        others += name not in (b"IDAT", b"fdAT")
        all_chunks += 1
        if others > CHUNKS or 3 * all_chunks > READS:
            raise BadImage("too many chunks")
        at += 12 + size  # length, name, data, checksum
    if not last or at + 12 > len(data):
        return data  # no end
    size, name = _CHUNK.unpack_from(data, last)
    end = last + 8 + size
    return b"".join(
        [data[:last], _CHUNK.pack(size - 1, name), data[last + 8 : end - 1], data[end:]]
    )
