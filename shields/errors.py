"""Everything that Shields raises on purpose.

    ShieldsError
    ├── ImageError        a photo or tensor cannot be used          (also ValueError)
    ├── ConfigError       a setting makes no sense                  (also ValueError)
    ├── FaceNotFound      a face was required and none was found
    ├── BudgetExceeded    a perturbation leaves its budget
    ├── WeightsError      weights are absent, damaged or do not fit
    ├── DeviceError       the device asked for is not there
    ├── OutputError       a result cannot be written
    ├── UnknownName       a registry or card has no such entry      (also KeyError)
    └── MissingPackage    an optional package is not installed      (also ImportError)

A message says what was needed, what came, and what to do about it.
"""

__all__ = [
    "BudgetExceeded",
    "ConfigError",
    "DeviceError",
    "FaceNotFound",
    "ImageError",
    "MissingPackage",
    "OutputError",
    "ShieldsError",
    "UnknownName",
    "WeightsError",
]


class ShieldsError(Exception):
    """Base of all errors raised on purpose."""


class ImageError(ShieldsError, ValueError):
    """A photo or an image tensor cannot be used as it is."""


class ConfigError(ShieldsError, ValueError):
    """A setting, or a combination of settings, makes no sense."""


class FaceNotFound(ShieldsError):
    """A face was required and the detector found none."""


class BudgetExceeded(ShieldsError):
    """A perturbation leaves its budget."""


class WeightsError(ShieldsError):
    """Weights are absent, damaged or do not fit the network."""


class DeviceError(ShieldsError):
    """The device asked for does not exist on this machine."""


class OutputError(ShieldsError):
    """A result cannot be written to the place asked for."""


class UnknownName(ShieldsError, KeyError):
    """A registry or the set of cards has no entry of that name."""

    def __str__(self) -> str:
        # KeyError would print the repr of the message, quotes and all.
        return str(self.args[0]) if self.args else ""


class MissingPackage(ShieldsError, ImportError):
    """An optional package is not installed."""
