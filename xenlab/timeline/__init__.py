"""Structured trace events, snapshots and deterministic replay."""
