"""Makes a CPU build of torch believe that there is one CUDA device, which does nothing; or one of
Apple's, where SHADOW_DEVICE says mps.

    import device_guard            before torch is imported anywhere in the process

torch has such a device guard for CUDA builds without a GPU. A CPU build lacks it, refuses to write
to a tensor that says cuda:0, and has no accelerator for autograd's engine. g++ compiles the guard
once. Nothing else may be tested in such a process, since all code then sees a device.
"""

import ctypes
import os
import subprocess
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

SOURCE = r"""
#include HEADER
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
const c10::Device ONLY(c10::DeviceType::KIND, 0);
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::KIND> {
  static constexpr c10::DeviceType static_type = c10::DeviceType::KIND;
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, ONLY); }
  c10::Device exchangeDevice(c10::Device) const override { return ONLY; }
  c10::Device getDevice() const override { return ONLY; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getNewStream(c10::Device, int = 0) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
};
}  // namespace
namespace c10 { C10_REGISTER_GUARD_IMPL(KIND, Guard); }
namespace at {
struct Hooks final : HOOKS {
  Hooks() = default;
  explicit Hooks(ARGUMENTS) {}
  void init() const override {}
  bool HAS() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
};
using REGISTERED = Hooks;
REGISTER(REGISTERED);
}  // namespace at
"""


NAMES = {  # what the source above is compiled with
    "cuda": {
        "KIND": "CUDA", "HOOKS": "CUDAHooksInterface", "ARGUMENTS": "CUDAHooksArgs",
        "HAS": "hasCUDA", "REGISTER": "REGISTER_CUDA_HOOKS", "REGISTERED": "CUDAHooks",
    },
    "mps": {
        "KIND": "MPS", "HOOKS": "MPSHooksInterface", "ARGUMENTS": "MPSHooksArgs",
        "HAS": "hasMPS", "REGISTER": "REGISTER_MPS_HOOKS", "REGISTERED": "MPSHooks",
    },
}  # fmt: skip


def install() -> None:
    """Compile the guard, unless this version of torch has one already, and load it."""
    found, torch_version = find_spec("torch"), version("torch")
    assert found is not None
    assert found.origin is not None
    root = Path(found.origin).parent
    if "cuda: Optional[str] = None" not in (root / "version.py").read_text():
        return
    kind = "mps" if os.environ.get("SHADOW_DEVICE") == "mps" else "cuda"
    key = f"{kind}-{torch_version}-{crc32(str(root).encode()):08x}"  # it names torch's folder
    library = Path(tempfile.gettempdir()) / f"lorafold-guard-{key}.so"
    if not library.exists():
        own = Path(tempfile.mkdtemp()) / library.name
        flags = ["-O1", "-shared", "-fPIC", "-std=c++20", f"-I{root}/include", f"-L{root}/lib"]
        names = {"HEADER": f"<ATen/detail/{NAMES[kind]['HOOKS']}.h>", **NAMES[kind]}
        flags += [f"-D{name}={value}" for name, value in names.items()]
        linked = ["-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root}/lib", "-o", str(own)]
        command = ["g++", *flags, "-xc++", "-", *linked]
        subprocess.run(command, input=SOURCE.encode(), check=True)
        own.replace(library)
    ctypes.CDLL(str(library))


install()
