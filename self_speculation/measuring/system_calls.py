"""Which system calls a program may not make, as a seccomp filter: a list of instructions for the kernel.

`ALWAYS` is what goes past the limits on memory and past namespaces; `WITHOUT_NAMESPACES` what reaches other processes,
sockets and files' owners and modes, where no namespace of its own keeps a program from them.
"""

import errno
import platform
from dataclasses import dataclass
from enum import Enum

# A filter's instruction: code, jump if true, jump if false, number; None stands for the filtered process' own number.
Instruction = tuple[int, int, int, int | None]

# Instructions, with the places of what they load (see `struct seccomp_data`).
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000
# The architecture's name for the kernel, and the column of the numbers below.
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
# x86_64 has a second set of numbers, from here on.
SECOND_NUMBERS = 0x40000000


class Condition(Enum):
    """When an argument makes a call a refused one."""

    HAS_BIT = "one of the bits is set"
    IS_NUMBER = "it is the number"
    IS_OTHER_PROCESS = "it is a process, and neither this one nor its group"


@dataclass(frozen=True)
class Rule:
    """A refused call: its numbers on x86_64 and on others, and the argument that makes it one; None: every call is."""

    numbers: tuple[int | None, int | None]
    argument: int | None = None
    condition: Condition = Condition.HAS_BIT
    value: int = 0
    # "Not there" makes the C library take another call, whose arguments can be seen.
    error: int = errno.EPERM

    def instructions(self, column: int) -> list[Instruction]:
        """This rule, of which the last instruction is followed by the next rule; the call's number is loaded."""
        number = self.numbers[column]
        if number is None:
            return []
        refuse: Instruction = (RETURN, 0, 0, REFUSE | self.error)
        if self.argument is None:
            return [(JUMP_EQUAL, 0, 1, number), refuse]
        body: list[Instruction] = [(LOAD, 0, 0, ARGUMENTS + 8 * self.argument)]
        if self.condition is Condition.IS_OTHER_PROCESS:
            body += [(JUMP_EQUAL, 2, 0, 0), (JUMP_EQUAL, 1, 0, None), refuse]
        else:
            body += [(JUMP_EQUAL if self.condition is Condition.IS_NUMBER else JUMP_ANY_BIT, 0, 1, self.value), refuse]
        # What is let through has the call's number loaded again, since another rule may be about the same call.
        body.append((LOAD, 0, 0, NUMBER))
        return [(JUMP_EQUAL, 0, len(body), number), *body]


# Any of the clone flags that make a namespace; no bit of it is another flag.
NEW_NAMESPACE = 0x7E020000
# A file without a name, which nobody finds who adds up sizes. The other bit of O_TMPFILE is O_DIRECTORY's.
NAMELESS_FILE = 0x400000

