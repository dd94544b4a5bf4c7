// A call whose arguments were checked once and whose plan is bound, as MPI 4's persistent collectives are.
#pragma once

#include "dispatcher.hpp"

namespace abccl {

class Persistent {
  public:
    Persistent(std::shared_ptr<Dispatcher> dispatcher, std::shared_ptr<const Plan> plan, const void* input,
               void* output, pybind11::object buffers)
        : dispatcher_(std::move(dispatcher)),
          plan_(std::move(plan)),
          input_(input),
          output_(output),
          buffers_(std::move(buffers)) {}

    // Runs it in the calling thread.
    void run();
    // Queues it; refuses while the last start is not finished.
    void start();
    // What was started last; refuses if there is nothing.
    std::shared_ptr<PendingWork> started() const;
    // It has been waited for; unless another was started since.
    void forget(const std::shared_ptr<PendingWork>& waited_for) {
        if (started_ == waited_for) started_.reset();
    }

    // Makes a Python type's instances callable at C's price.
    static void make_callable(PyHeapTypeObject* type);

  private:
    void check_idle();

    std::shared_ptr<Dispatcher> dispatcher_;
    std::shared_ptr<const Plan> plan_;
    const void* input_;
    void* output_;
    pybind11::object buffers_;
    std::shared_ptr<PendingWork> started_;
};

}  // namespace abccl
