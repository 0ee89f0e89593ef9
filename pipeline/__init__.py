"""layerfold: turn a pretrained CNN into a shallower, faster on-device model.

The rooms of this package, in the order in which data flows through them: `recipe` → `plan` → `runner` and
`stages` (which call `models`, `data`, `alpha`, `training`, `folding`, `export`) → `results` → `report`.
Importing this package imports none of them, so that the command line stays quick.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
