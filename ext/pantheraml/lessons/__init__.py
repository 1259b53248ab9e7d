"""Lessons: complete small jobs on data that every machine has."""
