// A team of threads for thousands of short parallel steps a second.
#pragma once

#include <sys/types.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace bitdistill {

// A step is a number of items; every free thread takes the next item until none is left, and the step ends when all
// items are done, not when all threads have come: a thread that the system has put aside holds nobody up. Between steps
// a thread looks out for work for some 50 microseconds, then sleeps, so a busy neighbour gets the core.
//
// run() may be called from several threads: while one step is shared out, another caller runs its items alone. In a
// forked child, which has none of the threads, every caller does. What an item throws, run() throws when the step is
// over.
class Team {
 public:
  // Throws std::invalid_argument where the system does not start so many threads.
  explicit Team(int num_threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int num_threads() const { return int(workers_.size()) + 1; }

  // Calls work(item, thread) for every item in [0, num_items), thread in [0, num_threads).
  template <class Work>
  void run(int num_items, Work&& work) {
    run(num_items, [](void* context, int item, int thread) { (*static_cast<Work*>(context))(item, thread); }, &work);
  }

  // Calls work(begin, end, thread) for pieces of [0, count), of `most` or fewer, all but the last even. Every thread
  // goes through a run of its own from the front, one stream of memory, then through those that nobody has begun, and
  // then takes from the ends of others. A piece is two, or at most half of what is left of a run: none waits long.
  template <class Work>
  void run_through(int count, int most, Work&& work);

 private:
  using Function = void (*)(void* context, int item, int thread);

  void run(int num_items, Function function, void* context);
  void look_out(int thread);
  // Does items of step `step` until none is left or the step is another.
  void take_items(uint64_t step, int thread);
  void publish(uint64_t ticket);
  void end();  // of the threads

  // Step number, number of items, next item: one comparison shows that a step is still on and has this item.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  std::atomic<Function> function_{nullptr};
  std::atomic<void*> context_{nullptr};
  alignas(64) std::atomic<int> num_done_{0};
  std::atomic<int> num_sleeping_{0};
  std::atomic<bool> stop_{false}, has_failed_{false};
  std::mutex caller_;
  std::mutex sleep_;
  std::unique_ptr<std::condition_variable> wake_ = std::make_unique<std::condition_variable>();
  std::exception_ptr failure_;  // the first of a step; behind sleep_
  std::vector<std::thread> workers_;
  int spins_;
  pid_t owner_;
};

template <class Work>
void Team::run_through(int count, int most, Work&& work) {
  struct alignas(64) Run {
    std::atomic<uint64_t> left;  // begin in the upper half, end in the lower
    std::atomic<bool> has_owner{false};
  };
  const auto pack = [](uint64_t begin, uint64_t end) { return begin << 32 | end; };
  const int num_runs = num_threads();
  std::vector<Run> runs(num_runs);
  for (int i = 0; i < num_runs; ++i) {
    const auto bound = [&](int run) { return int64_t(count) * run / num_runs / 2 * 2; };
    runs[i].left.store(pack(bound(i), i + 1 < num_runs ? bound(i + 1) : count), std::memory_order_relaxed);
  }
  run(num_runs, [&](int own, int thread) {
    for (int i = 0; i < num_runs; ++i) {
      std::atomic<uint64_t>& left = runs[(own + i) % num_runs].left;
      const bool is_owner = !runs[(own + i) % num_runs].has_owner.exchange(true);
      for (uint64_t now = left.load(std::memory_order_relaxed);;) {
        const int begin = int(now >> 32), end = int(now & UINT32_MAX);
        if (begin >= end) break;
        const int piece = std::clamp((end - begin) / 4 * 2, 2, most);
        const int first = is_owner ? begin : std::max(begin, (end - 1) / piece * piece);
        const int last = is_owner ? std::min(end, begin + piece) : end;
        const uint64_t then = is_owner ? pack(last, end) : pack(begin, first);
        if (!left.compare_exchange_weak(now, then, std::memory_order_relaxed)) continue;
        work(first, last, thread);
        now = then;
      }
    }
  });
}

}  // namespace bitdistill
