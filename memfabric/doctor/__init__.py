"""What this host can do for a pool, and what keeps it from doing better. It looks; it never changes anything."""

from memfabric.doctor.examination import examine
from memfabric.doctor.findings import Finding, Report, Severity, TransportVerdict
from memfabric.doctor.system import System

__all__ = ["Finding", "Report", "Severity", "System", "TransportVerdict", "examine"]
