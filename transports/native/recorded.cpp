#include "recorded.hpp"

#include <fcntl.h>
#include <pybind11/stl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "clock.hpp"
#include "failure.hpp"
#include "faults.hpp"
#include "gil.hpp"

namespace py = pybind11;

namespace abccl {
namespace {

double wall_seconds() {
    timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

py::object rank_or_none(int32_t rank) { return rank == nobody ? py::object(py::none()) : py::object(py::int_(rank)); }

// "start", "end" and "state" of an entry.
void tell_times(py::dict& entry, uint64_t start, uint64_t end, const ClockReading& now) {
    entry["start"] = now.seconds(start == 0 ? now.counted : start);
    entry["end"] = end == 0 ? py::object(py::none()) : py::object(py::float_(now.seconds(end & ~has_failed)));
    entry["state"] = end == 0 ? "running" : end & has_failed ? "failed" : "finished";
}

// What ran when the communicator broke has failed, whoever found out.
uint64_t end_of(const Flight& flight, uint64_t start, uint64_t end) {
    const uint64_t failed = flight.failed.load(std::memory_order_acquire);
    return end == 0 && failed != 0 ? std::max(failed, start) | has_failed : end;
}

py::list operations_of(const Flight& flight, uint64_t entered, uint64_t before, const ClockReading& now) {
    py::list operations;
    const uint64_t kept = std::min<uint64_t>(entered - std::min(entered, before), recorded_operations);
    for (uint64_t number = entered - kept + 1; number <= entered; ++number) {
        const auto found = read_operation(flight, number);
        if (!found) continue;  // rewritten since
        py::dict operation;
        operation["number"] = number - before;
        operation["call"] = found->text;
        operation["bytes"] = found->bytes;
        tell_times(operation, found->start, end_of(flight, found->start, found->end), now);
        operations.append(operation);
    }
    return operations;
}

py::list messages_of(const Flight& flight, const ClockReading& now) {
    py::list messages;
    const uint64_t begun = flight.messages_begun.load(std::memory_order_acquire);
    for (uint64_t number = begun - std::min<uint64_t>(begun, recorded_messages) + 1; number <= begun; ++number) {
        const MessageEntry& entry = flight.messages[number % recorded_messages];
        if (entry.number.load(std::memory_order_acquire) != number) continue;
        const int64_t tag = entry.tag.load(std::memory_order_acquire);
        py::dict message;
        message["call"] = entry.sends.load(std::memory_order_acquire) ? "send" : "recv";
        message["peer"] = rank_or_none(entry.peer.load(std::memory_order_acquire));
        message["tag"] = tag == any_tag ? py::object(py::none()) : py::object(py::int_(tag));
        message["bytes"] = entry.bytes.load(std::memory_order_acquire);
        const uint64_t start = entry.start.load(std::memory_order_acquire);
        tell_times(message, start, end_of(flight, start, entry.end.load(std::memory_order_acquire)), now);
        if (entry.number.load(std::memory_order_acquire) == number) messages.append(message);
    }
    return messages;
}

py::list steps_of(const Flight& flight, uint64_t entered, uint64_t before, const ClockReading& now) {
    py::list steps;
    const uint64_t ended = flight.steps_ended.load(std::memory_order_acquire);
    for (uint64_t index = ended - std::min<uint64_t>(ended, recorded_steps); index < ended; ++index) {
        const StepEntry& entry = flight.steps[index % recorded_steps];
        const uint64_t end = entry.end.load(std::memory_order_acquire);
        // The upper half of the number is that of the newest operation, or one less.
        uint64_t number = (entered & ~uint64_t{0xFFFFFFFF}) | entry.number.load(std::memory_order_acquire);
        if (number > entered) number -= uint64_t{1} << 32;
        if (end == 0 || number <= before || number > entered) continue;
        py::dict step;
        step["number"] = number - before;
        step["lane"] = entry.lane.load(std::memory_order_acquire);
        step["segment"] = entry.segment.load(std::memory_order_acquire);
        step["step"] = entry.step.load(std::memory_order_acquire);
        step["peer"] = rank_or_none(entry.peer.load(std::memory_order_acquire));
        step["end"] = now.seconds(end);
        if (entry.end.load(std::memory_order_acquire) == end) steps.append(step);
    }
    return steps;
}

bool lasts_or_failed(uint64_t end) { return end == 0 || end & has_failed; }

py::object wait_of(const Flight& flight, uint64_t entered, uint64_t before, const ClockReading& now) {
    const WaitEntry& wait = flight.wait;
    const OperationEntry& operation = flight.operations[entered % recorded_operations];
    if (entered <= before || wait.number.load(std::memory_order_acquire) != entered ||
        !lasts_or_failed(operation.end.load(std::memory_order_acquire)))
        return py::none();
    py::dict waiting;
    waiting["number"] = entered - before;
    waiting["since"] = now.seconds(wait.since.load(std::memory_order_acquire));
    waiting["step"] = wait.step.load(std::memory_order_acquire);
    waiting["peer"] = rank_or_none(wait.peer.load(std::memory_order_acquire));
    waiting["text"] = wait.text.load();
    waiting["note"] = wait.note.load();
    if (wait.number.load(std::memory_order_acquire) != entered) return py::none();
    return waiting;
}

py::dict snapshot(const Control& control) {
    const Flight& flight = control.flight;
    const uint64_t before = flight.before_users.load(std::memory_order_acquire);
    const auto shown = [before](uint64_t number) { return number > before ? number - before : 0; };
    const uint64_t entered = control.entered.load(std::memory_order_acquire);
    const ClockReading now = clocks(flight);
    py::dict found;
    found["version"] = 1;
    found["group"] = flight.group.load();
    found["token"] = flight.token.load();
    found["rank"] = flight.rank.load();
    found["size"] = flight.size.load();
    found["pid"] = control.pid;
    found["closed"] = control.closed.load(std::memory_order_acquire) != 0;
    found["error"] = flight.failed.load(std::memory_order_acquire) ? py::object(py::str(flight.failure.load()))
                                                                   : py::object(py::none());
    found["entered"] = shown(entered);
    found["finished"] = shown(control.finished.load(std::memory_order_acquire));
    found["monotonic"] = static_cast<double>(now.ns) * 1e-9;
    found["wall"] = wall_seconds();
    found["waiting"] = wait_of(flight, entered, before, now);
    found["operations"] = operations_of(flight, entered, before, now);
    found["steps"] = steps_of(flight, entered, before, now);
    found["messages"] = messages_of(flight, now);
    found["peers"] = py::list();
    return found;
}

py::dict flight_of(const Communicator& communicator) {
    const Endpoint& endpoint = communicator.endpoint;
    py::dict found = snapshot(endpoint.control());
    py::list peers;
    for (uint32_t peer = 0; peer < endpoint.geometry().size; ++peer) {
        if (peer == endpoint.rank()) continue;
        const Endpoint::Position position = endpoint.position(peer);
        py::dict seen;
        seen["rank"] = endpoint.user_rank(peer);
        seen["pid"] = endpoint.pid(peer);
        seen["entered"] = position.entered;
        seen["finished"] = position.finished;
        seen["closed"] = position.closed;
        seen["gone"] = endpoint.gone(peer);
        peers.append(seen);
    }
    found["peers"] = peers;
    return found;
}

// The first bytes of a region of another process, or this.
class Window {
  public:
    Window(int pid, int fd) {
        const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
        const int own = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        if (own < 0) refuse(path + " can not be read: " + std::strerror(errno));
        struct stat status;
        const bool fits = fstat(own, &status) == 0 && static_cast<size_t>(status.st_size) >= sizeof(Control);
        void* address = fits ? mmap(nullptr, sizeof(Control), PROT_READ, MAP_SHARED, own, 0) : MAP_FAILED;
        ::close(own);
        if (address == MAP_FAILED) refuse(path + " is no memory of this version of abccl");
        base_ = address;
        if (control().flight.magic.load(std::memory_order_acquire) != flight_magic) {
            munmap(base_, sizeof(Control));
            refuse(path + " is no memory of this version of abccl");
        }
    }
    ~Window() { munmap(base_, sizeof(Control)); }
    Window(const Window&) = delete;
    Window& operator=(const Window&) = delete;
    const Control& control() const { return *static_cast<const Control*>(base_); }

  private:
    [[noreturn]] static void refuse(const std::string& why) {
        throw Failure(Kind::transport, "flight recorder: " + why);
    }
    void* base_ = nullptr;
};

py::dict position_of(const Endpoint& endpoint) {
    const Endpoint::Position position = endpoint.position(endpoint.rank());
    const Control& control = endpoint.control();
    const bool waits =
        control.flight.wait.number.load(std::memory_order_acquire) == control.entered.load(std::memory_order_acquire) &&
        position.finished < position.entered;
    py::dict found;
    found["entered"] = position.entered;
    found["finished"] = position.finished;
    found["closed"] = position.closed;
    found["last"] = position.last;
    found["ended"] = position.ago && position.finished == position.entered ? py::object(py::float_(*position.ago))
                                                                           : py::object(py::none());
    found["waiting"] = waits ? py::object(py::str(control.flight.wait.text.load())) : py::object(py::none());
    return found;
}

int signal_pipe = -1;
int signal_owner = 0;

void on_signal(int) {
    if (getpid() != signal_owner) return;  // a forked child, whose pipe is its parent's
    const int kept = errno;
    const char byte = 0;
    if (write(signal_pipe, &byte, 1) < 0) {
    }  // full: somebody has yet to read the last
    errno = kept;
}

std::optional<int> attend_signal(int number) {
    struct sigaction present;
    if (sigaction(number, nullptr, &present) != 0)
        throw Failure(Kind::argument, "no signal " + std::to_string(number) + " can be attended to");
    const bool inherited = present.sa_handler == on_signal && signal_owner != getpid();
    if (present.sa_handler != SIG_DFL && !inherited) return std::nullopt;
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) throw Failure(Kind::transport, std::string("no pipe: ") + std::strerror(errno));
    fcntl(ends[1], F_SETFL, O_NONBLOCK);
    signal_pipe = ends[1];
    signal_owner = getpid();
    struct sigaction ours{};
    ours.sa_handler = on_signal;
    ours.sa_flags = SA_RESTART;
    sigaction(number, &ours, nullptr);
    return ends[0];
}

}  // namespace

void add_flight(py::module_& m) {
    m.def(
        "read_flight", [](int pid, int fd) { return snapshot(Window(pid, fd).control()); }, py::arg("pid"),
        py::arg("fd"), "What the flight recorder in this file of a process tells.");
    m.def("inject", &faults::inject, py::arg("point"), py::arg("action"), py::arg("after"), py::arg("milliseconds") = 0,
          "For tests: at the pass of this number of a point, from 0, this process does something, once.");
    m.def("passes", &faults::passes, py::arg("point"), "How often a point was passed since the last `inject`.");
    m.def("on_signal", &attend_signal, py::arg("number"),
          "A file that gets a byte for each such signal; None if the process has a handler for it, or such a file.");
    m.attr("BOARD_BYTES") = board_bytes;
    m.attr("DECISIONS") = decisions_kept;
}

void add_flight(py::class_<Communicator, std::shared_ptr<Communicator>>& communicator) {
    communicator.def("flight", &flight_of, "What the flight recorder tells, and how far the others of this host are.")
        .def("set_group",
             [](Communicator& c, const std::string& name, uint64_t token) { c.endpoint.set_group(name, token); })
        .def("set_records_steps", [](Communicator& c, bool all) { c.endpoint.recorder().set_all_steps(all); })
        .def("set_records_messages", [](Communicator& c, bool records) { c.mailbox.records = records; })
        .def("begin_call", [](Communicator& c, uint32_t signature, const std::string& text,
                              uint64_t bytes) { return c.endpoint.begin_call(signature, text, bytes); })
        .def("end_call", [](Communicator& c, bool well) { c.endpoint.finish(well); })
        .def("begin_message",
             [](Communicator& c, bool sends, int32_t peer, py::object tag, uint64_t bytes) {
                 return c.endpoint.recorder().begin_message(sends, peer, tag.is_none() ? any_tag : tag.cast<int64_t>(),
                                                            bytes);
             })
        .def("end_message", [](Communicator& c, uint64_t number, int32_t peer,
                               bool well) { c.endpoint.recorder().end_message(number, peer, well); })
        .def("note", [](Communicator& c, const std::string& text) { c.endpoint.recorder().note(text); })
        .def("position", [](const Communicator& c) { return position_of(c.endpoint); })
        .def("stragglers", [](const Communicator& c) { return c.endpoint.stragglers(c.endpoint.rank()); })
        .def("title", [](const Communicator& c) { return c.endpoint.title(); })
        .def(
            "status_words",
            [](const Communicator& c, uint64_t entered, uint64_t finished, bool closed, const std::string& last,
               std::optional<double> ago) { return c.endpoint.status_words({entered, finished, closed, last, ago}); },
            py::arg("entered"), py::arg("finished"), py::arg("closed"), py::arg("last"), py::arg("ago"))
        .def("set_recorder_failure",
             [](Communicator& c, py::object callback) {
                 // The last owner of the communicator may be a thread without the GIL.
                 std::shared_ptr<py::object> kept(new py::object(std::move(callback)), [](py::object* object) {
                     if (!Py_IsInitialized()) return;
                     WithGil acquired;
                     delete object;
                 });
                 WithoutGil released;
                 c.attend([kept] {
                     if (!Py_IsInitialized()) return;
                     WithGil acquired;
                     take_gil([&] {  // Python gives the lock back, and takes it again
                         try {
                             (*kept)();
                         } catch (py::error_already_set& error) {
                             error.discard_as_unraisable("abccl: a failure's callback");
                         }
                     });
                 });
             })
        .def(
            "set_stamps", [](Communicator& c, bool stamps) { c.endpoint.recorder().set_stamps(stamps); },
            py::arg("stamps"), "Whether records have times: to measure what these cost.")
        .def("gone", [](const Communicator& c, uint32_t peer) { return c.endpoint.gone(peer); })
        .def("board_publish",
             [](Communicator& c, uint64_t round, const py::bytes& blob) {
                 const std::string_view data(blob);
                 c.endpoint.publish(round, data.data(), data.size());
             })
        .def("board_read",
             [](const Communicator& c, uint32_t peer, uint64_t round) {
                 auto [latest, data] = c.endpoint.published(peer, round);
                 return py::make_tuple(latest, data ? py::object(py::bytes(*data)) : py::object(py::none()));
             })
        .def("decide",
             [](Communicator& c, uint32_t question, uint64_t value) { return c.endpoint.decide(question, value); });
}

}  // namespace abccl
