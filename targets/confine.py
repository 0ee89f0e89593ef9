"""Keeps a process, and all that it starts, to sockets that a network namespace confines.

A network namespace does not hold every address family: vsock reaches from a virtual machine to whatever runs it, past
all namespaces, and adbd listens there too. So a process that must not be reachable gets a seccomp filter under which
only local, IPv4, IPv6 and netlink sockets exist. The filter cannot be taken off again.
"""

import ctypes
import errno
import os
import socket
import struct
from dataclasses import dataclass

from targets.errors import SetupError

__all__ = ["allow_confined_sockets_only"]

_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, 16)  # 16 is netlink
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
# Classic BPF: load a word of seccomp_data, compare, return.
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_OFFSET_NUMBER, _OFFSET_ARCH, _OFFSET_ARG0 = 0, 4, 16
_X32_BIT = 0x40000000


@dataclass(frozen=True)
class _Machine:
    audit_arch: int
    socket_call: int
    io_uring_setup: int = 425


_MACHINES = {"x86_64": _Machine(0xC000003E, 41), "aarch64": _Machine(0xC00000B7, 198)}


def _program(machine: _Machine) -> list[tuple[int, int, int, int]]:
    """Builds the filter: (code, jump if true, jump if false, constant) for each instruction."""
    refuse_family = _ERRNO | errno.EAFNOSUPPORT
    refuse_call = _ERRNO | errno.ENOSYS
    families = [(_EQUAL, len(_FAMILIES) - index, 0, family) for index, family in enumerate(_FAMILIES)]
    return [
        (_LOAD, 0, 0, _OFFSET_ARCH),
        (_EQUAL, 1, 0, machine.audit_arch),
        # Calls of another architecture (32-bit socketcall) would slip past the numbers below.
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
        (_AT_LEAST, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, refuse_call),
        # io_uring opens sockets without the socket call.
        (_EQUAL, 0, 1, machine.io_uring_setup),
        (_RETURN, 0, 0, refuse_call),
        (_EQUAL, 1, 0, machine.socket_call),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, _OFFSET_ARG0),
        *families,
        (_RETURN, 0, 0, refuse_family),
        (_RETURN, 0, 0, _ALLOW),
    ]


def allow_confined_sockets_only() -> None:
    """Puts the filter on this process and on all that it will start.

    Raises:
        SetupError: If the machine is of an unknown architecture, or the kernel refuses the filter.
    """
    name = os.uname().machine
    machine = _MACHINES.get(name)
    if machine is None:
        raise SetupError(f"no socket filter is known for {name}", hint="use an x86-64 or arm64 machine")
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in _program(machine))
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    for step in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header), 0, 0),
    ):
        if prctl(*step) != 0:
            raise SetupError(f"the kernel refuses the socket filter: {os.strerror(ctypes.get_errno())}")
