"""The version, which the package and what it reports of itself share."""

__version__ = "0.1.0"
