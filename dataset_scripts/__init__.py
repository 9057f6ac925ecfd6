"""Builders that turn raw scans into data sets."""
