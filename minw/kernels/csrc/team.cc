// Threads that help with a call; see team.h.
#include "team.h"

#include <pthread.h>

#include <algorithm>
#include <new>
#include <system_error>
#include <thread>

namespace minw {
namespace {

using Clock = std::chrono::steady_clock;

// Teams, that is, callers that have helpers at the same time.
constexpr int kTeams = 64;

// How long a helper waits for the next loop before it sleeps. Calls that follow each
// other closely find it awake.
constexpr auto kSpin = std::chrono::microseconds(50);

// A caller has waited long if it waited for so long after it found no piece left, and
// for the time that it worked in the loop. The system has then given the core of a
// helper to another process.
constexpr auto kLongWait = std::chrono::microseconds(500);

// Shortest and longest time in which a caller has no helpers after a long wait.
constexpr auto kMinPause = std::chrono::milliseconds(20);
constexpr auto kMaxPause = std::chrono::milliseconds(1000);

// Spins before the clock is read or the core is offered to another thread.
constexpr int kSpins = 64;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The teams are made when the library is loaded, and never destroyed, because helpers
// may outlive static objects. A fork's child has no helpers, and one of them may have
// held a lock. The child therefore starts with new teams.
// NOLINTNEXTLINE(bugprone-throwing-static-initialization): there is no library without.
Team* const teams = [] {
  static Team* const all = new Team[kTeams];
  pthread_atfork(nullptr, nullptr, [] {
    for (int i = 0; i < kTeams; i++) new (all + i) Team;
  });
  return all;
}();

}  // namespace

Team::Lease::Lease(int threads) : threads_(std::clamp(threads, 1, kMaxThreads)) {
  for (int i = 0; threads_ > 1 && i < kTeams; i++) {
    bool lent = false;
    if (!teams[i].lent_.compare_exchange_strong(lent, true)) continue;
    team_ = &teams[i];
    return;
  }
  threads_ = 1;
}

Team::Lease::~Lease() {
  if (team_) team_->lent_.store(false, std::memory_order_release);
}

void Team::add_helpers(int threads) {
  try {
    for (; helpers_ < threads - 1; helpers_++)
      std::thread(&Team::help, this, helpers_ + 1).detach();
    // NOLINTNEXTLINE(bugprone-empty-catch)
  } catch (const std::system_error&) {
    // The system refuses more threads. The call runs on those that there are.
  }
}

void Team::loop(size_t count, int threads, Call call, const void* piece) {
  if (pause_.count() && Clock::now() < alone_until_) {
    for (size_t i = 0; i < count; i++) call(piece, i, 0);
    return;
  }
  add_helpers(static_cast<int>(std::min<size_t>(threads, count)));
  call_ = call;
  piece_ = piece;
  done_.store(0, std::memory_order_relaxed);
  uint64_t number = (state_.load(std::memory_order_relaxed) >> kLoopBit) + 1;
  state_.store(number << kLoopBit | uint64_t(threads - 1) << kThreadsBit |
               uint64_t{count} << kCountBit);
  if (sleepers_.load()) wake();
  auto begin = Clock::now();
  while (work(0)) {
  }
  auto all_done = [&] { return done_.load(std::memory_order_acquire) == count; };
  for (int i = 0; i < kSpins && !all_done(); i++) relax();
  if (all_done()) return;
  auto now = Clock::now();
  const auto late = now + (now - begin) + kLongWait;
  for (; !all_done(); now = Clock::now()) {
    for (int i = 0; i < kSpins && !all_done(); i++) relax();
    if (now > late) std::this_thread::yield();
  }
  if (now > late) {
    pause_ = std::clamp<std::chrono::microseconds>(2 * pause_, kMinPause, kMaxPause);
    alone_until_ = now + pause_;
  } else if (now > alone_until_ + pause_) {
    pause_ = {};  // There was no long wait for as long as the last pause.
  }
}

// Takes and runs a piece of the current loop. Returns false if there is none.
bool Team::work(int thread) {
  uint64_t state = state_.load(std::memory_order_acquire);
  constexpr uint64_t kMask = kMaxPieces;
  for (;;) {
    size_t next = state & kMask, count = state >> kCountBit & kMask;
    int threads = static_cast<int>(state >> kThreadsBit & 255) + 1;
    if (next >= count || thread >= threads) return false;
    if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) {
      call_(piece_, next, thread);
      done_.fetch_add(1, std::memory_order_release);
      return true;
    }
  }
}

// Wakes one helper, which wakes the next one. The caller does not wait until the system
// has woken all of them.
void Team::wake() {
  std::lock_guard<std::mutex> lock(mutex_);
  sleepers_.store(false);
  begun_.notify_one();
}

void Team::help(int thread) {
  for (;;) {
    uint64_t seen = state_.load(std::memory_order_relaxed);
    while (work(thread)) {
    }
    if (!spin(seen, thread)) sleep(seen, thread);
  }
}

// Whether another loop than the one seen has begun, in which the thread takes part.
bool Team::begun(uint64_t seen, int thread) const {
  uint64_t now = state_.load();
  return now >> kLoopBit != seen >> kLoopBit &&
         thread <= static_cast<int>(now >> kThreadsBit & 255);
}

// Waits briefly for a loop. Returns whether it has begun.
bool Team::spin(uint64_t seen, int thread) const {
  auto end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < kSpins; i++) {
      if (begun(seen, thread)) return true;
      relax();
    }
  } while (Clock::now() < end);
  return false;
}

// Sleeps until a loop begins.
void Team::sleep(uint64_t seen, int thread) {
  std::unique_lock<std::mutex> lock(mutex_);
  for (bool woken = false;; woken = true) {
    // The caller stores the state and then reads `sleepers_`. The order here is the
    // opposite, so that at least one of both sees what the other one wrote.
    sleepers_.store(true);
    if (begun(seen, thread)) {
      if (woken) begun_.notify_one();
      return;
    }
    begun_.wait(lock);
  }
}

}  // namespace minw
