"""Helpers of the tests that cross package borders."""
