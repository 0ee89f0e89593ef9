"""What `layerfold doctor` looks at, by area. Each probe gives `Finding`s and never fails because of what it finds."""

__all__ = ["Finding", "Status"]

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "missing", "broken", "warning", "optional"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: `layerfold`, `library`, `machine`, `device`, `data` or `weights`.
        name: What it is.
        status: `ok`; `missing` or `broken` where no run works without it; `warning` where it may get in the way;
            `optional` where only some runs would use it.
        detail: What was found.
        fix: The command or action that gets or mends it; empty where there is nothing to do.
    """

    area: str
    name: str
    status: Status
    detail: str
    fix: str = ""
