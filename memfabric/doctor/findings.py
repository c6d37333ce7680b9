"""What an examination finds, as data."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

SHOWN_CHARACTERS = 100


class Severity(enum.Enum):
    """How much a finding matters; the worst first."""

    PROBLEM = "problem"
    """Something that is there, or that everybody needs, does not work."""
    WARNING = "warning"
    """It works, but slower or less safely than it could."""
    INFO = "info"
    """Worth knowing; nothing is wrong."""
    OK = "ok"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: what it is about, one or two words.
        severity: how much it matters.
        what: what was found.
        why: why it matters; empty where that is plain.
        fix: what to do about it, in lines that a shell takes: commands, and remarks after ``#``. Empty where nothing
            is to be done. Commands that change the host need its administrator.
    """

    area: str
    severity: Severity
    what: str
    why: str = ""
    fix: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TransportVerdict:
    """Whether a transport can be used here.

    Attributes:
        name: of the transport.
        usable: whether it can be used.
        detail: by what, where it can be used; why not, where it can't.
        slower: why it is slower than it could be; empty where nothing is known to slow it.
    """

    name: str
    usable: bool
    detail: str
    slower: str = ""

    @property
    def words(self) -> str:
        """The verdict in a line; `detail` is part of it only where it is the reason."""
        if not self.usable:
            return f"not usable because {self.detail}"
        return f"usable, but slower because {self.slower}" if self.slower else "usable"


@dataclasses.dataclass(frozen=True)
class Report:
    """An examination: findings, the worst first, and a verdict on each transport."""

    findings: list[Finding]
    transports: list[TransportVerdict]

    @property
    def problems(self) -> int:
        """Findings that are problems."""
        return self.count(Severity.PROBLEM)

    def count(self, severity: Severity) -> int:
        """How many findings are of that severity."""
        return sum(finding.severity is severity for finding in self.findings)

    def document(self) -> dict[str, Any]:
        """For JSON; docs/doctor.md lists the fields."""
        return {
            "transports": [dataclasses.asdict(each) for each in self.transports],
            "findings": [
                {**dataclasses.asdict(each), "severity": each.severity.value, "fix": list(each.fix)}
                for each in self.findings
            ],
            "problems": self.problems,
            "warnings": self.count(Severity.WARNING),
        }


def shown(text: str, most: int = SHOWN_CHARACTERS) -> str:
    """Foreign text for a terminal: one line of printable ASCII, at most `most` characters.

    What a kernel, a driver or a library wrote may hold anything, sequences that steer a terminal among it.
    """
    line = " ".join(text.split())
    clean = "".join(letter if " " <= letter <= "~" else "?" for letter in line)
    return clean if len(clean) <= most else f"{clean[: most - 3]}..."
