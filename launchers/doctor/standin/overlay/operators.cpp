// One boxed kernel for all operators: NPU tensors in, CPU kernel over the same bytes, NPU tensors out.
#include "overlay.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/resize.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

namespace standin {
namespace {

using c10::Device;
using c10::DispatchKey;
using c10::IValue;
using torch::jit::Stack;

std::vector<c10::RegistrationHandleRAII> registrations;

// Indices may be on the CPU while what they index is not, and lists are copied between any devices.
const std::set<std::string> kTakesHostTensors = {
    "aten::index.Tensor",   "aten::index.Tensor_out",  "aten::index_put",         "aten::index_put_",
    "aten::_unsafe_index.Tensor", "aten::_unsafe_index_put", "aten::_index_put_impl", "aten::_index_put_impl_",
    "aten::_foreach_copy_",
};

// The NPU's kernel counts integers, the CPU's does not: it is shown them as fp64, which holds each of 32 bits.
const std::set<std::string> kShownIntegersAsFp64 = {"aten::histc"};

// Operators that a composite operator is made of are not dispatched on a card, where that operator is one kernel:
// they are not counted.
thread_local int composite_depth = 0;

struct InsideComposite {
    InsideComposite() { ++composite_depth; }
    ~InsideComposite() { --composite_depth; }
};

// One random operator at a time borrows the CPU's generator.
std::mutex borrowing;

// Random operators draw from the NPU's generator: the CPU's is seeded from its seed and offset for one operator, and
// put back. The offset moves on as after a kernel on the device, so saved states behave alike.
class BorrowedGenerator {
   public:
    BorrowedGenerator(const at::Generator& given, c10::DeviceIndex device)
        : alone_(borrowing), host_(at::detail::getDefaultCPUGenerator()) {
        auto npu = given.defined() ? given : at::globalContext().defaultGenerator(Device(kNpu, device));
        const uint64_t offset = npu.get_offset();
        npu.set_offset(offset + 4);  // torch_npu, like CUDA, counts in steps of four
        std::lock_guard<std::mutex> lock(host_.mutex());
        before_ = at::Tensor(host_.unsafeGetGeneratorImpl()->get_state());
        // The multiplier of Knuth's MMIX generator spreads neighbouring seeds apart.
        host_.set_current_seed(npu.current_seed() * 6364136223846793005ULL + offset);
    }
    ~BorrowedGenerator() {
        std::lock_guard<std::mutex> lock(host_.mutex());
        host_.unsafeGetGeneratorImpl()->set_state(*before_.unsafeGetTensorImpl());
    }

   private:
    std::lock_guard<std::mutex> alone_;
    at::Generator host_;
    at::Tensor before_;
};

// An NPU tensor among the arguments, and the CPU tensor that stands for it.
struct Shown {
    at::Tensor npu, cpu;
    bool written;
    const void* bytes;
};

// The call of one operator: arguments to the CPU, results back.
class Call {
   public:
    Call(const c10::OperatorHandle& op, const std::string& name, Stack* stack)
        : op_(op), name_(name), stack_(stack), integers_as_fp64_(kShownIntegersAsFp64.count(name) > 0) {}

    void show_arguments(bool takes_host_tensors) {
        const auto& arguments = op_.schema().arguments();
        const size_t first = stack_->size() - arguments.size();
        for (size_t i = 0; i < arguments.size(); i++) {
            const auto* alias = arguments[i].alias_info();
            show((*stack_)[first + i], alias && alias->isWrite());
        }
        TORCH_CHECK(
            !host_tensor_ || shown_.empty() || takes_host_tensors,
            "Expected all tensors to be on the same device, but found at least two devices, ",
            shown_.front().npu.device(), " and cpu! (when running ", name_, " with a tensor of shape ",
            host_tensor_->sizes(), " on the CPU)");
    }

    // Device of what comes out new.
    c10::DeviceIndex device() const {
        if (asked_ && asked_->has_index()) return asked_->index();
        return shown_.empty() ? current_device() : shown_.front().npu.device().index();
    }

    const at::Generator& generator() const { return generator_; }
    const std::vector<Shown>& shown() const { return shown_; }

    void take_results() {
        for (auto& tensor : shown_) {
            if (tensor.written) follow_output(tensor);
        }
        const size_t count = op_.schema().returns().size();
        for (size_t i = stack_->size() - count; i < stack_->size(); i++) {
            auto& value = (*stack_)[i];
            if (value.isTensor()) {
                value = back(value.toTensor());
            } else if (value.isTensorList()) {
                c10::List<at::Tensor> results;
                for (const at::Tensor& tensor : value.toTensorVector()) results.push_back(back(tensor));
                value = results;
            }
        }
    }

   private:
    void show(IValue& value, bool written) {
        if (value.isTensor()) {
            value = show(value.toTensor(), written);
        } else if (value.isTensorList()) {
            c10::List<at::Tensor> tensors;
            for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(show(tensor, written));
            value = tensors;
        } else if (value.isOptionalTensorList()) {
            c10::List<std::optional<at::Tensor>> tensors;
            for (const std::optional<at::Tensor> tensor : value.toOptionalTensorList()) {
                tensors.push_back(tensor ? std::make_optional(show(*tensor, written)) : std::nullopt);
            }
            value = tensors;
        } else if (value.isDevice()) {
            asked_ = value.toDevice();
            if (asked_->type() == kNpu) value = Device(c10::kCPU);
        } else if (value.isGenerator() && value.toGenerator().device().type() == kNpu) {
            generator_ = value.toGenerator();
            value = IValue();
        }
    }

    at::Tensor show(const at::Tensor& tensor, bool written) {
        if (!on_npu(tensor)) {
            // A tensor without dimensions is a number, and numbers may come from the CPU.
            if (tensor.defined() && tensor.is_cpu() && tensor.dim() > 0) host_tensor_ = tensor;
            return tensor;
        }
        if (!shown_.empty()) {
            const auto first = shown_.front().npu.device();
            TORCH_CHECK(
                first == tensor.device(),
                "Expected all tensors to be on the same device, but found at least two devices, ", first, " and ",
                tensor.device(), "! (when running ", name_, ")");
        }
        auto cpu = as_cpu(tensor);
        if (integers_as_fp64_ && c10::isIntegralType(tensor.scalar_type(), false)) {
            cpu = cpu.to(at::kDouble);
            result_type_ = tensor.scalar_type();
        }
        shown_.push_back({tensor, cpu, written, cpu.storage().data()});
        return cpu;
    }

    // An out= argument may have been resized: within its bytes, or into new ones that the CPU allocated.
    void follow_output(Shown& tensor) {
        auto* impl = tensor.npu.unsafeGetTensorImpl();
        if (tensor.cpu.storage().data() != tensor.bytes) {
            tensor.npu.resize_(tensor.cpu.sizes());
            impl->set_sizes_and_strides(tensor.cpu.sizes(), tensor.cpu.strides(), tensor.cpu.storage_offset());
            const size_t bytes = std::min(tensor.npu.storage().nbytes(), tensor.cpu.storage().nbytes());
            std::memcpy(tensor.npu.storage().mutable_data(), tensor.cpu.storage().data(), bytes);
        } else if (tensor.cpu.sizes() != tensor.npu.sizes() || tensor.cpu.strides() != tensor.npu.strides()) {
            impl->set_sizes_and_strides(tensor.cpu.sizes(), tensor.cpu.strides(), tensor.cpu.storage_offset());
        }
    }

    at::Tensor back(const at::Tensor& result) const {
        if (!result.defined() || !result.is_cpu() || (asked_ && asked_->is_cpu())) return result;
        for (const auto& tensor : shown_) {
            if (result.is_same(tensor.cpu)) return tensor.npu;  // in place, or out=
        }
        for (const auto& tensor : shown_) {
            if (result.has_storage() && result.storage().is_alias_of(tensor.cpu.storage())) {
                return view_on_npu(tensor.npu.storage(), result);
            }
        }
        if (shown_.empty() && !asked_) return result;
        return copy_to_npu(result_type_ ? result.to(*result_type_) : result, device());
    }

    const c10::OperatorHandle& op_;
    const std::string& name_;
    Stack* stack_;
    const bool integers_as_fp64_;
    std::optional<at::ScalarType> result_type_;
    std::vector<Shown> shown_;
    std::optional<at::Tensor> host_tensor_;
    std::optional<Device> asked_;
    at::Generator generator_;
};

class CpuKernel : public c10::OperatorKernel {
   public:
    CpuKernel(std::string name, bool missing)
        : name_(std::move(name)), missing_(missing), takes_host_tensors_(kTakesHostTensors.count(name_) > 0) {}

    void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
        Call call(op, name_, stack);
        if (is_factory(op, *stack)) {
            count(call);
            // torch.zeros and its like: memory from torch_npu's allocator at once, then a kernel that fills it.
            const InsideComposite guard;
            op.callBoxedForDispatchKey(DispatchKey::CompositeExplicitAutograd, *stack);
            return;
        }
        call.show_arguments(takes_host_tensors_);
        count(call);
        {
            std::optional<BorrowedGenerator> generator;
            if (op.hasTag(at::Tag::nondeterministic_seeded)) generator.emplace(call.generator(), call.device());
            op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack);
        }
        call.take_results();
    }

