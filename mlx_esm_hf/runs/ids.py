"""Checking ids before the work, and making file names from ids."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from mlx_esm_hf.errors import UserError

LONGEST_ID = 1 << 15  # bytes; names in zip archives and attributes in HDF5 may have twice as many
HEADER = 99_000_000  # bytes of names; safetensors reads headers of up to 100 MB
LONGEST_NAME = 150  # characters of a file name; with a number and a suffix it stays below 255
ID_ARRAY = 1 << 32  # bytes of the ids in an .npz file, where each id takes as much space as the longest


@dataclass
class Ids:
    """The ids of an output, counted against the limits of its format.

    Attributes:
        suffix: suffix of the output; "" for a folder of shards.
        count: number of ids added.
        longest: characters of the longest id.
        header: bytes of a safetensors header with these ids, at most.
    """

    suffix: str
    count: int = 0
    longest: int = 0
    header: int = 0

    def refuse(self, id: str) -> None:
        """Raise an error for an id that no file can contain.

        Raises:
            UserError: the id is not valid Unicode, is too long, or contains NUL or a line break.
        """
        try:
            size = len(id.encode())
        except UnicodeEncodeError:
            raise UserError("has an id that is not valid Unicode (unpaired surrogate)") from None
        if size > LONGEST_ID:
            raise UserError(f"has an id of {size} bytes; must be at most {LONGEST_ID}")
        if "\0" in id:
            raise UserError("has a NUL in its id, where many programs would cut it off")
        if len(id.splitlines()) > 1:
            raise UserError("has an id with a line break")

    def add(self, id: str) -> None:
        """Count an id.

        Raises:
            UserError: the format cannot contain so many ids.
        """
        self.count += 1
        self.longest = max(self.longest, len(id))
        self.header += len(json.dumps(json.dumps(id)))  # the list of ids is JSON within JSON
        if self.suffix == ".safetensors" and self.header > HEADER:
            raise UserError(
                f"The ids of more than {self.count - 1:,} proteins do not fit into the header of a .safetensors file "
                "(at most 100 MB). Choose .h5, .parquet or a folder of shards."
            )
        if self.suffix == ".npz" and 4 * self.count * self.longest > ID_ARRAY:
            raise UserError(
                f"The ids of more than {self.count - 1:,} proteins, the longest with {self.longest:,} characters, "
                "would take over 4 GiB in an .npz file. Choose .h5, .parquet or a folder of shards."
            )


class UniqueIds:
    """Makes ids unique: the second record with the id `a` is called `a#2`, or the next number that is not taken.

    Attributes:
        used: the names so far.
        renamed: how many differ from their id.
    """

    def __init__(self) -> None:
        self.used: set[str] = set()
        self.renamed = 0
        self._last: dict[str, int] = {}

    def name(self, id: str) -> str:
        """Return the id if no earlier record has this name, else the id with a number."""
        name = id
        while name in self.used:
            self._last[id] = self._last.get(id, 1) + 1
            name = f"{id}#{self._last[id]}"
        self.renamed += name != id
        self.used.add(name)
        return name


def accession(name: str) -> str:
    """Return `P12345` for UniProt's `sp|P12345|NAME_HUMAN`, and other names unchanged."""
    parts = name.split("|")
    return parts[1] if len(parts) == 3 and parts[0] in ("sp", "tr") and parts[1] else name


@dataclass
class FileNames:
    """File names without suffix for ids, a different one for each.

    UniProt ids give their accession. Characters that are not safe on all systems become `_`. A name that was used
    before gets a number; case is ignored, as `a` and `A` are the same file on a Mac.
    """

    used: set[str] = field(default_factory=set)

    def name(self, id: str) -> str:
        """Return a file name for this id, without suffix, that no earlier id got."""
        safe = re.sub(r"[^A-Za-z0-9._+=@-]", "_", accession(id))[:LONGEST_NAME]
        name = base = safe if re.match("[A-Za-z0-9]", safe) else f"_{safe}"
        count = 1
        while name.casefold() in self.used:
            count += 1
            name = f"{base}_{count}"
        self.used.add(name.casefold())
        return name
