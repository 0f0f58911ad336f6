"""Parity with Tinker, the service that the study ran on: a reference for tests only."""
