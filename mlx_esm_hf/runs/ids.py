"""Ids that files cannot hold, found before the work, and the names of files for ids."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from mlx_esm_hf.errors import UserError

LONGEST_ID = 1 << 15  # bytes; twice that is the most of a name in a zip archive, and of an attribute in HDF5
HEADER = 99_000_000  # bytes of names; safetensors reads headers of 100 MB
LONGEST_NAME = 150  # characters of a file; with a number and a suffix it stays below 255, and is readable
ID_ARRAY = 1 << 32  # bytes of the ids in an .npz file, an array in which all are as long as the longest


@dataclass
class Ids:
    """The ids that a file is to hold.

    Args:
        suffix: of the file; "" is a folder of shards.
        arrays: of each result, those with a name of their own; 0 where all make one matrix.
    """

    suffix: str
    arrays: int = 0
    count: int = 0
    longest: int = 0
    header: int = 0

    def refuse(self, id: str) -> None:
        """
        Raises:
            ValueError: no file can hold this id.
        """
        try:
            size = len(id.encode())
        except UnicodeEncodeError:
            raise UserError("has an id that is no text, but half of a character") from None
        if size > LONGEST_ID:
            raise UserError(f"has an id of {size} bytes, and files hold {LONGEST_ID} at most")
        if "\0" in id:
            raise UserError("has a NUL in its id, and many programs would end it there")
        if len(id.splitlines()) > 1:
            raise UserError("has an id of several lines")

    def add(self, id: str) -> None:
        """Count an id.

        Raises:
            ValueError: the file cannot hold so many.
        """
        self.count += 1
        self.longest = max(self.longest, len(id))
        name = json.dumps(id)
        # The list of ids is a text within a text; each array has an entry {"dtype":...,"shape":...,"data_offsets":...}.
        self.header += len(json.dumps(name)) + self.arrays * (len(name) + 120)
        if self.suffix == ".safetensors" and self.header > HEADER:
            raise UserError(
                f"The ids of {self.count:,} proteins and more do not fit into the header of a .safetensors file, which "
                "holds 100 MB: choose .h5, .parquet or a folder of shards."
            )
        if self.suffix == ".npz" and not self.arrays and 4 * self.count * self.longest > ID_ARRAY:
            raise UserError(
                f"The ids of {self.count:,} proteins and more, one of {self.longest:,} characters, make an array of "
                "over 4 GiB in an .npz file: choose .h5, .parquet or a folder of shards."
            )


def accession(name: str) -> str:
    """`P12345` of UniProt's `sp|P12345|NAME_HUMAN`; other names as they are."""
    parts = name.split("|")
    return parts[1] if len(parts) == 3 and parts[0] in ("sp", "tr") and parts[1] else name


@dataclass
class FileNames:
    """Names of files, without a suffix, for ids one after the other: of UniProt's the accession, `_` for what is not
    safe in a name everywhere, and a number behind a name that was there before, be it in other letters (`a` and `A` are
    one file on a Mac)."""

    used: set[str] = field(default_factory=set)

    def name(self, id: str) -> str:
        """That of the next id."""
        safe = re.sub(r"[^A-Za-z0-9._+=@-]", "_", accession(id))[:LONGEST_NAME]
        name = base = safe if re.match("[A-Za-z0-9]", safe) else f"_{safe}"
        count = 1
        while name.casefold() in self.used:
            count += 1
            name = f"{base}_{count}"
        self.used.add(name.casefold())
        return name
