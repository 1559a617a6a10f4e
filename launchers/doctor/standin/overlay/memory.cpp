// Copies between host and device, set_, and the choice of attention: operators that know of two devices.
#include "overlay.h"

#include <ATen/SDPBackend.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <vector>

namespace standin {
namespace {

std::vector<c10::RegistrationHandleRAII> memory_registrations;

// The three arguments, and that the destination comes back, are the operator's schema. Nothing is asynchronous here.
at::Tensor copy_from(const at::Tensor& source, const at::Tensor& destination, bool) {
    as_cpu(destination).copy_(as_cpu(source));
    return destination;
}

at::Tensor& copy_(at::Tensor& destination, const at::Tensor& source, bool) {
    as_cpu(destination).copy_(as_cpu(source));
    return destination;
}

// torch_npu's own set_ also renews its description of private layouts, with a kernel of the device.
at::Tensor& set_with_offset(
    at::Tensor& tensor, at::Storage storage, int64_t offset, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
    auto* impl = tensor.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(std::move(storage));
    if (strides.size() == sizes.size()) {
        impl->set_sizes_and_strides(sizes, strides, offset);
    } else {
        impl->set_storage_offset(offset);
        impl->set_sizes_contiguous(sizes);
    }
    return tensor;
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage) {
    const int64_t count = static_cast<int64_t>(storage.nbytes()) / static_cast<int64_t>(tensor.itemsize());
    return set_with_offset(tensor, std::move(storage), 0, {count}, {1});
}

at::Tensor& set_tensor(at::Tensor& tensor, const at::Tensor& source) {
    return set_with_offset(tensor, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// scaled_dot_product_attention is made of plain operators: the fused ones are kernels of the device.
int64_t attention_choice(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
    return static_cast<int64_t>(at::SDPBackend::math);
}

template <class Function>
void replace(const char* name, const char* overload, Function* function) {
    memory_registrations.push_back(c10::Dispatcher::singleton().registerImpl(
        {name, overload}, c10::DispatchKey::PrivateUse1, c10::KernelFunction::makeFromUnboxedRuntimeFunction(function),
        std::nullopt, nullptr, "crosstune stand-in"));
}

}  // namespace

void replace_memory_operators() {
    replace("aten::_copy_from", "", &copy_from);
    replace("aten::copy_", "", &copy_);
    replace("aten::set_", "source_Storage", &set_storage);
    replace("aten::set_", "source_Storage_storage_offset", &set_with_offset);
    replace("aten::set_", "source_Tensor", &set_tensor);
    replace("aten::_fused_sdp_choice", "", &attention_choice);
}

}  // namespace standin
