// The overlay: torch_npu's device kernels replaced by PyTorch's own CPU kernels, which work on the same bytes.
//
// Memory, streams, generators, autograd, serialization and the whole Python side stay torch_npu's. An operator runs
// so: its NPU tensors are shown to the CPU kernel as CPU tensors over the same storage (aliasing.cpp); what comes out
// new is copied into memory from torch_npu's allocator, which is where a small device runs out of it (operators.cpp).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>
#include <c10/util/intrusive_ptr.h>

#include <map>
#include <set>
#include <string>

namespace c10d {
class Backend;
}

namespace standin {

inline constexpr auto kNpu = c10::DeviceType::PrivateUse1;

// ---- aliasing.cpp

bool on_npu(const at::Tensor& tensor);

// Index of the device that the calling thread has chosen.
c10::DeviceIndex current_device();

// CPU tensor over the bytes of an NPU tensor, with its sizes, strides and offset; other tensors come back as they
// are.
at::Tensor as_cpu(const at::Tensor& tensor);

// NPU tensor over the storage of another one, with the sizes, strides and offset of a CPU tensor: a view's way back.
at::Tensor view_on_npu(const c10::Storage& storage, const at::Tensor& cpu);

// Copy of a CPU tensor in memory from torch_npu's allocator, same strides. Raises torch_npu's out of memory.
at::Tensor copy_to_npu(const at::Tensor& cpu, c10::DeviceIndex device);

// ---- operators.cpp

// What a process has dispatched, for the report.
struct Use {
    int64_t count = 0;
    std::set<std::string> dtypes;
};

std::map<std::string, Use> uses();

// Replaces the NPU kernel of an operator by the CPU's. `missing`: torch_npu has none and would take the CPU with a
// warning.
void run_on_cpu(const std::string& name, const std::string& overload, bool missing);

// Makes an operator raise what PyTorch raises where a backend has no kernel.
void make_unsupported(const std::string& name, const std::string& overload);

// Between a call with true and one with false this thread's operators are parts of another one: not counted.
void uncounted(bool begin);

// Puts PyTorch's own derivative back where torch_npu's needs one of its fused kernels; false where PyTorch has none.
bool restore_derivative(const std::string& name, const std::string& overload);

// Copies and set_, whose CPU kernels know nothing of a second device.
void replace_memory_operators();

// ---- collectives.cpp

// The backend "hccl", carried out by a gloo backend of the same group.
c10::intrusive_ptr<c10d::Backend> hccl(c10::intrusive_ptr<c10d::Backend> gloo);

// Collectives of this process so far, by name.
std::map<std::string, int64_t> collectives();

}  // namespace standin
