"""What all faults share: a machine of their own, a bundle, and a look for leaks after each."""

from support.machine import bundle, machine, nothing_is_left  # noqa: F401
