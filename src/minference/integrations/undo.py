"""What every handle of an attached host shares: leaving its context undoes the attachment."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Detachable:
    """Something that was attached; `with` detaches it at the end, after an error too."""

    def detach(self) -> None:
        """Puts the host back as it was."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()
