"""A script that becomes a Python without any means to do harm: `python -I -S confine.py SECONDS BYTES` (Linux).

In: a program on stdin, limits as arguments. The process gives up its capabilities and all means to get new ones, limits
its CPU time, memory and files, and lets a seccomp filter refuse every system call that is not in `_ALLOWED`: no socket,
no new process or thread, no signal to others, no file opened but for reading. Where the kernel has Landlock (5.13) the
process also enters a domain, from which no other process's memory or environment is read. Then it replaces itself by a
Python that runs stdin; limits, filter and domain stay with it. All of this works for an ordinary user and for root, in
containers too, since a process may always filter itself. Only the standard library is imported, before and after.

The numbers of system calls are those of the kernel's headers (asm/unistd_64.h, asm-generic/unistd.h).
"""

import ctypes
import os
import platform
import resource
import struct
import sys

_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    **{"read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67)},
    **{"close": (3, 57), "lseek": (8, 62), "dup": (32, 23), "dup3": (292, 24)},
    **{"stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291)},
    **{"access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "getdents64": (217, 61)},
    **{"getcwd": (79, 17), "readlink": (89, None), "readlinkat": (267, 78)},
    **{"mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233)},
    **{"brk": (12, 214), "membarrier": (324, 283), "futex": (202, 98), "rseq": (334, 293)},
    **{"rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132)},
    **{"getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175)},
    **{"getgid": (104, 176), "getegid": (108, 177), "uname": (63, 160), "sysinfo": (99, 179), "times": (100, 153)},
    **{"getrusage": (98, 165), "getrlimit": (97, 163), "getrandom": (318, 278), "gettimeofday": (96, 169)},
    **{"time": (201, None), "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115)},
    **{"nanosleep": (35, 101), "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72)},
    **{"sched_yield": (24, 124), "sched_getaffinity": (204, 123), "arch_prctl": (158, None)},
    **{"set_tid_address": (218, 96), "set_robust_list": (273, 99), "execve": (59, 221)},
    **{"exit": (60, 93), "exit_group": (231, 94)},
}
"""System calls by their numbers on x86_64 and on aarch64; None: that machine has no such call."""
_OPENAT, _PRLIMIT = (257, 56), (302, 261)
"""Allowed for reading only: a file without a flag that writes or makes one, limits without new ones."""
_FCNTL, _FCNTL_COMMANDS = (72, 25), (0, 1, 2, 3, 1030)
"""fcntl copies descriptors and reads their flags (F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC), no more: others
have the kernel send a process a signal for a pipe (F_SETOWN, F_SETSIG, F_SETFL)."""
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Position in the pairs above, and the kernel's name of the machine (AUDIT_ARCH_*)."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000
"""What the filter returns: let the call through, fail with EPERM, end the process."""
_NUMBER, _MACHINE = 0, 4
_FIRST_FOREIGN_NUMBER = 0x40000000
"""From here on x86_64 counts the calls of its 32-bit pointers (x32)."""
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446
_CHANGES_OF_FILES = 0x1FF2
"""Landlock's rights of its first version to write, remove and make files: all that do not read or execute."""
_SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _DROP_CAPABILITY, _FILTER = 38, 22, 24, 2


def _argument(index: int, *, high: bool = False) -> int:
    """Return the offset of half an argument in seccomp_data, little-endian."""
    return 16 + 8 * index + (4 if high else 0)


def filter_program(machine: str) -> list[tuple[int, int, int, int]]:
    """Return the filter in classic BPF: operation, steps to jump where it holds and where not, operand."""
    position, audit_name = _MACHINES[machine]
    numbers = [number for pair in _ALLOWED.values() if (number := pair[position]) is not None]
    program = [
        (_LOAD, 0, 0, _MACHINE),
        (_EQUAL, 1, 0, audit_name),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _FIRST_FOREIGN_NUMBER),
        (_RETURN, 0, 0, _KILL),
    ]
    for number in numbers:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    program += [
        (_EQUAL, 0, 4, _OPENAT[position]),
        (_LOAD, 0, 0, _argument(2)),
        (_ANY_BIT, 0, 1, _WRITES),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
        (_EQUAL, 0, 2 * len(_FCNTL_COMMANDS) + 2, _FCNTL[position]),
        (_LOAD, 0, 0, _argument(1)),
    ]
    for command in _FCNTL_COMMANDS:
        program += [(_EQUAL, 0, 1, command), (_RETURN, 0, 0, _ALLOW)]
    program += [
        (_RETURN, 0, 0, _REFUSE),
        (_EQUAL, 0, 5, _PRLIMIT[position]),
        (_LOAD, 0, 0, _argument(2)),
        (_EQUAL, 0, 3, 0),
        (_LOAD, 0, 0, _argument(2, high=True)),
        (_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    return program


def confine(seconds: int, memory_bytes: int) -> None:
    """Give up all that could do harm. Raises OSError where the kernel does not let the process filter itself."""
    program = filter_program(platform.machine())
    for name, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(name, (limit, limit))
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(64):  # those that there are not, and an ordinary user's, cannot be dropped and need not be
        libc.prctl(_DROP_CAPABILITY, capability, 0, 0, 0)
    rows = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(rows)))
    if libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel refuses to confine this process")
    _enter_domain(libc)
    if libc.prctl(_SET_SECCOMP, _FILTER, ctypes.c_void_p(ctypes.addressof(header)), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel refuses to confine this process")


def _enter_domain(libc: ctypes.CDLL) -> None:
    """Enter a Landlock domain without a right to change files; a kernel that has no Landlock stays as it is."""
    rights = ctypes.c_uint64(_CHANGES_OF_FILES)
    ruleset = libc.syscall(_LANDLOCK_CREATE_RULESET, ctypes.byref(rights), ctypes.c_size_t(8), 0)
    if ruleset >= 0:
        libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0)
        os.close(ruleset)


if __name__ == "__main__":
    confine(int(sys.argv[1]), int(sys.argv[2]))
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-"])
