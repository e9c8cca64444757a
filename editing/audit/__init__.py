"""What is wrong with a file of edit records, counted; and a clean copy of it."""

from __future__ import annotations

from editing.audit.auditing import Audit, Fact, audit
from editing.audit.kinds import KINDS, Finding, Kind
from editing.audit.mending import Fixed, fix

__all__ = ["KINDS", "Audit", "Fact", "Finding", "Fixed", "Kind", "audit", "fix"]
