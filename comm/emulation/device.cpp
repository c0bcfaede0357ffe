// The emulated device: PyTorch's PrivateUse1 device type over host memory. One device; streams without concurrency.
//
// It owns what a vendor's plug-in owns besides operations (kernels.cpp): allocator, guard, streams, events, hooks. It
// says nothing about a vendor's speed or numerics.

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

namespace {

const c10::Device kDevice(c10::DeviceType::PrivateUse1, 0);

// ---------------------------------------------------------------- memory

// What DataPtr carries, so that the bytes can be counted when they are freed.
struct Block {
  void* data;
  size_t bytes;
};

struct EmulatedAllocator final : c10::DeviceAllocator {
  std::atomic<int64_t> allocated{0}, peak{0}, count{0};

  static EmulatedAllocator& get() {
    static auto* allocator = new EmulatedAllocator;  // never destroyed: tensors may outlive static objects
    return *allocator;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) {
      return {nullptr, nullptr, &c10::detail::deleteNothing, kDevice};
    }
    auto* block = new Block{c10::GetCPUAllocator()->raw_allocate(bytes), bytes};
    const int64_t now = allocated += static_cast<int64_t>(bytes);
    for (int64_t seen = peak; seen < now && !peak.compare_exchange_weak(seen, now);) {
    }
    ++count;
    return {block->data, block, &release, kDevice};
  }

  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    c10::GetCPUAllocator()->raw_deallocate(block->data);
    get().allocated -= static_cast<int64_t>(block->bytes);
    --get().count;
    delete block;
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override { peak = allocated.load(); }

  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* bytes : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes}) {
      (*bytes)[0].current = allocated;
      (*bytes)[0].peak = peak;
    }
    stats.allocation[0].current = stats.active[0].current = count;
    return stats;
  }
};

// Pinned memory is ordinary host memory that remembers that it was asked to be pinned.
struct PinnedAllocator final : c10::Allocator {
  std::mutex mutex;
  std::map<const char*, size_t> blocks;  // start -> bytes

  static PinnedAllocator& get() {
    static auto* allocator = new PinnedAllocator;
    return *allocator;
  }

  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::GetCPUAllocator()->raw_allocate(bytes);
    std::lock_guard<std::mutex> lock(mutex);
    blocks[static_cast<char*>(data)] = bytes;
    return {data, data, &release, at::kCPU};
  }

  static void release(void* data) {
    if (data == nullptr) {
      return;
    }
    {
      std::lock_guard<std::mutex> lock(get().mutex);
      get().blocks.erase(static_cast<char*>(data));
    }
    c10::GetCPUAllocator()->raw_deallocate(data);
  }

  bool holds(const void* data) {
    std::lock_guard<std::mutex> lock(mutex);
    auto after = blocks.upper_bound(static_cast<const char*>(data));
    return after != blocks.begin() && static_cast<const char*>(data) < (--after)->first + after->second;
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

// ---------------------------------------------------------------- device, streams, events

// Work is done when the call returns, so a stream is a number and an event is the time at which it was recorded.
thread_local c10::StreamId current_stream = 0;
std::atomic<c10::StreamId> last_stream{0};

using Clock = std::chrono::steady_clock;

struct EmulatedGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice.type(); }
  c10::Device exchangeDevice(c10::Device to) const override {
    setDevice(to);
    return kDevice;
  }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device to) const override {
    TORCH_CHECK(to.index() <= 0, "the emulated device has index 0, there is no index ", int(to.index()));
  }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  static c10::Stream stream(c10::StreamId id) { return c10::Stream(c10::Stream::UNSAFE, kDevice, id); }
  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(++last_stream); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(++last_stream); }
  c10::Stream exchangeStream(c10::Stream to) const override {
    return stream(std::exchange(current_stream, to.id()));
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}

  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) {
      *event = new Clock::time_point;
    }
    *static_cast<Clock::time_point*>(*event) = Clock::now();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Clock::time_point*>(event);
  }
  double elapsedTime(void* start, void* end, const c10::DeviceIndex) const override {
    TORCH_CHECK(start != nullptr && end != nullptr, "both events must be recorded before their distance is asked for");
    return std::chrono::duration<double, std::milli>(
        *static_cast<Clock::time_point*>(end) - *static_cast<Clock::time_point*>(start)).count();
  }
};

struct EmulatedHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex index) const override { EmulatedGuard().setDevice({kDevice.type(), index}); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    setCurrentDevice(index);
    return 0;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  at::Device getDeviceFromPtr(void*) const override { return kDevice; }
  bool isPinnedPtr(const void* data) const override { return PinnedAllocator::get().holds(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &PinnedAllocator::get(); }

  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { no_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { no_generator(); }
  [[noreturn]] static void no_generator() {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "the emulated device draws from the CPU's default generator; seed it with "
                                "torch.manual_seed, or draw with a generator on the CPU and copy");
  }

  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto data = EmulatedAllocator::get().allocate(bytes);
    if (const size_t kept = std::min(bytes, storage.nbytes())) {
      std::memcpy(data.get(), storage.data(), kept);
    }
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

}  // namespace

namespace at {
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &EmulatedAllocator::get())
}
C10_REGISTER_GUARD_IMPL(PrivateUse1, EmulatedGuard)

static const bool hooks_registered = [] {
  at::RegisterPrivateUse1HooksInterface(new EmulatedHooks);
  return true;
}();

TORCH_LIBRARY_FRAGMENT(moe_emulated, m) {
  m.def("allocated_bytes() -> int", [] { return EmulatedAllocator::get().allocated.load(); });
  m.def("peak_bytes() -> int", [] { return EmulatedAllocator::get().peak.load(); });
  m.def("reset_peak_bytes() -> ()", [] { EmulatedAllocator::get().resetPeakStats(0); });
}
