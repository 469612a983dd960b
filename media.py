"""
Where a video or an image is: a file, a member of a tar shard, a clip of a longer video.

    Media           the file, and the bytes and seconds of it that are meant
    expand_shards   "shards/{00000..00999}.tar" -> the paths of the shards
    iter_samples    shards -> the Media and the caption of each sample

Shards are tar files as img2dataset and video2dataset write them (WebDataset). They are not unpacked: an index tells at
which byte a member begins, so samples are read in any order.
"""

import json
import math
import os
import re
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import BinaryIO, NamedTuple

from files import format_error
from runtime import init_worker, num_cpus

# The names of video and image files, where files are looked for by name. A file that is named is read in any case.
VIDEO_EXTENSIONS = tuple("." + name for name in """
    mp4 m4v mov qt mkv webm avi divx wmv asf flv f4v mpg mpeg mpe m1v m2v vob ts mts m2ts m2t mod tod mxf gif apng
    ogv ogm 3gp 3gpp 3g2 y4m rm rmvb dv nut h264 264 h265 265 hevc ivf mjpg mjpeg wtv amv
    """.split())
IMAGE_EXTENSIONS = tuple("." + name for name in "jpg jpeg png webp bmp tif tiff ppm pgm pbm jxl jp2 j2k".split())


class Media(NamedTuple):
    """
    A video or an image: a file, or a part of one. The part may be a member of a tar shard, a clip of a longer video, or
    both. The functions of video.py take a Media wherever they take a path.
    """
    path: str
    member: str = ""            # its name in the tar shard `path`; empty: the whole file
    offset: int = 0             # its first byte in the shard
    size: int = 0               # its bytes in the shard
    start: float = 0.0          # its frames are those with start <= t < end, t in seconds since the first frame
    end: float = math.inf

    @property
    def name(self) -> str:
        """The path with the member and, as in W3C's media fragments, the clip: shards/00.tar/000012.mp4#t=3,7.5."""
        start, end = (repr(t).removesuffix(".0") if 0 < t < math.inf else "" for t in (self.start, self.end))
        clip = f"#t={start},{end}".rstrip(",") if start or end else ""
        return (f"{self.path}/{self.member}" if self.member else self.path) + clip

    @property
    def url(self) -> str:
        """The address for libav. It begins with "file:", since a path with a colon is no address."""
        part = f"subfile,,start,{self.offset},end,{self.offset + self.size},,:" if self.member else ""
        return f"{part}file:{self.path}"

    @classmethod
    def from_url(cls, url: str) -> "Media":
        """Make the Media with this url. The name of the member, and the clip, are not known."""
        part, _, path = url.partition("file:")
        if not part:
            return cls(path)
        start, end = map(int, re.findall("[0-9]+", part))
        return cls(path, "member", start, end - start)

    def num_bytes(self) -> int:
        """Return the size of the file or of the member."""
        return self.size if self.member else os.path.getsize(self.path)


def as_media(video: "str | os.PathLike | Media") -> Media:
    """Make the Media of a path. A Media is returned as it is."""
    return video if isinstance(video, Media) else Media(os.fspath(video))


# ---------------------------------------------------------------------------------------------------------------------
# Tar shards

MAX_SHARDS = 2 ** 20
# A sample's key is the path of its members up to the first dot of the name; what follows is the extension. A name that
# begins with a dot is no sample's: macOS puts such files into archives.
MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


def is_shards(path: str) -> bool:
    """Whether a path names tar shards rather than an annotation file."""
    return path.endswith(".tar")


def expand_shards(pattern: str) -> list[str]:
    """
    List the shards that a path names, in which {000..123} and {a,b} stand for alternatives, as in WebDataset. A
    FileNotFoundError lists those that do not exist.
    """
    if os.path.isfile(pattern):
        return [pattern]
    parts = re.split(r"\{([^{}]*\.\.[^{}]*|[^{}]*,[^{}]*)\}", pattern)      # text, alternatives, text, ...
    choices = [[part] if i % 2 == 0 else expand_braces(part, pattern) for i, part in enumerate(parts)]
    if (count := math.prod(map(len, choices))) > MAX_SHARDS:
        raise ValueError(f"{pattern}: must name at most {MAX_SHARDS} shards, got {count}")
    paths = ["".join(parts) for parts in product(*choices)]
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise FileNotFoundError(f"{pattern}: {len(missing)} of {len(paths)} shards are missing: {', '.join(missing)}")
    return paths


