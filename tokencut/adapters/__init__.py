"""What differs between model families: one adapter a family, found by `adapter_for`."""

from tokencut.adapters import vit  # noqa: F401  (registers itself)
from tokencut.adapters.base import Adapter, adapter_for, known_adapter, supported_modules

__all__ = ["Adapter", "adapter_for", "known_adapter", "supported_modules"]
