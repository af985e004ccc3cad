"""The gate for CI: a report held against limits. It needs no torch."""

from htcompress.checks.config import Target, read_targets
from htcompress.checks.limits import RULES, Limit, Rule, parse_limit
from htcompress.checks.verdict import Check, Verdict, check, exit_code, judge

__all__ = [
    "RULES",
    "Check",
    "Limit",
    "Rule",
    "Target",
    "Verdict",
    "check",
    "exit_code",
    "judge",
    "parse_limit",
    "read_targets",
]
