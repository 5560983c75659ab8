// A persistent pool of workers that all run the same function, the caller being worker 0.
//
// One run() is one step: workers meet at barriers between phases and share out a phase's items.
// Waiting spins for a bounded time, then sleeps in the kernel, so a descheduled partner never costs
// a whole time slice of spinning; with more workers than CPUs nobody spins.
//
// fork(): the child has no workers. run() in the child returns false, and the destructor leaves the
// memory shared with workers that do not exist alone. Open a model after forking.
#pragma once
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <type_traits>
#include <vector>

#include "sinterlm/arena.h"
#include "sinterlm/tile_state.h"

namespace sl {

constexpr size_t kScratchBytes = kHugePage;  // per worker
// Of the memory that workers share, per worker: a head of 128 columns of 128 rows.
constexpr int64_t kSharedSums = 128 * 128;
constexpr int kSharedCounts = 64;

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

// IEEE defaults for this thread while it lives: round to nearest, subnormals kept, no traps. The
// caller's own state comes back at the end.
class FloatState {
 public:
  FloatState() {
#if defined(__x86_64__)
    saved_ = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(0x1f80);
#elif defined(__aarch64__)
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
#endif
  }
  ~FloatState() {
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(static_cast<unsigned>(saved_));
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" ::"r"(saved_));
#endif
  }
  FloatState(const FloatState&) = delete;
  FloatState& operator=(const FloatState&) = delete;

 private:
  uint64_t saved_ = 0;
};

// Keeps the calling thread on one CPU while it lives; cpu < 0 does nothing. Returns it afterwards,
// since threads that the host starts later would inherit the mask.
class PinnedCaller {
 public:
  explicit PinnedCaller(int cpu) {
    if (cpu < 0 || cpu >= CPU_SETSIZE || sched_getaffinity(0, sizeof saved_, &saved_) != 0) return;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    stays_ = CPU_EQUAL(&one, &saved_);
    moved_ = !stays_ && sched_setaffinity(0, sizeof one, &one) == 0;
  }
  bool on_cpu() const { return stays_ || moved_; }
  ~PinnedCaller() {
    if (moved_) sched_setaffinity(0, sizeof saved_, &saved_);
  }
  PinnedCaller(const PinnedCaller&) = delete;
  PinnedCaller& operator=(const PinnedCaller&) = delete;

 private:
  cpu_set_t saved_;
  bool stays_ = false, moved_ = false;
};

// A number that only grows, and threads waiting for it to change.
class Gate {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }

  void advance() {
    value_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) != 0) futex(FUTEX_WAKE_PRIVATE, INT_MAX);
  }

  // Returns once value() != old. Sleepers announce themselves before the kernel compares the
  // value, so an advance() either sees the sleeper or is seen by the comparison.
  void wait_past(uint32_t old, int64_t spin_ns) {
    if (spin_ns > 0) {
      const int64_t until = now_ns() + spin_ns;
      do {
        for (int i = 0; i < 32; ++i) {
          if (value() != old) return;
          cpu_relax();
        }
      } while (now_ns() < until);
    }
    while (value() == old) {
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      futex(FUTEX_WAIT_PRIVATE, old);
      sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

 private:
  void futex(int op, uint32_t arg) {
    static_assert(sizeof(std::atomic<uint32_t>) == 4, "the kernel reads a plain 32-bit word");
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&value_), op, arg, nullptr, nullptr, 0);
  }
  alignas(64) std::atomic<uint32_t> value_{0};
  alignas(64) std::atomic<uint32_t> sleepers_{0};
};

// What the workers of one pool share; each counter on a line of its own.
struct Team {
  explicit Team(int n)
      : count(n), shared(Arena::zeroed((kSharedSums * sizeof(float) + kSharedCounts * 4) * n)) {}

  void barrier() {
    if (count == 1) {
      next.store(0, std::memory_order_relaxed);
      return;
    }
    const uint32_t phase = done.value();
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived.store(0, std::memory_order_relaxed);
      next.store(0, std::memory_order_relaxed);  // everybody is here: nobody is claiming items
      done.advance();
    } else {
      done.wait_past(phase, spin_ns);
    }
  }

  // Sums of outputs that several workers compute (cut.h), and how many brought theirs; the counts
  // are zero between ops.
  float* sums() const { return static_cast<float*>(shared.data()); }
  int64_t num_sums() const { return kSharedSums * count; }
  std::atomic<int>& brought(int i) {
    return reinterpret_cast<std::atomic<int>*>(sums() + num_sums())[i];
  }
  int num_brought() const { return kSharedCounts * count; }

  const int count;
  Arena shared;
  int64_t spin_ns = 0;
  Gate done;                                // barriers passed
  alignas(64) std::atomic<int> arrived{0};  // workers waiting at this barrier
  alignas(64) std::atomic<int> next{0};     // next unclaimed item of this phase
};

// One worker's view of the pool. Every worker calls barrier() the same number of times, and at
// least once between two for_each().
struct Worker {
  int id;
  int count;
  void* scratch;  // 2 MiB-aligned, this worker's own
  size_t scratch_bytes;
  Team* team;

  // Waits for all workers; what any wrote before is seen by all after.
  void barrier() { team->barrier(); }

  // f(i) for every i in [0, n), claimed by whichever worker is free: in runs of neighbours, whose
  // memory is one stream, half of a fair share of what is left, so that all finish together.
  template <class F>
  void for_each(int n, F&& f) {
    for (int i = team->next.load(std::memory_order_relaxed); i < n;) {
      const int stop = i + std::max(1, (n - i) / (2 * count));
      if (!team->next.compare_exchange_weak(i, stop, std::memory_order_relaxed)) continue;
      for (; i < stop; ++i) f(i);
      i = team->next.load(std::memory_order_relaxed);
    }
  }

