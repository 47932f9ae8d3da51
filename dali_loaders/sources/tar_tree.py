"""What a folder would hold after an uncompressed tar was unpacked into it: later members replace earlier ones, links lead to files."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from dali_loaders.account import Account
from dali_loaders.names import printable
from dali_loaders.sources.tar_headers import LINK, SPARSE, SYMBOLIC, DamagedTarError, Member
from dali_loaders.sources.walk import FILE, FOLDER, NOWHERE, SPECIAL, Entry, walk

IS_SPARSE = -1  # in place of a size: the data is in pieces, and the offset is that of the member's first header
_UPWARDS = '".." in its name, with which it is not unpacked'
_NO_FILE = -1  # in place of a place: a pipe or a device
_LINKS = 40  # followed for one name, as Linux does


class Unpacked:
    """Files and folders by name; `account` gets the members that leave nothing behind."""

    def __init__(self, members: Iterable[Member], account: Account) -> None:
        self._account = account
        self._file_of: dict[bytes, int] = {}  # places in the two arrays, or _NO_FILE
        self._link_of: dict[bytes, bytes] = {}
        self.offsets, self.sizes = array("q"), array("q")
        self.folders = {b""}
        self.links_to_nowhere: list[bytes] = []
        for member in members:
            self._unpack(member)
        self._add_folders()

    def files(self) -> tuple[list[bytes], list[int]]:
        """Names of the files, links to files and files in linked folders among them, with their places in `offsets` and `sizes`.

        Completes `folders` and `links_to_nowhere`."""
        names, places = [], []
        if not self._link_of:
            for name, place in self._file_of.items():
                if place == _NO_FILE:
                    self._account.pass_over(SPECIAL, printable(name))
                else:
                    names.append(name)
                    places.append(place)
            return names, places
        tree = _Tree(self.folders, self._file_of, self._link_of)
        for found in walk(tree, b""):
            if found.kind == FILE:
                names.append(found.name)
                places.append(self._file_of[tree.resolve(found.real, found.name.rpartition(b"/")[2]) or b""])
            elif found.kind == NOWHERE:
                self.links_to_nowhere.append(found.name)
            elif found.kind == FOLDER:
                self.folders.add(found.name)
            else:
                self._account.pass_over(str(found.kind), printable(found.name))
        return names, places

    def _unpack(self, member: Member) -> None:
        name, kind = member.name, member.kind
        if (reason := self._why_not(member)) is not None:
            self._account.pass_over(reason, printable(name))
            if kind == LINK and reason != _UPWARDS and not self._is_below_no_folder(member.link):
                self.folders.add(name.rpartition(b"/")[0])  # made before the link fails
            return
        if kind == FOLDER:
            self.folders.add(name)
            return
        if name in self._link_of and (kind, member.link) != (SYMBOLIC, self._link_of[name]):  # programs disagree on what is left
            raise DamagedTarError(f"{printable(name)} is a symbolic link and another {kind} at once")
        if self._file_of.pop(name, None) is not None or self._link_of.pop(name, None) is not None:
            self._account.pass_over("replaced by a later member of the same name", printable(name))
        if kind in (FILE, SPARSE):
            self._add_file(name, member.offset, IS_SPARSE if kind == SPARSE else member.size)
        elif kind == SYMBOLIC:
            self._link_of[name] = member.link
        elif kind != LINK:
            self._file_of[name] = _NO_FILE
        elif (place := self._file_of.get(member.link)) is not None:
            self._file_of[name] = place
        else:
            self._link_of[name] = self._link_of[member.link]

    def _why_not(self, member: Member) -> str | None:
        """Why a member is not unpacked, so that what was there under its name stays."""
        if b".." in member.name and b".." in member.name.split(b"/"):
            return _UPWARDS
        if not member.name and member.kind != FOLDER:
            return "member without a name"
        if member.kind != LINK:
            return None
        if member.link == member.name:
            return "hard link to itself"
        return None if member.link in self._file_of or member.link in self._link_of else "hard link that leads nowhere"

    def _is_below_no_folder(self, name: bytes) -> bool:
        """Whether a file leads to `name`, or a symbolic link that tar makes in the end only, since it may lead out of the folder."""
        while name := name.rpartition(b"/")[0]:
            link = self._link_of.get(name, b"")
            if name in self._file_of or link.startswith(b"/") or b".." in link.split(b"/"):
                return True
        return False

    def _add_file(self, name: bytes, offset: int, size: int) -> None:
        self._file_of[name] = len(self.offsets)
        self.offsets.append(offset)
        self.sizes.append(size)

    def _add_folders(self) -> None:
        """Those that only the names of their files tell of."""
        inner = {name.rpartition(b"/")[0] for names in (self._file_of, self._link_of) for name in names} | self.folders
        self.folders = {b""}
        for folder in inner:
            while folder and folder not in self.folders:
                self.folders.add(folder)
                folder = folder.rpartition(b"/")[0]
        for folder in self.folders:
            if folder in self._file_of or folder in self._link_of:
                raise DamagedTarError(f"{printable(folder)} is a folder and a {'link' if folder in self._link_of else 'file'} at once")


class _Tree:
    """For `walk`: real paths are names below the root."""

    def __init__(self, folders: set[bytes], files: dict[bytes, int], links: dict[bytes, bytes]) -> None:
        self._folders, self._files, self._links = folders, files, links
        self._inside: dict[bytes, list[Entry]] = {folder: [] for folder in folders}
        for name in folders - {b""}:
            folder, _, last = name.rpartition(b"/")
            self._inside[folder].append(Entry(last, FOLDER))
        for name, place in files.items():
            folder, _, last = name.rpartition(b"/")
            self._inside[folder].append(Entry(last, SPECIAL if place == _NO_FILE else FILE))
        for name in links:
            folder, _, last = name.rpartition(b"/")
            real = self.resolve(folder, last)
            if real is None:
                self._inside[folder].append(Entry(last, NOWHERE))
            elif real in folders:
                self._inside[folder].append(Entry(last, FOLDER, real))
            else:
                self._inside[folder].append(Entry(last, SPECIAL if files[real] == _NO_FILE else FILE))

    def entries(self, folder: bytes) -> list[Entry]:
        return self._inside[folder]

    def resolve(self, folder: bytes, target: bytes) -> bytes | None:
        """The file or folder that a link in `folder` leads to; None for nowhere, which is also outside of the tar."""
        real, todo, followed = folder, [target], 0
        while todo:
            if real in self._files:
                return None
            part, slash, rest = todo.pop().partition(b"/")
            if slash:
                todo.append(rest.lstrip(b"/"))
            if part == b"..":
                if not real:
                    return None
                real = real.rpartition(b"/")[0]
            elif part not in (b"", b"."):
                name = real + b"/" + part if real else part
                link = self._links.get(name)
                if link is not None:
                    followed += 1
                    if not link or link.startswith(b"/") or followed > _LINKS:
                        return None
                    todo.append(link)
                elif name in self._files or name in self._folders:
                    real = name
                else:
                    return None
        return real
