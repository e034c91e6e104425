"""What was found in the user's text and is not used: counted and named, never dropped in silence."""

from __future__ import annotations

from pathlib import Path

NAMES_SHOWN = 3

OTHER_KIND = "of a kind that is not read"
UNREADABLE = "that cannot be read"
HIDDEN = "hidden"
LOOP = "that lead back to a folder above them"
TWICE = "that lead to a file that is read already"
NO_SPLIT = "in no split (the folder has a part called train)"
NULL = "without text (null)"
BLANK = "of white space alone"


class LeftOut:
    """Counts what is left out, by kind and reason. Reading the same text again changes nothing."""

    def __init__(self) -> None:
        self._files: dict[str, dict[Path, None]] = {}
        self._documents: dict[str, dict[Path, int]] = {}
        self.few: int | None = None
        """Documents that were found, where they are so few that their blocks are split in place of them."""

    def file(self, path: Path, reason: str) -> None:
        """Note a file or folder that is not read."""
        self._files.setdefault(reason, {})[path] = None

    def documents(self, path: Path, reason: str, count: int) -> None:
        """Note how many documents of a file are left out, once the file was read to its end."""
        if count:
            self._documents.setdefault(reason, {})[path] = count

    def in_files(self) -> list[str]:
        """One line for each reason why files and folders are left out."""
        return [f"{_number(len(paths), 'file or folder', 'files and folders')} {reason}: {_shown(list(paths))}" for reason, paths in self._files.items()]

    def in_documents(self) -> list[str]:
        """One line for each reason why documents are left out."""
        return [
            f"{_number(sum(counts.values()), 'document', 'documents')} {reason}: in {_shown(list(counts))}"
            for reason, counts in self._documents.items()
        ]


def _number(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def printable(name: str) -> str:
    """A name as it is, or escaped where a line of a terminal cannot show it."""
    return name if name.isprintable() else ascii(name)


def _shown(paths: list[Path]) -> str:
    names = list(dict.fromkeys(path.name for path in paths))
    return ", ".join(map(printable, names[:NAMES_SHOWN])) + (", …" if len(names) > NAMES_SHOWN else "")