ALWAYS = (
    Rule((319, 279)),  # memfd_create
    Rule((447, 447)),  # memfd_secret
    Rule((29, 194)),  # shmget
    Rule((68, 186)),  # msgget
    Rule((64, 190)),  # semget
    Rule((240, 180)),  # mq_open
    Rule((425, 425)),  # io_uring_setup, which makes other calls unseen
    Rule((323, 282)),  # userfaultfd
    Rule((321, 280)),  # bpf
    Rule((298, 241)),  # perf_event_open
    Rule((248, 217)),  # add_key
    Rule((249, 218)),  # request_key
    Rule((250, 219)),  # keyctl
    Rule((304, 265)),  # open_by_handle_at
    Rule((272, 97)),  # unshare
    Rule((308, 268)),  # setns
    Rule((56, 220), 0, Condition.HAS_BIT, NEW_NAMESPACE),  # clone
    Rule((435, 435), error=errno.ENOSYS),  # clone3
)
WITHOUT_NAMESPACES = (
    Rule((41, 198)),  # socket
    Rule((53, 199), 1, Condition.HAS_BIT, 0xE),  # socketpair of another type than a stream, which may send to any path
    Rule((112, 157)),  # setsid
    Rule((109, 154)),  # setpgid
    Rule((62, 129), 0, Condition.IS_OTHER_PROCESS),  # kill
    Rule((200, 130), 0, Condition.IS_OTHER_PROCESS),  # tkill
    Rule((234, 131), 0, Condition.IS_OTHER_PROCESS),  # tgkill
    Rule((129, 138), 0, Condition.IS_OTHER_PROCESS),  # rt_sigqueueinfo
    Rule((297, 240), 0, Condition.IS_OTHER_PROCESS),  # rt_tgsigqueueinfo
    Rule((424, 424)),  # pidfd_send_signal
    Rule((434, 434)),  # pidfd_open
    Rule((438, 438)),  # pidfd_getfd
    Rule((72, 25), 1, Condition.IS_NUMBER, 8),  # fcntl F_SETOWN, which sends signals
    Rule((72, 25), 1, Condition.IS_NUMBER, 15),  # fcntl F_SETOWN_EX
    Rule((16, 29), 1, Condition.IS_NUMBER, 0x8901),  # ioctl FIOSETOWN
    Rule((16, 29), 1, Condition.IS_NUMBER, 0x8902),  # ioctl SIOCSPGRP
    Rule((302, 261), 0, Condition.IS_OTHER_PROCESS),  # prlimit64
    Rule((101, 117)),  # ptrace
    Rule((310, 270)),  # process_vm_readv
    Rule((311, 271)),  # process_vm_writev
    Rule((440, 440)),  # process_madvise
    Rule((448, 448)),  # process_mrelease
    Rule((256, 238)),  # migrate_pages
    Rule((279, 239)),  # move_pages
    Rule((141, 140)),  # setpriority
    Rule((251, 30)),  # ioprio_set
    Rule((203, 122), 0, Condition.IS_OTHER_PROCESS),  # sched_setaffinity
    Rule((144, 119), 0, Condition.IS_OTHER_PROCESS),  # sched_setscheduler
    Rule((142, 118), 0, Condition.IS_OTHER_PROCESS),  # sched_setparam
    Rule((314, 274), 0, Condition.IS_OTHER_PROCESS),  # sched_setattr
    Rule((2, None), 1, Condition.HAS_BIT, NAMELESS_FILE),  # open
    Rule((257, 56), 2, Condition.HAS_BIT, NAMELESS_FILE),  # openat
    Rule((437, 437), error=errno.ENOSYS),  # openat2
    Rule((90, None)),  # chmod
    Rule((91, 52)),  # fchmod
    Rule((268, 53)),  # fchmodat
    Rule((452, 452)),  # fchmodat2
    Rule((92, None)),  # chown
    Rule((94, None)),  # lchown
    Rule((93, 55)),  # fchown
    Rule((260, 54)),  # fchownat
    Rule((132, None)),  # utime
    Rule((235, None)),  # utimes
    Rule((261, None)),  # futimesat
    Rule((280, 88)),  # utimensat
    Rule((188, 5)),  # setxattr
    Rule((189, 6)),  # lsetxattr
    Rule((190, 7)),  # fsetxattr
    Rule((463, 463)),  # setxattrat
    Rule((197, 14)),  # removexattr
    Rule((198, 15)),  # lremovexattr
    Rule((199, 16)),  # fremovexattr
    Rule((466, 466)),  # removexattrat
    Rule((469, 469)),  # file_setattr
)


def seccomp_filter(rules: tuple[Rule, ...], machine: str = platform.machine()) -> list[Instruction] | None:
    """The filter that refuses these calls and kills who uses another architecture's; None for an unknown machine."""
    if machine not in ARCHITECTURES:
        return None
    architecture, column = ARCHITECTURES[machine]
    start: list[Instruction] = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (JUMP_AT_LEAST, 0, 1, SECOND_NUMBERS),
        (RETURN, 0, 0, KILL),
    ]
    body = [instruction for rule in rules for instruction in rule.instructions(column)]
    return [*start, *body, (RETURN, 0, 0, ALLOW)]
