"""Blocks of other workers: who has what, and how their bytes come here."""
