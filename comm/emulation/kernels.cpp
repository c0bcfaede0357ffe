// The emulated device's operations: the CPU's, on CPU tensors that share the device's (host) memory.
//
// Only what makes or moves tensors has kernels of its own; all else falls back to the CPU's, without copying its inputs.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/is_set_to_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <atomic>
#include <utility>

namespace {

using at::IntArrayRef;
using at::Tensor;
using std::optional;

// ---------------------------------------------------------------- copies

std::atomic<int64_t> copies_to_device{0}, bytes_to_device{0}, copies_to_host{0}, bytes_to_host{0};
thread_local bool in_fallback = false;  // its copies are no transfers that a user asked for

// A CPU tensor on the memory of a device tensor. Resizing it gives it memory of its own and leaves the device's alone.
Tensor host_view(const Tensor& tensor) {
  const c10::Storage held = tensor.storage();
  c10::DataPtr data(held.mutable_data(), new c10::Storage(held),
                    [](void* storage) { delete static_cast<c10::Storage*>(storage); }, at::kCPU);
  c10::Storage storage(c10::Storage::use_byte_size_t(), held.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
  auto view = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  view._set_conj(tensor.is_conj());
  view._set_neg(tensor.is_neg());
  return view;
}

Tensor on_host(const Tensor& tensor) { return tensor.is_privateuseone() ? host_view(tensor) : tensor; }

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  TORCH_CHECK(from.defined() && to.defined(), "copying needs two tensors");
  if (!in_fallback && from.device().type() != to.device().type()) {
    ++(to.is_cpu() ? copies_to_host : copies_to_device);
    (to.is_cpu() ? bytes_to_host : bytes_to_device) += static_cast<int64_t>(from.nbytes());
  }
  on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (from.sizes() != to.sizes()) {
    at::native::resize_(to, from.sizes());
  } else if (from.is_same_size(to) && from.const_data_ptr() == to.const_data_ptr()) {
    return to;  // the fallback wrote through host_view
  }
  return copy_from(from, to, false);
}

// What the fallback hands to the CPU's kernels: no copy.
std::vector<Tensor> to_cpu(at::TensorList tensors) {
  std::vector<Tensor> views;
  views.reserve(tensors.size());
  for (const auto& tensor : tensors) {
    views.push_back(in_fallback ? on_host(tensor) : tensor.to(at::kCPU));
  }
  return views;
}

void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  struct Mark {
    bool before = std::exchange(in_fallback, true);
    ~Mark() { in_fallback = before; }
  } mark;
  at::native::cpu_fallback(op, stack);
}

// ---------------------------------------------------------------- operations that must not go through the CPU

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

c10::Allocator* allocator() { return c10::GetAllocator(c10::DeviceType::PrivateUse1); }

void check_options(optional<at::Layout> layout, optional<c10::Device> device, optional<bool> pinned) {
  TORCH_CHECK(c10::layout_or_default(layout) == at::kStrided, "the emulated device has strided tensors only");
  TORCH_CHECK(!c10::pinned_memory_or_default(pinned), "pinned memory is host memory: use device='cpu'");
  const auto index = c10::device_or_default(device).index();
  TORCH_CHECK(index <= 0, "the emulated device has index 0, there is no index ", int(index));
}

Tensor empty(IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout> layout,
             optional<c10::Device> device, optional<bool> pinned, optional<at::MemoryFormat> format) {
  check_options(layout, device, pinned);
  return at::detail::empty_generic(size, allocator(), kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<at::ScalarType> dtype, optional<at::Layout> layout,
                     optional<c10::Device> device, optional<bool> pinned) {
  check_options(layout, device, pinned);
  return at::detail::empty_strided_generic(
      size, stride, allocator(), kKeys, c10::dtype_or_default(dtype));
}

Tensor& set_empty(Tensor& self) {
  c10::Storage storage(c10::Storage::use_byte_size_t(), 0, allocator(), true);
  return at::native::set_storage_cpu_(self, storage, 0, {0}, {});
}

at::Scalar item(const Tensor& self) { return at::native::_local_scalar_dense_cpu(host_view(self)); }

// Devices count integers, the CPU's kernel does not; transformers counts the tokens of each expert with it.
Tensor histc(const Tensor& self, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  const auto host = host_view(self);
  const auto counts = at::isIntegralType(self.scalar_type(), false) ? host.to(at::kDouble).histc(bins, low, high)
                                                                    : host.histc(bins, low, high);
  return counts.to(self.options());
}

// Attention as its plain matrix products; the CPU's fused kernel takes no tensors of another device.
int64_t attention_choice(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&, double, bool,
                         optional<double>, bool) {
  return 0;  // sdp::SDPBackend::math
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fall_back>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("resize_", TORCH_FN(at::native::resize_));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  m.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  m.impl("set_", TORCH_FN(set_empty));
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, at::Storage)>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  m.impl("is_set_to", TORCH_FN(at::native::is_set_to));
  m.impl("record_stream", [](Tensor&, at::Stream) {});
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("_to_cpu", TORCH_FN(to_cpu));
  m.impl("_local_scalar_dense", TORCH_FN(item));
  m.impl("histc", TORCH_FN(histc));
  m.impl("_fused_sdp_choice", TORCH_FN(attention_choice));
}

// torch.autocast, by torch's own lists of what to run in which precision.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
#define FULL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_FP32(FULL)
#define FULL_OPTIONAL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
  AT_FORALL_FP32_SET_OPT_DTYPE(FULL_OPTIONAL)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_PROMOTE(WIDEST)
  KERNEL_PRIVATEUSEONE(cat, promote)
  KERNEL_PRIVATEUSEONE(stack, promote)
}

TORCH_LIBRARY_FRAGMENT(moe_emulated, m) {
  m.def("host_view(Tensor tensor) -> Tensor");
  m.def("copies() -> int[]", [] {
    return std::vector<int64_t>{copies_to_device, bytes_to_device, copies_to_host, bytes_to_host};
  });
}

// A lazily conjugated or negated tensor is made plain by a copy, so the copy must take it as it is.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(moe_emulated, PrivateUse1, m) { m.impl("host_view", TORCH_FN(host_view)); }
