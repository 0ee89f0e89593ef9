"""The examination behind `layerfold doctor`: what is here, what is missing, and how to get it."""

__all__ = ["Finding", "examine"]

from pipeline.probes import Finding, libraries, machine, materials, packages


def examine(*, imports: bool = True) -> list[Finding]:
    """Looks at layerfold's own packages, the libraries, the machine, its devices, the data and the weights.

    Nothing is downloaded and no torch is imported into this process.

    Args:
        imports: Whether to import every library in a process of its own, which finds broken installations (some
            seconds), or to compare versions only.

    Returns:
        Findings by area. No run works while a status is `missing` or `broken`; `warning` is for the user to weigh.
    """
    return [*packages.probe(), *libraries.probe(imports=imports), *machine.probe(), *materials.probe()]
