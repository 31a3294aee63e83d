"""Stand-ins for what a peer imports and a prefix cache never calls: CUDA kernels, servers, codecs.

They let the peer's real cache, unpatched, be imported on a machine without CUDA. None is on a path that is timed.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

__all__ = ["stand_in_for"]


class _AnyClass(type):
    """A class that has every attribute."""

    def __getattr__(cls, name: str) -> Any:  # noqa: ANN401  whatever is asked for
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def _any_schema(*_: object) -> Any:  # noqa: ANN401  pydantic's own type
    from importlib import import_module

    return import_module("pydantic_core").core_schema.any_schema()


class _AnyModule(ModuleType):
    """A module in which every name is a class."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  whatever is asked for
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        body = {
            "__init__": lambda _self, *_args, **_options: None,
            "__class_getitem__": classmethod(lambda cls, _item: cls),
            "__getattr__": lambda _self, _name: MagicMock(),
            "__get_pydantic_core_schema__": staticmethod(_any_schema),
        }
        made = _AnyClass(name, (), body)
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    """Finds the modules under these names."""

    def __init__(self, names: str) -> None:
        self.names = frozenset(names.split())

    def find_spec(self, fullname: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        parts = fullname.split(".")
        heads = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
        return ModuleSpec(fullname, self, is_package=True) if heads & self.names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _AnyModule(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def stand_in_for(names: str, *, instead_of: str = "") -> None:
    """From now on every import of these modules, and of what lies below them, succeeds.

    Args:
        names: absent packages, separated by blanks; one that is installed is used as it is.
        instead_of: modules that are installed and would pull in what is not.
    """
    sys.meta_path.append(_Finder(names))
    sys.meta_path.insert(0, _Finder(instead_of))
