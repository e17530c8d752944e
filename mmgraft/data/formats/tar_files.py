"""Shards of WebDataset: a tar in which neighbours with one name are one record."""

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, cast

from mmgraft.data.formats.layouts import told
from mmgraft.data.formats.record_files import Found, Record, StampedFile, once
from mmgraft.errors import UsageError, brief
from mmgraft.vision.images import StoredImage

#: Endings of members that are images.
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")


class TarFile(StampedFile):
    """A tar of samples; a record's position is that of its first member's head.

    Members with the same path up to the first dot of the last name are one sample. Its record is
    the ``.json`` member, a row as in any file, or the ``.txt`` member, the caption of its images.
    Members are never written to disk.
    """

    unit = "sample"

    def scan(self) -> Iterator[Found]:
        """Yield all samples; one that has no record is an error of its own."""
        for number, members in enumerate(self._samples(0), start=1):
            yield Found(members[0].offset, number, self._sample(members, number))

    def read(self, position: int, number: int) -> Record:
        """Read the sample that begins there."""
        self.open().close()  # refuses a tar that has changed
        found = self._sample(next(self._samples(position)), number)
        if isinstance(found, UsageError):
            raise found
        return found

    def _samples(self, position: int) -> Iterator[list[tarfile.TarInfo]]:
        """Yield members of each sample from a position on."""
        members: list[tarfile.TarInfo] = []
        for member in self._members(position):
            if members and _key(members[0].name) != _key(member.name):
                yield members
                members = []
            members.append(member)
        if members:
            yield members

    def _members(self, position: int) -> Iterator[tarfile.TarInfo]:
        with open(self.file, "rb") as file:
            file.seek(position)
            try:
                tar = tarfile.TarFile(fileobj=file, mode="r")
                while (member := tar.next()) is not None:
                    cast(Any, tar).members.clear()  # it would keep them all
                    # a Mac's ._NAME only says how to show the file beside it
                    if member.isdir() or member.name.rpartition("/")[2].startswith("._"):
                        continue
                    if not member.isfile() or member.issparse():
                        raise UsageError(
                            f"{self.file}: its member {brief(member.name)} is a link, a device or "
                            "sparse, not a plain file; pack the tar again, with such files alone "
                            "(tar -h)"
                        )
                    yield member
            except tarfile.TarError as error:
                raise UsageError(
                    f"{self.file} is no whole tar ({error}); download or pack it again, and "
                    "unpack one that is compressed (gunzip)"
                ) from error
            file.seek(tar.offset)
            end = file.read(tarfile.BLOCKSIZE)
            if any(end) or len(end) < tarfile.BLOCKSIZE:  # a tar ends with empty blocks
                what = "damaged" if any(end) else "cut short"
                raise UsageError(
                    f"{self.file} is {what} at byte {tar.offset}; download or pack it again"
                )

    def _sample(self, members: Sequence[tarfile.TarInfo], number: int) -> Record | UsageError:
        key = _key(members[0].name)
        where = f"{self.file}, sample {number} ({brief(key)})"
        kinds = _record_members(members, where)
        if isinstance(kinds, UsageError):
            return kinds
        images = [
            StoredImage(
                f"{self.file}/{member.name}", None, self.file, member.offset_data, member.size
            )
            for member in members
            if _kind(member.name) in IMAGE_ENDINGS
        ]
        names = _names(self.file, images)
        data: Any = None
        if "json" in kinds:
            try:
                data = json.loads(self._text(kinds["json"]), object_pairs_hook=once)
            except (ValueError, RecursionError) as error:
                return UsageError(f"{where}: its json is not JSON ({error}); correct it")
        if "txt" in kinds and not (isinstance(data, dict) and told(data)):
            if not images:
                return UsageError(
                    f"{where}: a caption without an image beside it; add one that ends in "
                    f"{', '.join(IMAGE_ENDINGS[:4])}, or leave the sample out"
                )
            try:
                caption = self._text(kinds["txt"]).decode()
            except UnicodeDecodeError as error:
                return UsageError(f"{where}: its txt is not UTF-8 ({error.reason}); convert it")
            data = _captioned(data, caption.strip(), images)
        if data is None:
            there = brief(", ".join(member.name for member in members))
            return UsageError(
                f"{where}: neither a .json nor a .txt in it but {there}; put the row, or the "
                "caption, beside its images under the same name"
            )
        if isinstance(data, dict):
            data.setdefault("id", os.path.basename(key))
        return Record(data, names)

    def _text(self, member: tarfile.TarInfo) -> bytes:
        return StoredImage(member.name, None, self.file, member.offset_data, member.size).read()


def _key(name: str) -> str:
    folder, slash, last = name.removeprefix("./").rpartition("/")
    return folder + slash + last.partition(".")[0]


def _record_members(
    members: Sequence[tarfile.TarInfo], where: str
) -> dict[str, tarfile.TarInfo] | UsageError:
    """Return the members that a record is made of beside images: its json and its txt."""
    seen: set[str] = set()
    for member in members:
        if member.name in seen:
            return UsageError(
                f"{where}: two of its members are called {brief(member.name)}; give each a name of "
                "its own"
            )
        seen.add(member.name)
    kinds: dict[str, tarfile.TarInfo] = {}
    for kind in ("json", "txt"):
        found = [member for member in members if _kind(member.name) == kind]
        # a.json is meant where a.meta.json stands beside it
        own = [m for m in found if m.name.rpartition("/")[2].lower().partition(".")[2] == kind]
        if len(found) > 1 and len(own) != 1:
            called = brief(" or ".join(member.name for member in found))
            return UsageError(f"{where}: its row may be {called}; leave one that ends in .{kind}")
        if found:
            kinds[kind] = (own or found)[0]
    return kinds


def _kind(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _names(file: str, images: Sequence[StoredImage]) -> dict[str, StoredImage]:
    """Return images by all that a record may call them: path, last name, ending."""
    found: dict[str, StoredImage] = {}
    for image in images:
        path = image.name.removeprefix(f"{file}/").removeprefix("./")
        last = path.rpartition("/")[2]
        for name in (image.name, path, f"./{path}", last, last.partition(".")[2]):
            found.setdefault(name, image)
    return found


def _captioned(data: Any, caption: str, images: Sequence[StoredImage]) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": [{"type": "image"} for _ in images]},
        {"role": "assistant", "content": caption},
    ]
    named = {"id": data["id"]} if isinstance(data, dict) and "id" in data else {}
    return {**named, "messages": messages}
