"""Optional libraries, asked for by the name of the extra that installs them."""

__all__ = ["require", "require_installed"]

import importlib
import importlib.util
import warnings
from types import ModuleType

from pipeline.errors import ExportError


def require(module: str, *, extra: str) -> ModuleType:
    """Imports an optional library.

    Args:
        module: Dotted module name, such as ``"onnxruntime.quantization"``.
        extra: The extra of this distribution that installs it, such as ``"onnx"``.

    Raises:
        ExportError: The library is not installed; the hint is the command that installs it.
    """
    try:
        with warnings.catch_warnings():
            # Deprecations inside the libraries' own import graphs are theirs to mend.
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ExportError(
            f"'{package}' cannot be imported ({error})", hint=f"pip install 'layerfold[{extra}]'"
        ) from error


def require_installed(package: str, *, extra: str) -> None:
    """Looks for an optional library without importing it, which may take seconds.

    Raises:
        ExportError: It is not installed; the hint is the command that installs it.
    """
    if importlib.util.find_spec(package) is None:
        raise ExportError(f"'{package}' is not installed", hint=f"pip install 'layerfold[{extra}]'")
