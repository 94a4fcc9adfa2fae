#include "thread_pool.h"

#include <unistd.h>

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace bitdistill {
namespace {

class ThreadPool {
 public:
  void run(int num_parts, const std::function<void(int)>& part) {
    const std::lock_guard<std::mutex> one_call_at_a_time(call_mutex_);
    while (num_workers_ < num_parts - 1) {
      std::thread(&ThreadPool::work, this, num_workers_ + 1, generation_).detach();
      ++num_workers_;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      part_ = &part;
      num_parts_ = num_parts;
      num_pending_ = num_parts - 1;
      ++generation_;
    }
    work_arrived_.notify_all();
    part(0);
    std::unique_lock<std::mutex> lock(mutex_);
    work_done_.wait(lock, [this] { return num_pending_ == 0; });
  }

 private:
  void work(int index, uint64_t seen_generation) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      work_arrived_.wait(lock, [&] { return generation_ != seen_generation; });
      seen_generation = generation_;
      if (index >= num_parts_) continue;
      const std::function<void(int)>& part = *part_;
      lock.unlock();
      part(index);
      lock.lock();
      if (--num_pending_ == 0) work_done_.notify_one();
    }
  }

  std::mutex call_mutex_;
  std::mutex mutex_;
  std::condition_variable work_arrived_;
  std::condition_variable work_done_;
  const std::function<void(int)>* part_ = nullptr;
  int num_parts_ = 0;
  int num_pending_ = 0;
  int num_workers_ = 0;
  uint64_t generation_ = 0;
};

// Never destroyed: its threads may still wait when the process exits. A child of fork() has none of the threads, so
// it starts a pool of its own.
ThreadPool& pool_of_this_process() {
  static std::mutex mutex;
  static ThreadPool* pool = nullptr;
  static pid_t owner = -1;
  const std::lock_guard<std::mutex> lock(mutex);
  if (owner != getpid()) {
    pool = new ThreadPool;
    owner = getpid();
  }
  return *pool;
}

}  // namespace

void run_parts(int num_parts, const std::function<void(int)>& part) {
  if (num_parts <= 1) {
    part(0);
  } else {
    pool_of_this_process().run(num_parts, part);
  }
}

}  // namespace bitdistill
