"""Compiles one ONNX model for Qualcomm's HTP, in a process of its own: the compiler is native code and may crash."""

import collections
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["compile_for_htp", "main"]


def compile_for_htp(path: str, htp_arch: str) -> dict[str, Any]:
    """Compiles the model ahead of time; returns what is left of its graph and the size of the compiled part."""
    import onnx
    import onnxruntime
    import onnxruntime_qnn

    onnxruntime.register_execution_provider_library(onnxruntime_qnn.EP_NAME, onnxruntime_qnn.get_library_path())
    devices = [item for item in onnxruntime.get_ep_devices() if item.ep_name == onnxruntime_qnn.EP_NAME]
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "compiled.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        for key, value in {
            "ep.context_enable": "1",
            "ep.context_file_path": str(compiled),
            "ep.context_embed_mode": "0",
        }.items():
            options.add_session_config_entry(key, value)
        settings = {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), "htp_arch": htp_arch}
        options.add_provider_for_devices(devices[:1], settings)
        onnxruntime.InferenceSession(path, options)
        left: collections.Counter[str] = collections.Counter()
        if compiled.exists():
            left.update(node.op_type for node in onnx.load(str(compiled), load_external_data=False).graph.node)
        size = sum(item.stat().st_size for item in Path(folder).glob("*.bin"))
    return {"operators": dict(left), "bytes": size, "version": onnxruntime_qnn.__version__}


def main() -> int:
    """Reads one request from standard input and answers it, by the protocol of `targets.worker`."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(message: Mapping[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    request = json.loads(sys.stdin.readline())
    try:
        found = compile_for_htp(request["models"][0], request["htp_arch"])
    except ImportError as error:
        reply({"event": "error", "kind": "RuntimeMissingError", "message": f"cannot import {error.name}"})
        return 1
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors share no public base class
        reply({"event": "error", "kind": "ModelFileError", "message": f"the HTP compiler refuses: {error}"})
        return 1
    reply({"event": "result", **found})
    return 0
