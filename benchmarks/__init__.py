"""Benchmarks: a folder per question; run.py of each is the entry."""
