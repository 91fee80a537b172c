// Threads that help with a call.
//
// The caller works too, and it never waits for a helper that has not begun. A helper
// that the system does not schedule therefore costs nothing.
#ifndef MINW_POOL_H_
#define MINW_POOL_H_

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <list>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace minw {

class Pool {
 public:
  static Pool& shared() { return *shared_; }

  // Calls work(0), ..., work(count - 1), in any order, on up to `threads` threads.
  // `work` must not throw.
  template <class Work>
  void run(size_t count, int threads, const Work& work) {
    size_t most = std::max(threads, 1);
    Job job(count, static_cast<int>(std::min(most, count)));
    job.call = [](const void* work, size_t i) { (*static_cast<const Work*>(work))(i); };
    job.work = &work;
    if (job.helpers) start(&job);
    job.help();
    if (job.helpers) finish(&job);
  }

 private:
  struct Job {
    Job(size_t count, int threads) : count(count), helpers(threads - 1) {}
    void help() {
      for (size_t i; (i = next.fetch_add(1)) < count;) call(work, i);
    }
    const size_t count;
    const int helpers;
    int wanted = helpers;  // Helpers that have not begun; guarded by the pool's lock.
    int active = 0;        // Helpers at work; guarded by the pool's lock.
    std::atomic<size_t> next{0};
    void (*call)(const void*, size_t);
    const void* work;
  };

  void start(Job* job) {
    std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back(job);
    try {
      for (; threads_ < std::min(job->helpers, kMaxThreads); threads_++)
        std::thread(&Pool::helper, this).detach();
      // NOLINTNEXTLINE(bugprone-empty-catch)
    } catch (const std::system_error&) {
      // The system refuses more threads. The call runs on those that there are.
    }
    begun_.notify_all();
  }

  void finish(Job* job) {
    std::unique_lock<std::mutex> lock(mutex_);
    jobs_.remove(job);
    ended_.wait(lock, [&] { return !job->active; });
  }

  void helper() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      auto job = std::find_if(jobs_.begin(), jobs_.end(),
                              [](const Job* job) { return job->wanted; });
      if (job == jobs_.end()) {
        begun_.wait(lock);
        continue;
      }
      Job* mine = *job;
      mine->wanted--;
      mine->active++;
      lock.unlock();
      mine->help();
      lock.lock();
      mine->active--;
      ended_.notify_all();
    }
  }

  static Pool* const shared_;
  static constexpr int kMaxThreads = 256;
  std::mutex mutex_;
  std::condition_variable begun_, ended_;
  std::list<Job*> jobs_;
  int threads_ = 0;
};

// The pool is made when the library is loaded, and never destroyed, because helpers may
// outlive static objects. A fork's child has no helpers, and one of them may have held
// the lock. The child therefore starts with a new pool.
// NOLINTNEXTLINE(bugprone-throwing-static-initialization): there is no library without.
inline Pool* const Pool::shared_ = [] {
  static Pool* pool = new Pool;
  pthread_atfork(nullptr, nullptr, [] { new (pool) Pool; });
  return pool;
}();

}  // namespace minw

#endif  // MINW_POOL_H_
