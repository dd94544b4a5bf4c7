// Giving Python's global interpreter lock back while native code waits, and taking it again.
#pragma once
#include <Python.h>
#include <cxxabi.h>
#include <unistd.h>

namespace abccl {

// Until Python 3.13, a thread that wants the lock while the interpreter ends is ended by a forced unwinding, which
// terminates the process at the first destructor that it meets. Such a thread sleeps here instead until the process is
// gone, as it does from Python 3.14 on.
template <class Take>
void take_gil(Take take) {
    try {
        take();
    } catch (abi::__forced_unwind&) {
        for (;;) pause();
    }
}

struct WithoutGil {
    WithoutGil() : state_(PyEval_SaveThread()) {}
    ~WithoutGil() {
        take_gil([this] { PyEval_RestoreThread(state_); });
    }
    WithoutGil(const WithoutGil&) = delete;

  private:
    PyThreadState* state_;
};

struct WithGil {
    WithGil() {
        take_gil([this] { state_ = PyGILState_Ensure(); });
    }
    ~WithGil() { PyGILState_Release(state_); }
    WithGil(const WithGil&) = delete;

  private:
    PyGILState_STATE state_;
};

}  // namespace abccl
