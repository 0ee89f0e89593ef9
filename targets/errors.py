"""The exceptions that `targets` raises on purpose.

    TargetError
    ├── UnknownTargetError     no target goes by that name
    ├── OptionError            an option or a count has a value that makes no sense
    ├── RuntimeMissingError    the runtime or a tool is not installed
    ├── ModelFileError         the file is missing, damaged, or not what the runtime runs
    ├── WorkerError            the process that runs the model died or broke its protocol
    ├── TimeoutExpiredError    something took longer than its limit
    ├── ParseError             a tool's output has no trustworthy figure in it
    ├── MismatchError          outputs that must be equal are not
    ├── SetupError             a target could not be set up
    ├── StatsError             measurements that cannot be compared
    ├── UnexpectedError        a target broke in a way that nobody foresaw: a mistake in its code
    └── DeviceError            a device cannot be used
        ├── DeviceNotFoundError    no device, or not the one asked for
        ├── DeviceAmbiguousError   several devices and none was named
        ├── DeviceBusyError        another run holds the device
        ├── DeviceLostError        the device went away during the run
        ├── DeviceFullError        no room on the device
        └── TransferError          what arrived is not what was sent

A target raises these; `targets.bench.collect` turns them into failure rows, so that one failing device does not
cost the rows of the others. Every message says what is wrong and where; `hint` says what to do about it.
"""

__all__ = [
    "DeviceAmbiguousError",
    "DeviceBusyError",
    "DeviceError",
    "DeviceFullError",
    "DeviceLostError",
    "DeviceNotFoundError",
    "MismatchError",
    "ModelFileError",
    "OptionError",
    "ParseError",
    "RuntimeMissingError",
    "SetupError",
    "StatsError",
    "TargetError",
    "TimeoutExpiredError",
    "TransferError",
    "UnexpectedError",
    "UnknownTargetError",
    "WorkerError",
    "by_name",
]


class TargetError(Exception):
    """Base of the tree.

    Args:
        what: What is wrong, naming the target, device, file or option and the value found.
        hint: What the user can do about it, in one sentence; may be empty.
    """

    exit_code = 2

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}\n  fix: {self.hint}" if self.hint else self.what


class UnknownTargetError(TargetError):
    """No target goes by that name."""


class OptionError(TargetError):
    """An option or a count has a value that makes no sense."""


class RuntimeMissingError(TargetError):
    """The runtime or a tool is not installed."""


class ModelFileError(TargetError):
    """The file is missing, damaged, or not what the runtime runs."""


class WorkerError(TargetError):
    """The process that runs the model died or broke its protocol."""


class TimeoutExpiredError(TargetError):
    """Something took longer than its limit."""


class ParseError(TargetError):
    """A tool's output has no trustworthy figure in it."""


class MismatchError(TargetError):
    """Outputs that must be equal are not."""


class SetupError(TargetError):
    """A target could not be set up."""


class StatsError(TargetError):
    """Measurements that cannot be compared."""


class UnexpectedError(TargetError):
    """A target broke in a way that nobody foresaw."""


class DeviceError(TargetError):
    """A device cannot be used."""


class DeviceNotFoundError(DeviceError):
    """No device is attached, or not the one asked for."""


class DeviceAmbiguousError(DeviceError):
    """Several devices are attached and none was named."""


class DeviceBusyError(DeviceError):
    """Another run holds the device."""


class DeviceLostError(DeviceError):
    """The device went away during the run."""


class DeviceFullError(DeviceError):
    """There is no room on the device."""


class TransferError(DeviceError):
    """What arrived is not what was sent."""


def by_name(name: str) -> type[TargetError]:
    """Returns the class that a worker named in its error reply; an unknown name is a `WorkerError`."""
    found = globals().get(name)
    if isinstance(found, type) and issubclass(found, TargetError):
        return found
    return WorkerError
