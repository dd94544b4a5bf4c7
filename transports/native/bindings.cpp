// The Python face of the native core: abccl.transports._native.
#include <pybind11/chrono.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dispatcher.hpp"
#include "driven.hpp"
#include "failure.hpp"
#include "fold.hpp"
#include "gil.hpp"
#include "persistent.hpp"
#include "quantize.hpp"
#include "recorded.hpp"
#include "shortcut.hpp"

namespace py = pybind11;
using namespace abccl;

namespace {

const void* pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* mutable_pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

py::object error_class(Kind kind) { return py::module_::import("abccl.errors").attr(kind_name(kind)); }

void translate(std::exception_ptr error) {
    try {
        if (error) std::rethrow_exception(error);
    } catch (const Failure& failure) {
        PyErr_SetString(error_class(failure.kind).ptr(), failure.what());
    }
}

template <class Item>
std::vector<Item> items(const py::array_t<Item, py::array::c_style>& array) {
    return std::vector<Item>(array.data(), array.data() + array.size());
}

std::shared_ptr<Plan> make_plan(const py::array_t<int32_t, py::array::c_style>& code,
                                const py::array_t<int64_t, py::array::c_style>& table, int32_t rank, int32_t size,
                                int64_t input_count, int64_t output_count, int32_t scratch, int32_t registers,
                                int64_t segment, int64_t segments, int32_t lanes, bool straight, int32_t type,
                                int32_t op, double factor, uint32_t signature, std::string text,
                                std::vector<std::string> names, const Communicator& communicator, int32_t remotes) {
    if (type < 0 || type >= type_count || op < 0 || op >= op_count)
        throw Failure(Kind::argument, "the plan's type or operator has no such number");
    PlanParameters parameters{items(code),
                              items(table),
                              size,
                              rank,
                              input_count,
                              output_count,
                              scratch,
                              registers,
                              segment,
                              segments,
                              lanes,
                              straight,
                              static_cast<Type>(type),
                              static_cast<Op>(op),
                              factor,
                              signature,
                              std::move(text),
                              std::move(names),
                              remotes};
    const Geometry& geometry = communicator.endpoint.geometry();
    return std::make_shared<Plan>(std::move(parameters), geometry.lanes, geometry.slot_bytes);
}

// Waits for a work; false at the timeout (seconds; None waits as long as the operation's own deadline allows).
bool finishes_within(PendingWork& pending, py::object timeout) {
    if (pending.generation != fork_generation())
        throw Failure(Kind::closed, "this work belongs to the parent of this process, which was forked");
    const Deadline deadline = timeout.is_none() ? Deadline::max() : Clock::now() + seconds(timeout.cast<double>());
    bool finished;
    {
        WithoutGil released;
        finished = pending.work->wait(deadline);
    }
    if (!finished) return false;
    pending.buffers = py::none();
    pending.work->check();
    return true;
}

void wait(PendingWork& pending, py::object timeout) {
    if (!finishes_within(pending, timeout))
        throw Failure(Kind::deadline, "Work.wait: not finished after " + py::str(timeout).cast<std::string>() +
                                          " s; it goes on, wait again or abort the communicator");
}

std::shared_ptr<PendingWork> message(const std::shared_ptr<Communicator>& communicator, std::shared_ptr<Work> work,
                                     py::object buffer) {
    auto pending = std::make_shared<PendingWork>();
    pending->work = std::move(work);
    pending->buffers = std::move(buffer);
    pending->communicator = communicator;
    pending->generation = fork_generation();
    return pending;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "abccl's native core: shared-memory channels, the engine that runs plans, fold kernels.";
    py::register_exception_translator(translate);
    Endpoint::set_on_tick([] {
        if (!Py_IsInitialized()) return;
        WithGil acquired;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    });

    m.def("fold",
          [](int32_t type, int32_t op, uintptr_t destination, const std::vector<uintptr_t>& sources, size_t count) {
              std::vector<const void*> pointers;
              for (uintptr_t source : sources) pointers.push_back(pointer(source));
              WithoutGil released;
              fold(static_cast<Type>(type), static_cast<Op>(op), mutable_pointer(destination), pointers.data(),
                   static_cast<int>(pointers.size()), count);
          });
    m.def("scale", [](int32_t type, uintptr_t destination, uintptr_t source, double factor, size_t count) {
        WithoutGil released;
        scale(static_cast<Type>(type), mutable_pointer(destination), pointer(source), factor, count);
    });
    m.def("quantize", [](uintptr_t values, uintptr_t added, uintptr_t row, size_t count) {
        WithoutGil released;
        quantize(static_cast<float*>(mutable_pointer(values)), static_cast<const float*>(pointer(added)),
                 mutable_pointer(row), count);
    });
    m.def("dequantize", [](uintptr_t out, const std::vector<uintptr_t>& rows, float factor, size_t count) {
        std::vector<const void*> pointers;
        for (uintptr_t row : rows) pointers.push_back(pointer(row));
        WithoutGil released;
        dequantize(static_cast<float*>(mutable_pointer(out)), pointers.data(), pointers.size(), factor, count);
    });
    m.attr("QUANTIZED_BLOCK") = quantized_block;
    m.def("type_name", [](int32_t type) { return name(static_cast<Type>(type)); });
    m.def("op_name", [](int32_t op) { return name(static_cast<Op>(op)); });
    m.def("type_size", [](int32_t type) { return size_of(static_cast<Type>(type)); });
    m.def("op_defined", [](int32_t op, int32_t type) { return defined(static_cast<Op>(op), static_cast<Type>(type)); });
    m.def("instruction_set", &instruction_set);
    m.def("use_instruction_set", &use_instruction_set);

    py::class_<Region, std::shared_ptr<Region>>(m, "Region")
        .def_static("create", [](size_t bytes) { return Region::create(bytes); })
        .def_static("create_named", &Region::create_named)
        .def_static("attach", &Region::attach)
        .def_static("attach_named", &Region::attach_named)
        .def("unlink_name", &Region::unlink_name)
        .def("forget", &Region::forget, py::arg("offset"), py::arg("bytes"),
             "Give the pages of this range back: they read as zero when they are touched again.")
        .def_property_readonly("address", [](const Region& r) { return reinterpret_cast<uintptr_t>(r.base()); })
        .def_property_readonly("fd", &Region::fd)
        .def_property_readonly("bytes", &Region::bytes);

    py::class_<Geometry>(m, "Geometry")
        .def(py::init([](uint32_t size, uint32_t lanes, uint32_t slots, uint32_t slot_bytes) {
            if (size == 0 || lanes == 0 || slots < 2 || slots & (slots - 1) || slot_bytes < cache_line ||
                slot_bytes % cache_line)
                throw Failure(
                    Kind::argument,
                    "a geometry wants a rank, a lane, slots that are a power of two, of a multiple of 64 bytes");
            return Geometry{size, lanes, slots, slot_bytes};
        }))
        .def_property_readonly("arena_at", &Geometry::arena_at, "Where what is reused from message to message begins.")
        .def_property_readonly("bytes", &Geometry::bytes);

    py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan")
        .def(py::init(&make_plan), py::kw_only(), py::arg("code"), py::arg("table"), py::arg("rank"), py::arg("size"),
             py::arg("input_count"), py::arg("output_count"), py::arg("scratch"), py::arg("registers"),
             py::arg("segment"), py::arg("segments"), py::arg("lanes"), py::arg("straight"), py::arg("type"),
             py::arg("op"), py::arg("factor"), py::arg("signature"), py::arg("text"), py::arg("names"),
             py::arg("communicator"), py::arg("remotes") = 0)
        .def_property_readonly("text", [](const Plan& plan) { return plan.parameters.text; })
        .def_property_readonly(
            "median", [](const Plan& plan) { return plan.seen.median(); },
            "Seconds of its last runs that were timed, their median; None if none was.")
        .def(
            "expect", [](Plan& plan, int way) { plan.protocol.expect(Way::of(way)); }, py::arg("way"),
            "Begin with this way of moving messages, and try the others later. Before the first run.")
        .def(
            "force", [](Plan& plan, int way) { plan.protocol.force(Way::of(way)); }, py::arg("way"),
            "Move messages in this way only, where it can be taken.");

    py::class_<PendingWork, std::shared_ptr<PendingWork>>(
        m, "Work", "A handle on an asynchronous operation; its buffers stay alive until it is finished.")
        .def(
            "is_completed", [](const PendingWork& pending) { return pending.work->finished(); },
            "Whether the operation is finished, well or not.")
        .def("wait", &wait, py::arg("timeout") = py::none(),
             "Wait until the operation is finished.\n\nRaises DeadlineExceeded after `timeout` seconds (the operation "
             "goes "
             "on), or what the operation failed with.")
        .def("finishes_within", &finishes_within, py::arg("timeout"),
             "Like wait, and False instead of DeadlineExceeded.")
        .def_property_readonly("source", [](const PendingWork& pending) { return pending.work->source; })
        .def("set_standing", [](PendingWork& pending, bool standing) { pending.work->standing = standing; })
        .def_property_readonly(
            "times",
            [](const PendingWork& pending) {
                const auto time = [](Deadline at) {
                    return std::chrono::duration<double>(at.time_since_epoch()).count();
                };
                return std::make_pair(time(pending.work->started), time(pending.work->ended));
            },
            "When a finished collective was taken up, and when it ended, by the clock of time.monotonic().");

    py::class_<Communicator, std::shared_ptr<Communicator>> communicator(m, "Communicator");
    communicator
        .def(py::init([](uint32_t rank, const Geometry& geometry, std::shared_ptr<Region> own) {
            return std::make_shared<Communicator>(rank, geometry, std::move(own));
        }))
        .def("announce", [](Communicator& c, uint64_t token) { c.endpoint.announce(token); })
        .def("attach", [](Communicator& c, uint32_t peer, std::shared_ptr<Region> region,
                          uint64_t token) { c.endpoint.attach(peer, std::move(region), token); })
        .def("run",
             [](Communicator& c, std::shared_ptr<Plan> plan, uintptr_t input, uintptr_t output, double timeout) {
                 WithoutGil released;
                 c.run(std::move(plan), pointer(input), mutable_pointer(output), seconds(timeout));
             })
        .def(
            "time",
            [](Communicator& c, const std::shared_ptr<Plan>& plan, uintptr_t input, uintptr_t output, uint32_t calls,
               const std::shared_ptr<Plan>& between, double timeout) {
                WithoutGil released;
                return c.time(plan, pointer(input), mutable_pointer(output), calls, between, seconds(timeout));
            },
            "Seconds that so many runs of a plan take, each with one of `between` behind it if that is not None.")
        .def("start",
             [](const std::shared_ptr<Communicator>& c, std::shared_ptr<Plan> plan, uintptr_t input, uintptr_t output,
                double timeout, py::object buffers) {
                 auto work = c->start(std::move(plan), pointer(input), mutable_pointer(output), seconds(timeout));
                 return message(c, std::move(work), std::move(buffers));
             })
        .def("post_send",
             [](const std::shared_ptr<Communicator>& c, uint32_t peer, int64_t tag, uintptr_t data, size_t bytes,
                py::object buffer, double timeout, bool asynchronous) {
                 std::shared_ptr<Work> work;
                 {
                     WithoutGil released;
                     work = c->post_send(peer, tag, pointer(data), bytes, seconds(timeout));
                     if (asynchronous && !work->finished()) ProgressThread::submit(c);
                 }
                 return message(c, std::move(work), std::move(buffer));
             })
        .def("post_receive",
             [](const std::shared_ptr<Communicator>& c, int32_t source, py::object tag, uintptr_t data, size_t bytes,
                py::object buffer, double timeout, bool asynchronous) {
                 const int64_t wanted = tag.is_none() ? any_tag : tag.cast<int64_t>();
                 std::shared_ptr<Work> work;
                 {
                     WithoutGil released;
                     work = c->post_receive(source, wanted, mutable_pointer(data), bytes, seconds(timeout));
                     if (asynchronous && !work->finished()) ProgressThread::submit(c);
                 }
                 return message(c, std::move(work), std::move(buffer));
             })
        .def("wait_message",
             [](Communicator& c, PendingWork& pending) {
                 WithoutGil released;
                 c.wait_message(*pending.work);
             })
        .def("progress_messages",
             [](Communicator& c) {
                 WithoutGil released;
                 c.progress_messages();
             })
        .def("abort", &Communicator::abort, py::call_guard<WithoutGil>())
        .def("close", &Communicator::close, py::call_guard<WithoutGil>())
        .def("adapt", [](Communicator& c) { c.endpoint.adapt(); })
        .def("number_from_here", [](Communicator& c) { c.endpoint.number_from_here(); })
        .def("can_read", [](Communicator& c, uint32_t peer, uint64_t address,
                            uint64_t token) { return c.endpoint.can_read(peer, address, token); })
        .def_property_readonly("address_of_token", [](Communicator& c) { return c.endpoint.address_of_token(); })
        .def("set_names", [](Communicator& c, std::vector<uint32_t> names) { c.endpoint.set_names(std::move(names)); })
        .def(
            "ring", [](Communicator& c) { c.endpoint.ring_self(); }, "Wake this rank's own sleeping threads.")
        .def("set_pull", [](Communicator& c, bool pull) { c.endpoint.set_pull(pull); })
        .def("set_way", [](Communicator& c, std::optional<int> way) { c.endpoint.set_way(way); })
        .def("heap", [](Communicator& c, size_t bytes) { return c.endpoint.heap(bytes); })
        .def("set_patience", [](Communicator& c, int spins, int yields) { c.endpoint.set_patience({spins, yields}); })
        .def_property(
            "streaming_from", [](const Communicator& c) { return c.endpoint.streaming_from(); },
            [](Communicator& c, size_t bytes) { c.endpoint.set_streaming_from(bytes); });

    add_flight(communicator);

    py::class_<Dispatcher, std::shared_ptr<Dispatcher>>(m, "Dispatcher")
        .def(py::init<std::shared_ptr<Communicator>, py::object, py::object, double>(),
             py::arg("communicator").none(true), py::arg("bind"), py::arg("execute"), py::arg("timeout"))
        .def("function", [](py::object self) { return self.cast<Dispatcher&>().function(self); })
        .def("set_timeout", &Dispatcher::set_timeout)
        .def("set_observer", &Dispatcher::set_observer)
        .def("forget", &Dispatcher::forget);
    py::class_<Persistent>(m, "Persistent",
                           "A collective whose arguments were checked once: call it, or start() it and wait().",
                           py::custom_type_setup(&Persistent::make_callable), py::is_final())
        .def(py::init([](std::shared_ptr<Dispatcher> dispatcher, std::shared_ptr<Plan> plan, uintptr_t input,
                         uintptr_t output, py::object buffers) {
            return std::make_unique<Persistent>(std::move(dispatcher), std::move(plan), pointer(input),
                                                mutable_pointer(output), std::move(buffers));
        }))
        .def("start", &Persistent::start, "Start it; the library goes on with it in the background.")
        .def(
            "wait",
            [](Persistent& p, py::object timeout) {
                const auto started = p.started();
                wait(*started, std::move(timeout));
                p.forget(started);
            },
            py::arg("timeout") = py::none(),
            "Wait until what was started is finished.\n\nRaises DeadlineExceeded after `timeout` seconds (it goes on), "
            "or what it failed with.")
        .def(
            "is_completed", [](Persistent& p) { return p.started()->work->finished(); },
            "Whether what was started is finished, well or not.");
    add_shortcut(m);
    add_driven(m);
    add_flight(m);
    m.def("fork_generation", &fork_generation);
}
