"""Plain data that training scripts keep beside a state, for torch's restricted unpickler.

Nothing of it is needed, so nothing of it is made: each name stands for a class here that takes any
arguments and keeps none, and no function of another package is called.
"""

from __future__ import annotations

from typing import Any


class Inert:
    """In place of an object of another package."""

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class InertMapping:
    """In place of a mapping of another package: a dictionary, which the unpickler fills."""

    def __new__(cls, *_: Any, **__: Any) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


_PATHS = ("Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")

_OBJECTS = (
    *("argparse.Namespace", "types.SimpleNamespace", "typing.Any", "uuid.UUID"),
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *("decimal.Decimal", "fractions.Fraction", "numpy.dtype", "numpy.ndarray"),
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    *(
        f"builtins.{name}"
        for name in ("bool", "bytes", "dict", "float", "frozenset", "int", "list", "str", "tuple")
    ),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "omegaconf.nodes.AnyNode"),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
)

_MAPPINGS = (
    *("collections.defaultdict", "pytorch_lightning.utilities.parsing.AttributeDict"),
    *("lightning_fabric.utilities.data.AttributeDict",),
    *("lightning.fabric.utilities.data.AttributeDict",),
)

SAFE_GLOBALS: list[Any] = [
    *((Inert, name) for name in _OBJECTS),
    *((InertMapping, name) for name in _MAPPINGS),
]
"""For ``torch.serialization.safe_globals``: what each name in a pickle stands for."""
