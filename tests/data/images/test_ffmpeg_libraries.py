import ctypes
import platform
import subprocess
import sys

import pytest

from rlinf_core.data.images.decoders import MACHINES, alias_library, lend_ffmpeg

here = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in MACHINES, reason="lends libraries on Linux only"
)


@here
def test_an_alias_brings_what_it_needs(tmp_path):
    """A library loads under a name that is not its file's, and hands out the symbols of the one behind it."""
    path = tmp_path / "other_name.so"
    path.write_bytes(alias_library("librlinf_alias_of_libm.so.1", "libm.so.6", MACHINES[platform.machine()]))
    cosine = ctypes.CDLL(str(path)).cos
    cosine.restype, cosine.argtypes = ctypes.c_double, [ctypes.c_double]
    assert cosine(0.0) == 1.0
    path.unlink()
    ctypes.CDLL("librlinf_alias_of_libm.so.1")  # Its name alone is enough now: this is what torchcodec relies on.


@here
def test_torchcodec_loads_with_pyavs_libraries_and_there_is_one_ffmpeg():
    code = """
import sys
from rlinf_core.data.images.decoders import lend_ffmpeg
assert lend_ffmpeg() == lend_ffmpeg() and "torch" not in sys.modules
import torchcodec.decoders
fields = [line.split() for line in open("/proc/self/maps") if "/libavcodec" in line]
loaded = {one[5] for one in fields if "(deleted)" not in one}
assert len(loaded) == 1 and "av.libs" in loaded.pop(), loaded
assert "rwxp" not in next(line for line in open("/proc/self/maps") if "[stack]" in line)
"""
    if not lend_ffmpeg():
        pytest.skip("this PyAV brings no libraries")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
