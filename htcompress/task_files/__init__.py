"""Task files as modules that any process can import.

A class of a task that is pickled, for a worker of a DataLoader say, is looked up by its module's name. A task file
has none that could be imported, so it gets one here: `htcompress.task_files.t_<its path, in hexadecimal>`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

_PREFIX = f"{__name__}.t_"


def module_name(file: Path) -> str:
    """The name by which a task file can be imported."""
    return _PREFIX + str(file.resolve()).encode().hex()


def is_beside(module: str | None) -> bool:
    """Whether a module's name is one that a task file would give to what it imports by a dot."""
    return module is not None and f"{module}.".startswith(f"{__name__}.")


class _Loader(SourceFileLoader):
    """Runs a file as Python runs a script: what lies beside it can be imported, then and later."""

    def exec_module(self, module: ModuleType) -> None:
        neighbours_of(str(Path(self.path).parent))
        super().exec_module(module)


class _Neighbours(MetaPathFinder):
    """Finds, after everything else, what lies in the folders of tasks: a model may import when it is run."""

    folders: list[str]

    def __init__(self) -> None:
        self.folders = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if path is not None else PathFinder.find_spec(fullname, self.folders)


_neighbours = _Neighbours()


def neighbours_of(folder: str) -> None:
    """Let modules in a folder be found from now on, before those of folders that were named earlier."""
    _neighbours.folders[:] = [folder, *(other for other in _neighbours.folders if other != folder)]


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_PREFIX):
            return None
        try:
            file = bytes.fromhex(fullname.removeprefix(_PREFIX)).decode()
        except ValueError:
            return None
        return spec_from_file_location(fullname, file, loader=_Loader(fullname, file)) if Path(file).is_file() else None


sys.meta_path += [_Finder(), _neighbours]
