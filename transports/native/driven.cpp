#include "driven.hpp"

#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "communicator.hpp"
#include "failure.hpp"
#include "gil.hpp"

namespace py = pybind11;

namespace abccl {
namespace {

// One run at a time, and none of the communicator's own beside it.
class DrivenExecution {
  public:
    DrivenExecution(std::shared_ptr<Communicator> communicator, size_t header_bytes)
        : communicator_(std::move(communicator)),
          remote_(header_bytes),
          execution_(communicator_->endpoint, &remote_) {}

    void start(std::shared_ptr<const Plan> plan, uintptr_t input, uintptr_t output) {
        check_usable();
        plan_ = std::move(plan);
        execution_.start(*plan_, reinterpret_cast<const void*>(input), reinterpret_cast<void*>(output));
    }
    Outcome progress() {
        WithoutGil released;
        return recorded([this] {
            check_usable();
            return execution_.progress();
        });
    }
    // (id, sends, peer, lane, segment, row, bytes with the header) of each message that waits to be carried.
    py::list take() {
        py::list taken;
        for (const RemoteMessage& message : remote_.take()) {
            const auto bytes = py::memoryview::from_memory(message.data, static_cast<py::ssize_t>(message.bytes));
            taken.append(py::make_tuple(message.id, message.sends, message.peer, message.lane, message.segment,
                                        message.row, bytes));
        }
        return taken;
    }
    void complete(uint32_t id) { remote_.complete(id); }
    // The tag, the number of the step (from 1) and the blocks of a message.
    py::tuple about(size_t row) const {
        return py::make_tuple(plan_->rows[row].tag, plan_->step_of(row) + 1, plan_->blocks_of(row));
    }
    // Raises what ends the run: an abort, a lost peer of this host, different calls.
    void check() {
        WithoutGil released;
        check_started();
        execution_.publish_wait();
        recorded([this] {
            communicator_->endpoint.check_collective();
            return Outcome::blocked;
        });
    }
    std::string blame() {
        check_started();
        execution_.publish_wait(true);
        return execution_.blame();
    }
    // The remote peer that the run waits for, by its number in the plan.
    std::optional<uint32_t> waits_for() const {
        check_started();
        const auto peer = execution_.waits_for().peer;
        return peer && *peer >= communicator_->endpoint.geometry().size ? peer : std::nullopt;
    }

  private:
    template <class Look>
    Outcome recorded(Look look) {
        try {
            return look();
        } catch (const Failure& failure) {
            communicator_->note_failure(failure);
            communicator_->endpoint.finish(false);
            communicator_->tell_failure();
            throw;
        }
    }
    void check_started() const {
        if (!plan_) throw Failure(Kind::argument, "nothing has been started");
    }
    void check_usable() const {
        if (communicator_->closed()) throw Failure(Kind::closed, "the communicator is closed: make another");
        communicator_->endpoint.check_abort();
    }

    std::shared_ptr<Communicator> communicator_;
    std::shared_ptr<const Plan> plan_;
    RemoteQueue remote_;
    Execution execution_;
};

// Begin, look again for what may have come, then sleep: nothing that rings after the beginning is missed.
class Nap {
  public:
    explicit Nap(std::shared_ptr<Communicator> communicator)
        : communicator_(std::move(communicator)), sleeper_(std::in_place, communicator_->endpoint) {}
    void sleep(int milliseconds) {
        WithoutGil released;
        sleeper_->sleep(milliseconds);
    }
    void end() { sleeper_.reset(); }

  private:
    std::shared_ptr<Communicator> communicator_;
    std::optional<Endpoint::Sleeper> sleeper_;
};

}  // namespace

void add_driven(py::module_& m) {
    py::class_<DrivenExecution>(m, "DrivenExecution", "Runs plans whose messages to other hosts its caller carries.")
        .def(py::init<std::shared_ptr<Communicator>, size_t>(), py::arg("communicator"), py::arg("header_bytes"))
        .def("start", &DrivenExecution::start, py::arg("plan"), py::arg("input"), py::arg("output"))
        .def(
            "progress", [](DrivenExecution& e) { return static_cast<int>(e.progress()); },
            "0: nothing moved, 1: something did, 2: the run is finished.")
        .def("take", &DrivenExecution::take,
             "(id, sends, peer, lane, segment, row, bytes with room for the header) of each new message.")
        .def("complete", &DrivenExecution::complete, py::arg("id"), "The message has been carried.")
        .def("about", &DrivenExecution::about, py::arg("row"), "Tag, step and blocks of a message.")
        .def("check", &DrivenExecution::check, "Raise what ends the run.")
        .def("waits_for", &DrivenExecution::waits_for,
             "The remote peer that the run waits for, by its number, or None.")
        .def("blame", &DrivenExecution::blame, "What the run waits for, in words.");
    py::class_<Nap>(m, "Nap", "Begin, look again, then sleep until the communicator's bell rings.")
        .def(py::init<std::shared_ptr<Communicator>>())
        .def("sleep", &Nap::sleep, py::arg("milliseconds"))
        .def("end", &Nap::end);
}

}  // namespace abccl
