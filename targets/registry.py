"""Finds targets by name: the built-in ones, and those that other packages register.

Another package adds a target through the entry-point group ``layerfold.targets``; the entry point is a callable that
takes options as keywords and returns a `targets.base.Target`.
"""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from targets.base import Device, Target
from targets.errors import OptionError, SetupError, UnknownTargetError

__all__ = ["ENTRY_POINT_GROUP", "devices", "get", "names", "options", "takes", "with_defaults"]

ENTRY_POINT_GROUP = "layerfold.targets"
_BUILT_IN: Mapping[str, str] = {
    "host-litert": "targets.host:litert",
    "host-ort": "targets.host:ort",
    "emulated-arm64": "targets.emulated:EmulatedTarget",
    "android": "targets.android:AndroidTarget",
    "ssh": "targets.ssh:SshTarget",
    "ethos-u": "targets.ethos_u:EthosUTarget",
    "qnn-htp": "targets.qnn:QnnTarget",
}
# Functions that list what is attached, each for one kind of target.
_LISTERS = ("targets.host:devices", "targets.emulated:devices", "targets.android:devices")


def names() -> list[str]:
    """Returns the names of all targets: built-in ones first, then those of other packages."""
    others = sorted({point.name for point in entry_points(group=ENTRY_POINT_GROUP)} - set(_BUILT_IN))
    return [*_BUILT_IN, *others]


def get(name: str, **options: Any) -> Target:
    """Makes a target.

    Args:
        name: One of `names`, optionally with the device after a colon: ``android:SERIAL``, ``ssh:user@board``.
        options: What the target's factory takes, such as ``threads=1``.

    Raises:
        UnknownTargetError: If no target has that name.
        OptionError: If the target does not take one of the options.
        SetupError: If another package's target cannot be loaded.
    """
    base, colon, instance = name.partition(":")
    if colon:
        options = {"device": instance, **options}
    factory = _factory(base)
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise OptionError(f"target {base}: {error}", hint=f"it takes {_options(factory)}") from error
    target: Target = factory(**options)
    return target


def with_defaults(name: str, options: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """A target's options over those of the defaults that it takes; raises `UnknownTargetError` for an unknown name."""
    return {key: value for key, value in defaults.items() if takes(name, key)} | dict(options)


def takes(name: str, option: str) -> bool:
    """Says whether a target takes an option; raises `UnknownTargetError` if no target has that name."""
    factory = _factory(name.partition(":")[0])
    parameters = inspect.signature(factory).parameters
    if option in parameters:
        return True
    # A class that takes more than its signature says may list it; else it has to be asked by giving it.
    further = getattr(factory, "further_options", None)
    return any(item.kind is item.VAR_KEYWORD for item in parameters.values()) and (further is None or option in further)


def devices() -> list[Device]:
    """Lists what is attached or set up, and in which state; nothing here raises because a device is absent."""
    found: list[Device] = []
    for lister in _LISTERS:
        found += _load(lister)()
    return found


def _factory(name: str) -> Callable[..., Any]:
    if name in _BUILT_IN:
        return _load(_BUILT_IN[name])
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == name:
            try:
                loaded: Callable[..., Any] = point.load()
            except Exception as error:  # another package's module may raise anything
                owner = point.dist.name if point.dist is not None else "another package"
                hint = f"mend or remove {owner}"
                raise SetupError(f"target {name} of {owner} cannot be loaded: {error!r}", hint=hint) from error
            return loaded
    close = get_close_matches(name, names(), n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"known targets: {', '.join(names())}"
    raise UnknownTargetError(f"no target is named '{name}'", hint=hint)


def _load(reference: str) -> Callable[..., Any]:
    module, _, attribute = reference.partition(":")
    loaded: Callable[..., Any] = getattr(import_module(module), attribute)
    return loaded


def options(name: str) -> str:
    """Returns the names of the options that a target takes, as one line.

    Raises:
        UnknownTargetError: If no target has that name.
    """
    return _options(_factory(name))


def _options(factory: Callable[..., Any]) -> str:
    taken = [name for name, item in inspect.signature(factory).parameters.items() if item.kind is not item.VAR_KEYWORD]
    # What a class takes beyond its signature it names itself.
    return ", ".join([*taken, *getattr(factory, "further_options", ())]) or "no options"
