"""Checks, seeded instances, the judge and its reports."""
