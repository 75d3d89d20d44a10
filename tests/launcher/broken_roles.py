"""The product's own roles with one rule of the host changed, for runs that the checker must fail. The zygote imports it by name."""

from __future__ import annotations

from host import shell
from host.x86 import X86
from proto.machine import Path
from proto.run import RunContext
from proto.wire import Exit
from tests.zoo.core import Patch, patched

_setup = X86.setup


def _setup_with_a_gap(self: X86, record: Exit, hvp: int) -> Path:
    """Every attempt uses up two numbers (I2)."""
    self.id = (self.id + 1) & 0xFFFF_FFFF
    return _setup(self, record, hvp)


def host_main(ctx: RunContext) -> None:
    """The host, with the changed rule."""
    with patched([Patch(X86, "setup", _setup_with_a_gap)]):
        shell.main(ctx)


def warm() -> None:
    """As the host's."""
    shell.warm()
