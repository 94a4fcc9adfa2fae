// Threads that wait on a condition variable between calls. They never spin: a busy neighbour on a spinning pool's
// core costs a factor of ten.
#pragma once

#include <functional>

namespace bitdistill {

// Runs part(0) .. part(num_parts - 1) at the same time, part 0 on the calling thread; returns when all are done.
// The parts must not throw. Calls from several threads take turns. Threads are made on first use and kept.
void run_parts(int num_parts, const std::function<void(int)>& part);

}  // namespace bitdistill
