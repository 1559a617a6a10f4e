// CPU tensors over an NPU's bytes, and the way back.
#include "overlay.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstring>

namespace standin {

bool on_npu(const at::Tensor& tensor) {
    return tensor.defined() && tensor.device().type() == kNpu;
}

c10::DeviceIndex current_device() {
    return c10::impl::getDeviceGuardImpl(kNpu)->getDevice().index();
}

static void release_storage(void* storage) {
    delete static_cast<c10::Storage*>(storage);
}

at::Tensor as_cpu(const at::Tensor& tensor) {
    if (!on_npu(tensor)) return tensor;
    const c10::Storage& storage = tensor.storage();
    // The alias owns a reference to the NPU's storage, so it may outlive the tensor. It is resizable for out=
    // arguments: the CPU kernel then allocates anew, and the operator moves the result (operators.cpp).
    at::DataPtr bytes(storage.mutable_data(), new c10::Storage(storage), &release_storage, c10::Device(c10::kCPU));
    c10::Storage alias(
        c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(bytes), c10::GetCPUAllocator(),
        /*resizable=*/true);
    auto cpu = at::detail::make_tensor<c10::TensorImpl>(
        std::move(alias), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    auto* impl = cpu.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    if (tensor.is_conj()) cpu._set_conj(true);
    if (tensor.is_neg()) cpu._set_neg(true);
    // A Python number in an expression: it must not decide about the result's dtype.
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    return cpu;
}

at::Tensor view_on_npu(const c10::Storage& storage, const at::Tensor& cpu) {
    auto view = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), cpu.dtype());
    auto* impl = view.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    if (cpu.is_conj()) view._set_conj(true);
    if (cpu.is_neg()) view._set_neg(true);
    if (cpu.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    return view;
}

at::Tensor copy_to_npu(const at::Tensor& cpu, c10::DeviceIndex device) {
    auto npu = at::empty_strided(cpu.sizes(), cpu.strides(), cpu.options().device(c10::Device(kNpu, device)));
    if (cpu.numel() > 0) {
        const size_t offset = cpu.storage_offset() * cpu.itemsize();
        const size_t bytes = std::min(npu.storage().nbytes(), cpu.storage().nbytes() - offset);
        std::memcpy(npu.storage().mutable_data(), static_cast<const char*>(cpu.storage().data()) + offset, bytes);
    }
    if (cpu.is_conj()) npu._set_conj(true);
    if (cpu.is_neg()) npu._set_neg(true);
    if (cpu.unsafeGetTensorImpl()->is_wrapped_number()) npu.unsafeGetTensorImpl()->set_wrapped_number(true);
    return npu;
}

}  // namespace standin
