// Jobs shared by threads, which are made anew: no pool to fork, to tune or to fight.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// make() in every thread, and what it gives is called for jobs 0 .. count - 1.
template <typename Make> void parallel(int64_t count, int64_t threads, Make make) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    auto job = make();
    for (int64_t i; (i = next++) < count;) job(i);
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < std::min(threads, count); ++i) others.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads to be had: fewer will do
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace
