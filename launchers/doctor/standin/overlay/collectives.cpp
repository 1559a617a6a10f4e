// HCCL: its collectives and its refusals, carried out by gloo over the same bytes.
//
// The refusals and their wording are those of torch_npu's ProcessGroupHCCL.cpp (check_npu_single_tensor,
// checkSupportedDataType, getHcclReduceOp), for chips before Ascend950: gloo takes host tensors, fp64 and bit
// operations, and would hide that HCCL does not.
#include "overlay.h"

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <thread>

namespace standin {
namespace {

using c10d::ReduceOp;
using Milliseconds = std::chrono::milliseconds;
using Tensors = std::vector<at::Tensor>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;
using BackendPtr = c10::intrusive_ptr<c10d::Backend>;

std::mutex counts_guard;
std::map<std::string, int64_t> counts;
int64_t entered = 0;

// NUMBER of a setting RANK:NUMBER, where this process has that rank.
std::optional<long> setting_of_this_rank(const char* variable) {
    const char *text = std::getenv(variable), *own_rank = std::getenv("RANK");
    long rank = 0, number = 0;
    if (!text || std::sscanf(text, "%ld:%ld", &rank, &number) != 2) return std::nullopt;
    return rank == (own_rank ? std::atol(own_rank) : 0) ? std::make_optional(number) : std::nullopt;
}

// Counts a collective; the place where a rank dies or comes late, if that was asked for.
void enter(const std::string& name) {
    static const auto dies_at = setting_of_this_rank("CROSSTUNE_STANDIN_DIE");
    static const auto late_by = setting_of_this_rank("CROSSTUNE_STANDIN_SLOW");
    int64_t number = 0;
    {
        const std::lock_guard<std::mutex> lock(counts_guard);
        counts[name]++;
        number = ++entered;
    }
    if (dies_at == number) std::raise(SIGKILL);
    if (late_by) std::this_thread::sleep_for(Milliseconds(*late_by));
}

// Work of one or more collectives. gloo's own may copy its results anew each time it is waited for; this waits once.
class HcclWork : public c10d::Work {
   public:
    HcclWork(std::vector<WorkPtr> parts, Tensors results, std::function<void()> finish)
        : parts_(std::move(parts)), results_(std::move(results)), finish_(std::move(finish)) {}

    bool isCompleted() override {
        for (const auto& part : parts_) {
            if (!part->isCompleted()) return false;
        }
        // Who asks need not wait: then the results must be there.
        return !isSuccess() || wait(kNoTimeout);
    }
    bool isSuccess() const override {
        return std::all_of(parts_.begin(), parts_.end(), [](const WorkPtr& part) { return part->isSuccess(); });
    }
    std::exception_ptr exception() const override {
        for (const auto& part : parts_) {
            if (!part->isSuccess()) return part->exception();
        }
        return nullptr;
    }
    bool wait(Milliseconds timeout) override {
        const std::lock_guard<std::mutex> lock(guard_);
        if (done_) return true;
        for (const auto& part : parts_) part->wait(timeout);
        if (finish_) finish_();
        return done_ = true;
    }
    void synchronize() override { wait(kNoTimeout); }
    Tensors result() override { return results_; }
    c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
        wait(kNoTimeout);
        std::vector<c10::Device> devices{c10::Device(kNpu, current_device())};
        auto future = c10::make_intrusive<c10::ivalue::Future>(
            c10::ListType::create(c10::TensorType::get()), std::move(devices));
        future->markCompleted(c10::IValue(results_));
        return future;
    }

