"""The names of all modules of the project's packages."""

import pkgutil

import htcompress_cli

import htcompress

MODULES = [
    name
    for package in (htcompress, htcompress_cli)
    for name in (
        package.__name__,
        *(module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")),
    )
]