def expand_braces(text: str, pattern: str) -> list[str]:
    """List the alternatives of "a,b", or of "000..123", in which a leading zero fixes the number of digits."""
    if ".." not in text:
        return text.split(",")
    ends = text.split("..")
    if len(ends) != 2 or not all(re.fullmatch("[0-9]{1,12}", end) for end in ends):
        raise ValueError(f"{pattern}: a range must be two numbers like {{000..123}}, got {{{text}}}")
    first, last = map(int, ends)
    if abs(last - first) >= MAX_SHARDS:
        raise ValueError(f"{pattern}: must name at most {MAX_SHARDS} shards, got {{{text}}}")
    width = max(map(len, ends)) if any(end[0] == "0" and end != "0" for end in ends) else 0
    step = 1 if first <= last else -1
    return [f"{i:0{width}}" for i in range(first, last + step, step)]


def iter_members(f: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """
    Yield the members of an uncompressed tar file. A ValueError says what is damaged, and where: tarfile itself takes a
    damaged header for the end of the file.
    """
    file_size = os.fstat(f.fileno()).st_size
    try:
        with tarfile.open(fileobj=f, mode="r:") as tar:
            for member in tar:
                if not 0 <= member.size <= file_size - member.offset_data:
                    raise ValueError(f"it has {file_size} bytes and ends within {member.name}")
                tar.members = []                                            # a shard may have millions
                yield member
            end = f.seek(tar.offset)
    except (tarfile.TarError, OverflowError, MemoryError, EOFError) as error:
        raise ValueError(f"it is no uncompressed tar file, or damaged ({format_error(error)})") from None
    header = f.read(tarfile.BLOCKSIZE)
    if len(header) < tarfile.BLOCKSIZE:
        raise ValueError(f"it ends early, at byte {file_size}, without the end mark of a tar file")
    if any(header):
        raise ValueError(f"the header at byte {end} is damaged")
    while rest := f.read(2 ** 20):
        if any(rest):
            raise ValueError(f"it goes on after its end mark at byte {end}, as joined tar files do")


def read_caption(f: BinaryIO, members: dict[str, Media]) -> str | list[str]:
    """
    Read the caption of a sample, whose members are given by extension: its txt or, if that has no words, "caption" in
    its json. ValueError, with what it has instead, if there is none.
    """
    read = lambda member: os.pread(f.fileno(), member.size, member.offset)
    try:
        text = read(members["txt"]).decode("utf-8-sig") if "txt" in members else None
        if text is not None and ("json" not in members or re.search(r"\w", text)):
            return text
        about = json.loads(read(members["json"])) if "json" in members else None
        caption = about.get("caption") if isinstance(about, dict) else None
        json.dumps(caption, ensure_ascii=False).encode()                    # half a surrogate pair is a ValueError
    except (ValueError, RecursionError):
        raise ValueError("a text that is not valid UTF-8 or JSON") from None
    if isinstance(caption, str) or caption and isinstance(caption, list) and all(isinstance(c, str) for c in caption):
        return caption
    if text is not None:
        return text                                                         # it is counted as a caption without words
    raise ValueError("no caption")


def find_media(members: list[tuple[str, Media]]) -> Media:
    """Return the one video or image of a sample, of (extension, member). ValueError, with what it has instead."""
    media = [member for extension, member in members if f".{extension}" in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS]
    if len(media) == 1:
        return media[0]
    if media:
        raise ValueError("several videos or images")
    if any(extension.endswith(VIDEO_EXTENSIONS + IMAGE_EXTENSIONS) for extension, _ in members):
        raise ValueError("a video or image with several dots in its name, whose key ends at the first")
    raise ValueError("no video or image")


def read_shard(path: str) -> tuple[list[tuple[str, Media, str | list[str]]], list[tuple[str, str]], str]:
    """
    Read the headers and texts of a shard -> (name, Media, caption) of its samples; (name, what it has) of the samples
    that are left out; what is damaged, or "". Of a damaged shard, the samples before the damage are there.

    An error of the file system is no damage, since it may pass, but a ValueError. (files.atomic_write takes an OSError
    for one of the file that it writes.)
    """
    groups, samples, left_out, damage = {}, [], [], ""
    try:
        with open(path, "rb") as f:
            try:
                for member in iter_members(f):
                    match = MEMBER_NAME.fullmatch(member.name)
                    if match and member.isreg() and not member.issparse():
                        part = Media(path, member.name, member.offset_data, member.size)
                        groups.setdefault(match[1], []).append((match[2].lower(), part))
            except ValueError as error:
                damage = str(error)
                if groups and "txt" not in dict([*groups.values()][-1]):    # it may have had one
                    groups.popitem()
            for key, members in groups.items():
                name = f"{path}/{key}"
                try:
                    samples.append((name, find_media(members), read_caption(f, dict(members))))
                except ValueError as error:
                    left_out.append((name, str(error)))
    except OSError as error:
        raise ValueError(f"{path}: the shard cannot be read ({format_error(error)})") from None
    return samples, left_out, damage


def read_shards(paths: list[str]) -> Iterator[tuple]:
    """
    Yield read_shard(path) of each path, in order. All cores read, no more than two shards for each ahead, since a shard
    may have many samples.
    """
    if len(paths) == 1:
        yield read_shard(paths[0])
        return
    count, futures = min(num_cpus(), len(paths)), deque()
    with ProcessPoolExecutor(count, initializer=init_worker) as pool:
        try:
            for path in paths:
                futures.append(pool.submit(read_shard, path))
                if len(futures) > 2 * count:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)                              # after an error the others are not needed