   private:
    std::vector<WorkPtr> parts_;
    Tensors results_;
    std::function<void()> finish_;
    bool done_ = false;
    std::mutex guard_;
};

// CPU tensor over the bytes of one that HCCL would take.
at::Tensor checked(const at::Tensor& tensor) {
    TORCH_CHECK(on_npu(tensor) && !tensor.is_sparse(), "Tensors must be NPU and dense");
    TORCH_CHECK(tensor.is_contiguous(tensor.suggest_memory_format()), "Tensors must be contiguous");
    switch (tensor.scalar_type()) {
        case at::kBool: case at::kByte: case at::kChar: case at::kShort: case at::kInt: case at::kLong:
        case at::kHalf: case at::kBFloat16: case at::kFloat: case at::kDouble:
        case at::kFloat8_e4m3fn: case at::kFloat8_e5m2:
            return as_cpu(tensor);
        default:
            TORCH_CHECK(false, "Unsupported data type for HCCL process group");
    }
}

Tensors checked(const Tensors& tensors) {
    Tensors cpu;
    for (const auto& tensor : tensors) cpu.push_back(checked(tensor));
    return cpu;
}

std::vector<Tensors> checked(const std::vector<Tensors>& lists) {
    std::vector<Tensors> cpu;
    for (const auto& tensors : lists) cpu.push_back(checked(tensors));
    return cpu;
}

// Reductions take fewer dtypes than copies do, and not every operation.
void check_reduction(const std::string& name, const ReduceOp& op, at::ScalarType dtype) {
    switch (dtype) {
        case at::kChar: case at::kShort: case at::kInt: case at::kLong:
        case at::kHalf: case at::kBFloat16: case at::kFloat:
            break;
        default:
            TORCH_CHECK(false, "HCCL ", name, ": Unsupported data type at::k", dtype);
    }
    switch (op.op_) {
        case ReduceOp::BAND: TORCH_CHECK(false, "Cannot use ReduceOp.BAND with HCCL");
        case ReduceOp::BOR: TORCH_CHECK(false, "Cannot use ReduceOp.BOR with HCCL");
        case ReduceOp::BXOR: TORCH_CHECK(false, "Cannot use ReduceOp.BXOR with HCCL");
        default: break;
    }
}

// HCCL has no average: torch_npu sums and divides, and so does this, since gloo has none for all collectives either.
template <class Options>
Options without_average(const Options& options) {
    Options plain = options;
    if (options.reduceOp == ReduceOp::AVG) plain.reduceOp = ReduceOp::SUM;
    return plain;
}

class HcclBackend : public c10d::Backend {
   public:
    explicit HcclBackend(BackendPtr gloo) : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}

    const std::string getBackendName() const override { return "hccl"; }
    void setSequenceNumberForGroup() override { gloo_->setSequenceNumberForGroup(); }
    uint64_t getSequenceNumberForGroup() override { return gloo_->getSequenceNumberForGroup(); }
    void setTimeout(Milliseconds timeout) override { gloo_->setTimeout(timeout); }

    bool supportsCoalescing() const override { return true; }
    void startCoalescing() override {
        coalescing_ = true;
        held_.clear();
    }
    WorkPtr endCoalescing() override {
        coalescing_ = false;
        return c10::make_intrusive<HcclWork>(std::exchange(held_, {}), Tensors{}, nullptr);
    }

    WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
        enter("broadcast");
        auto cpu = checked(tensors);
        return work(gloo_->broadcast(cpu, options), tensors);
    }

    WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
        enter("allreduce");
        auto cpu = checked(tensors);
        auto plain = without_average(options);
        const auto dtype = tensors[0].scalar_type();
        if (dtype == at::kBool || dtype == at::kByte || dtype == at::kShort) {
            return allreduce_as_int(tensors, cpu, plain);
        }
        check_reduction("allreduce", options.reduceOp, dtype);
        return work(gloo_->allreduce(cpu, plain), tensors, average(options.reduceOp, cpu));
    }

    WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
        c10d::AllreduceOptions each;
        each.reduceOp = options.reduceOp;
        each.timeout = options.timeout;
        std::vector<WorkPtr> parts;
        for (const auto& tensor : tensors) {
            Tensors one{tensor};
            parts.push_back(allreduce(one, each));
        }
        return c10::make_intrusive<HcclWork>(std::move(parts), tensors, nullptr);
    }

    WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
        enter("reduce");
        auto cpu = checked(tensors);
        check_reduction("reduce", options.reduceOp, tensors[0].scalar_type());
        auto finish = options.rootRank == getRank() ? average(options.reduceOp, cpu) : nullptr;
        return work(gloo_->reduce(cpu, without_average(options)), tensors, std::move(finish));
    }

    WorkPtr allgather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
        enter("allgather");
        auto out = checked(outputs);
        auto in = checked(inputs);
        return work(gloo_->allgather(out, in, options), outputs[0]);
    }

    WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
        enter("_allgather_base");
        auto out = checked(output), in = checked(input);
        return work(gloo_->_allgather_base(out, in, options), {output});
    }

    WorkPtr allgather_into_tensor_coalesced(
        Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
        std::vector<WorkPtr> parts;
        for (size_t i = 0; i < outputs.size(); i++) {
            parts.push_back(_allgather_base(outputs[i], inputs[i], options));
        }
        return c10::make_intrusive<HcclWork>(std::move(parts), outputs, nullptr);
    }

    WorkPtr gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
        enter("gather");
        auto out = checked(outputs);
        auto in = checked(inputs);
        return work(gloo_->gather(out, in, options), outputs.empty() ? Tensors{} : outputs[0]);
    }

    WorkPtr scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& options) override {
        enter("scatter");
        auto out = checked(outputs);
        auto in = checked(inputs);
        return work(gloo_->scatter(out, in, options), outputs);
    }

    WorkPtr reduce_scatter(
        Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ReduceScatterOptions& options) override {
        enter("reduce_scatter");
        auto out = checked(outputs);
        auto in = checked(inputs);
        check_reduction("reduce_scatter", options.reduceOp, outputs[0].scalar_type());
        return work(
            gloo_->reduce_scatter(out, in, without_average(options)), outputs, average(options.reduceOp, out));
    }

    WorkPtr _reduce_scatter_base(
        at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) override {
        enter("_reduce_scatter_base");
        auto out = checked(output), in = checked(input);
        check_reduction("_reduce_scatter_base", options.reduceOp, output.scalar_type());
        return work(
            gloo_->_reduce_scatter_base(out, in, without_average(options)), {output}, average(options.reduceOp, {out}));
    }

    WorkPtr reduce_scatter_tensor_coalesced(
        Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) override {
        std::vector<WorkPtr> parts;
        for (size_t i = 0; i < outputs.size(); i++) {
            parts.push_back(_reduce_scatter_base(outputs[i], inputs[i], options));
        }
        return c10::make_intrusive<HcclWork>(std::move(parts), outputs, nullptr);
    }

    WorkPtr alltoall_base(
        at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits, std::vector<int64_t>& input_splits,
        const c10d::AllToAllOptions& options) override {
        enter("alltoall_base");
        auto out = checked(output), in = checked(input);
        return work(gloo_->alltoall_base(out, in, output_splits, input_splits, options), {output});
    }

    WorkPtr alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) override {
        enter("alltoall");
        auto out = checked(outputs), in = checked(inputs);
        return work(gloo_->alltoall(out, in, options), outputs);
    }

    WorkPtr send(Tensors& tensors, int to, int tag) override {
        enter("send");
        auto cpu = checked(tensors);
        return work(gloo_->send(cpu, to, tag), tensors);
    }

    WorkPtr recv(Tensors& tensors, int from, int tag) override {
        enter("recv");
        auto cpu = checked(tensors);
        return work(gloo_->recv(cpu, from, tag), tensors);
    }

    WorkPtr recvAnysource(Tensors& tensors, int tag) override {
        enter("recvAnysource");
        auto cpu = checked(tensors);
        return work(gloo_->recvAnysource(cpu, tag), tensors);
    }

    WorkPtr barrier(const c10d::BarrierOptions& options) override {
        enter("barrier");
        c10d::BarrierOptions plain = options;
        plain.device = std::nullopt;  // gloo refuses one
        plain.device_ids.clear();
        return gloo_->barrier(plain);
    }

   private:
    WorkPtr work(WorkPtr part, Tensors results, std::function<void()> finish = nullptr) {
        WorkPtr made = c10::make_intrusive<HcclWork>(
            std::vector<WorkPtr>{std::move(part)}, std::move(results), std::move(finish));
        if (coalescing_) held_.push_back(made);
        return made;
    }

    std::function<void()> average(const ReduceOp& op, Tensors sums) {
        if (!(op == ReduceOp::AVG)) return nullptr;
        return [sums = std::move(sums), size = getSize()]() mutable {
            for (auto& sum : sums) sum.div_(size);
        };
    }

    // As torch_npu does with bool and uint8, whose sum would overflow; gloo has no int16, so that goes this way too.
    WorkPtr allreduce_as_int(const Tensors& tensors, const Tensors& cpu, c10d::AllreduceOptions options) {
        check_reduction("allreduce", options.reduceOp, at::kInt);
        if (cpu[0].scalar_type() == at::kBool && options.reduceOp == ReduceOp::SUM) options.reduceOp = ReduceOp::MAX;
        Tensors wide{cpu[0].to(at::kInt)};
        auto part = gloo_->allreduce(wide, options);
        return work(std::move(part), tensors, [narrow = cpu[0], wide = wide[0]]() mutable { narrow.copy_(wide); });
    }

    BackendPtr gloo_;
    bool coalescing_ = false;
    std::vector<WorkPtr> held_;
};

}  // namespace

c10::intrusive_ptr<c10d::Backend> hccl(c10::intrusive_ptr<c10d::Backend> gloo) {
    return c10::make_intrusive<HcclBackend>(std::move(gloo));
}

std::map<std::string, int64_t> collectives() {
    const std::lock_guard<std::mutex> lock(counts_guard);
    return counts;
}

}  // namespace standin
