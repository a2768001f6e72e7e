"""Do Triton kernels start here? Tried before a run depends on it.

A GPU is not enough. When the first kernel is launched Triton compiles the C that launches kernels:
it needs a C compiler and Python's headers at run time, and a cache folder that can be written.
"""

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from triton import knobs
from triton.runtime.build import compile_module_from_src

from gardo_kernels.philox import random_uniform

# The least that needs what Triton's own C needs: compiled, linked, and loaded by this Python.
MODULE = """
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "gardo_trial", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_gardo_trial(void) { return PyModule_Create(&definition); }
"""


def triton_trouble(device: torch.device) -> str:
    """Why a small kernel does not run on the device, and what to do; "" where it runs.

    Compiles it unless Triton's cache has it: seconds at most, and a run needs that kernel anyway.
    """
    try:
        sample_id_B = torch.zeros(1, dtype=torch.int64, device=device)
        random_uniform(0, sample_id_B, 0, 1, backend="triton").cpu()
    except Exception as error:  # whatever a compiler, a linker or a driver can say
        failed = f"Triton kernels do not start: {_words(error)}"
        return cache_trouble() or compiler_trouble() or failed
    return ""


def cache_trouble() -> str:
    """Why Triton's cache folder cannot be written, and what to do; "" where it can."""
    folder = Path(knobs.cache.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return (
            f"Triton's cache folder {folder} cannot be written ({error.strerror}); name one that "
            "can with TRITON_CACHE_DIR"
        )
    return ""


def compiler_trouble() -> str:
    """Why Triton cannot compile C for this Python, and what to do; "" where it can."""
    headers = Path(sysconfig.get_config_var("INCLUDEPY"))
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    if not (headers / "Python.h").is_file():
        return (
            f"Triton needs {headers / 'Python.h'}, which is not here; Debian, Ubuntu: apt-get "
            f"install {package}"
        )
    try:
        # a folder of its own: what an earlier compiler made would say nothing about this one
        with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
            knobs.cache.dir = folder
            compile_module_from_src(MODULE, "gardo_trial")
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        return (
            f"Triton needs a C compiler, and none works here ({_words(error)}); Debian, Ubuntu: "
            f"apt-get install gcc {package}; or name one with CC"
        )
    return ""


def _words(error: Exception) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0].rstrip(".")
