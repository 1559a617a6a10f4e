// What Python sees of the overlay: the module standin_overlay.
#include "overlay.h"

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>

#include <pybind11/stl.h>

PYBIND11_MODULE(standin_overlay, module) {
    using namespace standin;
    module.def("run_on_cpu", &run_on_cpu);
    module.def("make_unsupported", &make_unsupported);
    module.def("uncounted", &uncounted);
    module.def("restore_derivative", &restore_derivative);
    module.def("replace_memory_operators", &replace_memory_operators);
    module.def("hccl", [](const pybind11::object& gloo) {
        return hccl(gloo.cast<c10::intrusive_ptr<c10d::Backend>>());
    });
    module.def("collectives", &collectives);
    module.def("operators", [] {
        std::map<std::string, std::pair<int64_t, std::set<std::string>>> plain;
        for (const auto& [name, use] : uses()) plain[name] = {use.count, use.dtypes};
        return plain;
    });
}
