// Threads that help with a call.
//
// A team is a caller and its helpers. The caller runs loops one after another: over the
// images of a batch, or over the pieces of one layer after the other. Each thread that
// is free takes the next piece of the current loop. The caller works too, and it never
// waits for a helper that has taken no piece. A helper that the system does not
// schedule therefore costs nothing. Helpers spin briefly between loops, then sleep.
#ifndef MINW_TEAM_H_
#define MINW_TEAM_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace minw {

class Team {
 public:
  // Most pieces of one loop, and most threads of a team.
  static constexpr size_t kMaxPieces = (size_t{1} << 20) - 1;
  static constexpr int kMaxThreads = 256;

  // A team that is lent to one caller. If all teams are lent, the caller is alone.
  class Lease {
   public:
    explicit Lease(int threads);
    ~Lease();
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

    // Upper bound of the threads that work in loops.
    int threads() const { return threads_; }

    // Calls piece(i, thread) for i = 0, ..., count - 1 in any order; count <=
    // kMaxPieces. No two calls with the same `thread`, 0 <= thread < threads(),
    // overlap. `piece` must not throw.
    template <class Piece>
    void loop(size_t count, const Piece& piece) const {
      if (count < 2 || threads_ < 2) {
        for (size_t i = 0; i < count; i++) piece(i, 0);
        return;
      }
      team_->loop(
          count, threads_,
          [](const void* p, size_t i, int thread) {
            (*static_cast<const Piece*>(p))(i, thread);
          },
          &piece);
    }

   private:
    Team* team_ = nullptr;
    int threads_;
  };

 private:
  using Call = void (*)(const void* piece, size_t i, int thread);

  // The state of the current loop in one word, so that a piece is taken by a single
  // compare-and-swap, which fails if the loop has ended. A thread that took a piece
  // thereby keeps `call_` and `piece_` as they are, because the caller starts no other
  // loop before all pieces are done.
  //
  //   bits 0-19   the next piece            bits 40-47   threads of the loop, less 1
  //   bits 20-39  the number of pieces      bits 48-63   number of the loop
  static constexpr int kCountBit = 20, kThreadsBit = 40, kLoopBit = 48;

  void loop(size_t count, int threads, Call call, const void* piece);
  bool work(int thread);
  void add_helpers(int threads);
  void wake();
  void help(int thread);
  bool begun(uint64_t seen, int thread) const;
  bool spin(uint64_t seen, int thread) const;
  void sleep(uint64_t seen, int thread);

  std::atomic<bool> lent_{false};
  alignas(64) std::atomic<uint64_t> state_{0};
  Call call_ = nullptr;
  const void* piece_ = nullptr;
  alignas(64) std::atomic<size_t> done_{0};
  std::atomic<bool> sleepers_{false};
  std::mutex mutex_;
  std::condition_variable begun_;
  int helpers_ = 0;  // Helpers that were started; only the caller changes it.
  // A loop that waited long for a helper was on a busy machine. The next loops are then
  // run by the caller alone, for a time that doubles with each such wait.
  std::chrono::steady_clock::time_point alone_until_{};
  std::chrono::microseconds pause_{0};
};

}  // namespace minw

#endif  // MINW_TEAM_H_
