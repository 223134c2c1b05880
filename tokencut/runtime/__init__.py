"""Devices, processes, compilation and optional packages."""
