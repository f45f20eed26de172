// A device called cuda for torch builds that have none: no memory, no streams, only what torch asks before it looks at
// tensors. Must be loaded before torch's own libraries, whose two functions below it stands in front of.
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using namespace c10;

struct PlayedGuard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  void record(void **, const Stream &, const DeviceIndex, const EventFlag) const override {}
  void block(void *, const Stream &) const override {}
  bool queryEvent(void *) const override { return true; }
};

struct PlayedHooks final : at::CUDAHooksInterface {
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};

C10_REGISTER_GUARD_IMPL(CUDA, PlayedGuard)

}  // namespace

// Autograd asks for the accelerator before it walks a graph, and whether it has been used at all.
std::optional<c10::DeviceType> at::accelerator::getAccelerator(bool) { return c10::DeviceType::CUDA; }

const at::CUDAHooksInterface &at::detail::getCUDAHooks() {
  static const PlayedHooks hooks;
  return hooks;
}