    void add_to(std::map<std::string, Use>& uses) const {
        if (count_ == 0) return;
        Use& use = uses[name_];
        use.count = count_;
        for (int8_t i = 0; i < static_cast<int8_t>(c10::ScalarType::NumOptions); i++) {
            if (dtypes_ >> i & 1) use.dtypes.emplace(c10::getDtypeNames(static_cast<c10::ScalarType>(i)).first);
        }
    }

   private:
    static bool is_factory(const c10::OperatorHandle& op, const Stack& stack) {
        const size_t arguments = op.schema().arguments().size();
        for (size_t i = stack.size() - arguments; i < stack.size(); i++) {
            if (stack[i].isTensor() || stack[i].isTensorList() || stack[i].isOptionalTensorList()) return false;
        }
        return op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd);
    }

    void count(const Call& call) {
        if (composite_depth > 0) return;
        for (const auto& tensor : call.shown()) dtypes_ |= uint64_t{1} << static_cast<int>(tensor.npu.scalar_type());
        if (count_++ == 0 && missing_) {
            // torch_npu's own words: whoever looks for them finds them here too.
            TORCH_WARN(
                "CAUTION: The operator '", name_,
                "' is not currently supported on the NPU backend and will fall back to run on the CPU. "
                "This may have performance implications.");
        }
    }

    const std::string name_;
    const bool missing_, takes_host_tensors_;
    std::atomic<int64_t> count_{0};
    std::atomic<uint64_t> dtypes_{0};  // a bit for each c10::ScalarType
    static_assert(static_cast<int>(c10::ScalarType::NumOptions) <= 64);
};

// Owned by the dispatcher, which keeps them until the process ends.
std::vector<const CpuKernel*> kernels;

std::string full_name(const std::string& name, const std::string& overload) {
    return overload.empty() ? name : name + "." + overload;
}

void register_kernel(
    const std::string& name, const std::string& overload, DispatchKey key, c10::KernelFunction kernel) {
    registrations.push_back(c10::Dispatcher::singleton().registerImpl(
        {name, overload}, key, std::move(kernel), std::nullopt, nullptr, "crosstune stand-in"));
}

void raise_unsupported(const c10::OperatorHandle& op, Stack*) {
    const auto name = c10::toString(op.operator_name());
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, "Could not run '", name, "' with arguments from the 'PrivateUse1' backend. This could be because ",
        "the operator doesn't exist for this backend, or was omitted during the selective/custom build process ",
        "(if using custom build). '", name, "' was made unsupported by a setting of crosstune's stand-in.");
}

void upstream_derivative(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
    const bool composite = op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd);
    op.callBoxedForDispatchKey(composite ? DispatchKey::CompositeImplicitAutograd : DispatchKey::Autograd, *stack);
}

}  // namespace

std::map<std::string, Use> uses() {
    std::map<std::string, Use> found;
    for (const auto* kernel : kernels) kernel->add_to(found);
    return found;
}

void run_on_cpu(const std::string& name, const std::string& overload, bool missing) {
    auto kernel = std::make_unique<CpuKernel>(full_name(name, overload), missing);
    kernels.push_back(kernel.get());
    register_kernel(
        name, overload, DispatchKey::PrivateUse1,
        c10::KernelFunction::makeFromBoxedFunctor<CpuKernel>(std::move(kernel)));
}

void make_unsupported(const std::string& name, const std::string& overload) {
    // Above autograd too, where some operators are taken apart into others.
    for (const auto key : {DispatchKey::PrivateUse1, DispatchKey::AutogradPrivateUse1}) {
        register_kernel(name, overload, key, c10::KernelFunction::makeFromBoxedFunction<&raise_unsupported>());
    }
}

void uncounted(bool begin) {
    composite_depth += begin ? 1 : -1;
}

bool restore_derivative(const std::string& name, const std::string& overload) {
    const auto op = c10::Dispatcher::singleton().findSchema({name, overload});
    if (!op || !(op->hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd) ||
                 op->hasKernelForDispatchKey(DispatchKey::Autograd))) {
        return false;
    }
    register_kernel(
        name, overload, DispatchKey::AutogradPrivateUse1,
        c10::KernelFunction::makeFromBoxedFunction<&upstream_derivative>());
    return true;
}

}  // namespace standin