  // f(i) for this worker's own contiguous block of [0, n): the same items in every step.
  template <class F>
  void for_each_static(int n, F&& f) {
    const int first = static_cast<int>(int64_t(n) * id / count);
    const int last = static_cast<int>(int64_t(n) * (id + 1) / count);
    for (int i = first; i < last; ++i) f(i);
  }
};

class Pool {
 public:
  // Worker i runs on cpu_ids[i] when given. Check ok() before use: threads may be refused.
  Pool(int threads, const int32_t* cpu_ids)
      : team_(threads),
        scratch_(Arena::zeroed(kScratchBytes * threads)),
        cpu_ids_(cpu_ids ? std::vector<int32_t>(cpu_ids, cpu_ids + threads)
                         : std::vector<int32_t>(threads, -1)),
        seats_(threads),
        pid_(getpid()) {
    team_.spin_ns = spin_time(threads);
    ok_ = scratch_ && team_.shared && may_use_tiles();  // granted to all threads from now on
    if (cpu_ids_[0] >= 0 && !PinnedCaller(cpu_ids_[0]).on_cpu()) refuse(cpu_ids_[0]);
    for (int i = 0; i < threads; ++i) seats_[i] = {this, i};
    threads_.reserve(threads);
    for (int i = 1; ok_ && i < threads; ++i) ok_ = start(seats_[i]);
    if (!ok_) stop();
  }
  ~Pool() { stop(); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  bool ok() const { return ok_; }
  int refused_cpu() const { return refused_cpu_; }  // the CPU nobody may be pinned to, or -1
  int count() const { return team_.count; }

  // f(worker) on every worker, this thread as worker 0; false after a fork(), nothing run. f must
  // not throw: no worker could leave its barriers alone.
  template <class F>
  bool run(F&& f) {
    if (!ok_ || getpid() != pid_) return false;
    const PinnedCaller pinned(cpu_ids_[0]);
    using Fn = std::remove_reference_t<F>;
    job_ = [](void* fn, Worker& w) { (*static_cast<Fn*>(fn))(w); };
    job_arg_ = const_cast<void*>(static_cast<const void*>(&f));
    team_.next.store(0, std::memory_order_relaxed);
    if (team_.count > 1) jobs_.advance();
    work(0);
    return true;
  }

 private:
  struct Seat {
    Pool* pool;
    int id;
  };

  void work(int id) {
    const FloatState state;
    const TileState tiles;
    char* scratch = static_cast<char*>(scratch_.data()) + kScratchBytes * id;
    Worker w{id, team_.count, scratch, kScratchBytes, &team_};
    job_(job_arg_, w);
    w.barrier();
  }

  static void* thread_main(void* arg) {
    const Seat& seat = *static_cast<Seat*>(arg);
    Pool& pool = *seat.pool;
    for (uint32_t seen = 0;; ++seen) {
      pool.jobs_.wait_past(seen, pool.team_.spin_ns);
      if (pool.stopping_.load(std::memory_order_acquire)) return nullptr;
      pool.work(seat.id);
    }
  }

  bool start(Seat& seat) {
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);  // signals are the host's business
    pthread_t thread;
    const bool made = pthread_create(&thread, nullptr, thread_main, &seat) == 0;
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
    if (!made) return false;
    threads_.push_back(thread);
    char name[16];
    snprintf(name, sizeof name, "sl-worker-%d", seat.id);
    pthread_setname_np(thread, name);
    const int cpu = cpu_ids_[seat.id];
    if (cpu < 0) return true;
    cpu_set_t one;
    CPU_ZERO(&one);
    if (cpu < CPU_SETSIZE) CPU_SET(cpu, &one);
    if (pthread_setaffinity_np(thread, sizeof one, &one) != 0) refuse(cpu);
    return ok_;
  }

  void refuse(int cpu) {
    refused_cpu_ = cpu;
    ok_ = false;
  }

  void stop() {
    ok_ = false;
    if (getpid() != pid_) return;
    stopping_.store(true, std::memory_order_release);
    jobs_.advance();
    for (pthread_t t : threads_) pthread_join(t, nullptr);
    threads_.clear();
  }

  // Long enough for a partner that is running, short against a time slice; nothing where some
  // worker must be off its CPU for another to run. Longer spins were measured to cost eight times
  // the step on a machine with one other busy process: spinners burn the time that the partner
  // needs. Hosts that use every CPU should pin: workers that sleep at barriers may otherwise be
  // woken on the CPU of whoever woke them, and stay stacked there.
  int64_t spin_time(int threads) const {
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    if (cpu_ids_[0] < 0) {
      if (sched_getaffinity(0, sizeof cpus, &cpus) != 0) return 0;
    } else {
      for (int cpu : cpu_ids_)
        if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(cpu, &cpus);
    }
    return CPU_COUNT(&cpus) < threads ? 0 : 75'000;
  }

  Team team_;
  Gate jobs_;  // runs started
  void (*job_)(void*, Worker&) = nullptr;
  void* job_arg_ = nullptr;
  std::atomic<bool> stopping_{false};
  Arena scratch_;
  std::vector<int32_t> cpu_ids_;
  std::vector<Seat> seats_;
  std::vector<pthread_t> threads_;
  pid_t pid_;
  int refused_cpu_ = -1;
  bool ok_ = false;
};

}  // namespace sl