class LostData(NamedTuple):
    """What is missing from shards: `lost` of `total` shards or samples."""
    lost: int
    total: int
    what: str                   # "a.tar: 2 of 10 samples are left out"
    listing: str                # which, and why

    def __str__(self) -> str:
        return f"{self.what}: {self.listing}"


def check_lost_data(lost_data: list[LostData], max_lost: float):
    """Raise a ValueError that lists what is lost to a share above max_lost, data.max_unreadable, if anything is."""
    limit = f"data.max_unreadable is {max_lost:g}" if max_lost else "none may be"
    if above := [f"{data.what} ({limit}): {data.listing}" for data in lost_data if data.lost > max_lost * data.total]:
        raise ValueError("; ".join(above))


def iter_samples(pattern: str, notes: list[str],
                 lost_data: list[LostData]) -> Iterator[tuple[str, Media, str | list[str]]]:
    """
    Yield (source, Media, caption) of each sample of the shards that `pattern` names, in order. A sample is the members
    with one key: a video or an image, and its caption in a txt or json.

    At the end `notes` gets a line with the numbers of videos and images, and `lost_data` the samples without one of
    them and the damaged shards, whose samples before the damage are used.
    """
    paths, damaged, left_out, videos, images = expand_shards(pattern), [], {}, 0, 0
    for path, (samples, others, damage) in zip(paths, read_shards(paths), strict=True):
        for name, media, caption in samples:
            yield f"{pattern}, {name}", media, caption
            is_image = media.member.lower().endswith(IMAGE_EXTENSIONS)
            images, videos = images + is_image, videos + (not is_image)
        for name, reason in others:
            left_out.setdefault(reason, []).append(name)
        if damage:
            damaged.append(f"{path}: {damage}")
    found = []
    if damaged:
        what = f"{pattern}: {len(damaged)} of {len(paths)} shards are damaged, what comes after the damage is left out"
        found.append(LostData(len(damaged), len(paths), what, "; ".join(damaged)))
    if left_out:
        lost = sum(map(len, left_out.values()))
        total = lost + videos + images
        listing = "; ".join(f"{len(names)} with {reason} ({', '.join(names[:20] + ['...'] * (len(names) > 20))})"
                            for reason, names in left_out.items())
        found.append(LostData(lost, total, f"{pattern}: {lost} of {total} samples are left out", listing))
    if not videos + images:
        raise ValueError("; ".join([f"{pattern}: no sample is left", *map(str, found)]))
    notes.append(f"{pattern}: {videos} videos, {images} images")
    lost_data += found
