// The Python face of the event engine: abccl.algorithms.simulator._events.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "events.hpp"

namespace py = pybind11;
using namespace abccl::simulator;

namespace {

using LevelTuple = std::tuple<int64_t, double, double, double, int64_t, int32_t, double, bool>;
using CostsTuple =
    std::tuple<double, double, double, double, double, double, double, bool, int32_t, int32_t, int64_t, int32_t>;

template <class Struct, class Tuple>
Struct from(const Tuple& tuple) {
    return std::apply([](auto... values) { return Struct{values...}; }, tuple);
}

Engine make(std::tuple<int64_t, int64_t, bool> symmetry, const std::vector<LevelTuple>& levels, const CostsTuple& costs,
            std::tuple<double, int64_t, int32_t, int64_t> load, bool in_place, bool record) {
    std::vector<Level> found;
    for (const auto& level : levels) found.push_back(from<Level>(level));
    return Engine(from<Symmetry>(symmetry), std::move(found), from<Costs>(costs), from<Load>(load), in_place, record);
}

template <class Field>
py::array column(const std::vector<Slice>& slices, Field field) {
    using Value = decltype(field(slices.front()));
    py::array_t<Value> values(static_cast<py::ssize_t>(slices.size()));
    auto* next = values.mutable_data();
    for (const auto& slice : slices) *next++ = field(slice);
    return values;
}

py::dict columns(const Engine& engine) {
    const auto& all = engine.slices();
    py::dict found;
    found["rank"] = column(all, [](const Slice& s) { return s.rank; });
    found["lane"] = column(all, [](const Slice& s) { return s.lane; });
    found["segment"] = column(all, [](const Slice& s) { return s.segment; });
    found["kind"] = column(all, [](const Slice& s) { return static_cast<int32_t>(s.kind); });
    found["peer"] = column(all, [](const Slice& s) { return s.peer; });
    found["start"] = column(all, [](const Slice& s) { return s.start; });
    found["end"] = column(all, [](const Slice& s) { return s.end; });
    found["nbytes"] = column(all, [](const Slice& s) { return s.bytes; });
    return found;
}

}  // namespace

PYBIND11_MODULE(_events, module) {
    module.doc() = "The event engine of the simulator.";
    py::class_<Engine>(module, "Engine")
        .def(py::init(&make))
        .def("add",
             [](Engine& engine, const py::array_t<int32_t, py::array::c_style>& code) {
                 engine.add(code.data(), static_cast<size_t>(code.size()));
             })
        .def("run", &Engine::run, py::call_guard<py::gil_scoped_release>())
        .def("columns", &columns)
        .def_property_readonly("problem", &Engine::problem)
        .def_property_readonly("seconds", &Engine::seconds)
        .def_property_readonly("events", &Engine::events)
        .def_property_readonly("messages", &Engine::messages)
        .def_property_readonly("progress", &Engine::progress)
        .def_property_readonly("ends", &Engine::ends)
        .def_property_readonly("busiest_links", &Engine::busiest_links)
        .def_property_readonly("busiest_rank", &Engine::busiest_rank);
}
