#include "team.h"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

namespace bitdistill {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kSpins = 4000;

// A ticket: 24 bits step number, 20 bits number of items, 20 bits next item.
constexpr int kItemBits = 20;
constexpr uint64_t kItemMask = (uint64_t(1) << kItemBits) - 1;

uint64_t step_of(uint64_t ticket) { return ticket >> (2 * kItemBits); }
int num_items_of(uint64_t ticket) { return int(ticket >> kItemBits & kItemMask); }
int next_item_of(uint64_t ticket) { return int(ticket & kItemMask); }
uint64_t make_ticket(uint64_t step, int num_items) {
  return step << (2 * kItemBits) | uint64_t(num_items) << kItemBits;
}

}  // namespace

Team::Team(int num_threads) : owner_(getpid()) {
  // More threads than cores: looking out would take the core from the one that works.
  spins_ = num_threads <= int(std::max(std::thread::hardware_concurrency(), 1u)) ? kSpins : 0;
  try {
    workers_.reserve(num_threads);
    for (int thread = 1; thread < num_threads; ++thread) workers_.emplace_back([this, thread] { look_out(thread); });
  } catch (const std::exception&) {  // no thread, or no memory for one
    const std::size_t started = workers_.size() + 1;
    end();
    throw std::invalid_argument("the system must be able to start every thread; got num_threads=" +
                                std::to_string(num_threads) + ", started=" + std::to_string(started) +
                                "; ask for fewer, or raise the limit of processes or memory");
  }
}

Team::~Team() {
  if (owner_ == getpid()) {
    end();
    return;
  }
  // A forked child: the threads are the parent's, and those asleep would be waited for. Their handles are left alone:
  // the child's own threads may have the same ones by now.
  new std::vector<std::thread>(std::move(workers_));
  wake_.release();
}

void Team::end() {
  stop_.store(true);
  publish(make_ticket(step_of(ticket_.load()) + 1, 0));
  for (std::thread& worker : workers_) worker.join();
}

void Team::publish(uint64_t ticket) {
  ticket_.store(ticket);
  if (num_sleeping_.load() == 0) return;
  { const std::lock_guard<std::mutex> lock(sleep_); }  // a thread about to sleep has seen the ticket or sleeps now
  wake_->notify_all();
}

void Team::run(int num_items, Function function, void* context) {
  std::unique_lock<std::mutex> only_step(caller_, std::defer_lock);
  if (num_items <= 1 || num_items > int(kItemMask) || workers_.empty() || owner_ != getpid() || !only_step.try_lock()) {
    for (int item = 0; item < num_items; ++item) function(context, item, 0);
    return;
  }
  const uint64_t ticket = make_ticket(step_of(ticket_.load(std::memory_order_relaxed)) + 1, num_items);
  num_done_.store(0, std::memory_order_relaxed);
  function_.store(function, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  publish(ticket);
  take_items(step_of(ticket), 0);
  for (int spin = 0; num_done_.load(std::memory_order_acquire) < num_items; ++spin) {
    if (spin < spins_) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
  if (!has_failed_.exchange(false)) return;
  std::exception_ptr failure;
  {
    const std::lock_guard<std::mutex> lock(sleep_);
    std::swap(failure, failure_);
  }
  std::rethrow_exception(failure);
}

void Team::take_items(uint64_t step, int thread) {
  for (;;) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    if (step_of(ticket) != step || next_item_of(ticket) >= num_items_of(ticket)) return;
    const Function function = function_.load(std::memory_order_relaxed);
    void* const context = context_.load(std::memory_order_relaxed);
    // If this succeeds, what was read above is the step's own: it cannot have ended without this item.
    if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
    try {
      function(context, next_item_of(ticket), thread);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(sleep_);
      if (!failure_) failure_ = std::current_exception();
      has_failed_.store(true);
    }
    num_done_.fetch_add(1, std::memory_order_release);
  }
}

void Team::look_out(int thread) {
  uint64_t seen = 0;  // number of a step that is over
  for (;;) {
    for (int spin = 0; step_of(ticket_.load(std::memory_order_acquire)) == seen && spin < spins_; ++spin) pause();
    if (step_of(ticket_.load()) == seen) {
      std::unique_lock<std::mutex> lock(sleep_);
      num_sleeping_.fetch_add(1);
      wake_->wait(lock, [&] { return step_of(ticket_.load()) != seen; });
      num_sleeping_.fetch_sub(1);
    }
    seen = step_of(ticket_.load());
    if (stop_.load()) return;  // set before the last ticket, so read after it: its step is not waited out
    take_items(seen, thread);
  }
}

}  // namespace bitdistill
