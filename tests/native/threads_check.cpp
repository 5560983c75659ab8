// Exercises the pool; exits with 0, or says what is wrong. Built plain and with ThreadSanitizer.
#include <dirent.h>

#include <cfenv>
#include <cstdlib>
#include <cstring>
#include <string>

#include "sinterlm/cut.h"
#include "sinterlm/numa.h"
#include "sinterlm/sample.h"
#include "sinterlm/threads.h"

using namespace sl;

#define CHECK(what)                                     \
  do {                                                  \
    if (!(what)) {                                      \
      printf("%s:%d: %s\n", __FILE__, __LINE__, #what); \
      exit(1);                                          \
    }                                                   \
  } while (0)

namespace {

void pause_us(int us) {
  const timespec t{0, us * 1000};
  nanosleep(&t, nullptr);
}

// Plain memory written in one phase is read in the next: a lost barrier is a wrong sum or a race.
void check_phases(Pool& pool, int rounds) {
  constexpr int kItems = 101;
  int a[kItems] = {}, b[kItems] = {};
  for (int round = 1; round <= rounds; ++round) {
    std::atomic<int> total{0};
    CHECK(pool.run([&](Worker& w) {
      w.for_each(kItems, [&](int i) { a[i] += i; });
      w.barrier();
      w.for_each(kItems, [&](int i) { b[i] = a[kItems - 1 - i]; });
      w.barrier();
      w.for_each_static(kItems, [&](int i) { total += b[i]; });
    }));
    CHECK(total == round * kItems * (kItems - 1) / 2);
  }
}

void check_static_blocks(Pool& pool) {
  for (int n : {0, 1, 5, 64}) {
    std::vector<int> owner(n, -1);
    pool.run([&](Worker& w) { w.for_each_static(n, [&](int i) { owner[i] = w.id; }); });
    for (int i = 0; i < n; ++i) CHECK(owner[i] >= 0 && (i == 0 || owner[i] >= owner[i - 1]));
  }
}

// Waits longer than anybody spins: sleepers must be woken, at barriers and between runs.
void check_sleep(Pool& pool) {
  for (int round = 0; round < 5; ++round) {
    int late = 0;
    pool.run([&](Worker& w) {
      if (w.id == round % w.count) {
        pause_us(500);
        late = 1;
      }
      w.barrier();
      CHECK(late == 1);
    });
    pause_us(500);
  }
}

void check_scratch(Pool& pool) {
  std::vector<char*> at(pool.count());
  pool.run([&](Worker& w) {
    at[w.id] = static_cast<char*>(w.scratch);
    std::memset(w.scratch, w.id, w.scratch_bytes);
    w.barrier();
    CHECK(at[w.id][0] == w.id && at[w.id][w.scratch_bytes - 1] == w.id);
    CHECK(reinterpret_cast<uintptr_t>(w.scratch) % kHugePage == 0);
  });
}

// Workers compute with IEEE defaults whatever the caller set, and the caller keeps its own.
void check_float_state(Pool& pool) {
  std::fesetround(FE_UPWARD);
#if defined(__x86_64__)
  const unsigned callers = __builtin_ia32_stmxcsr() | 0x8040;  // and flush to zero
  __builtin_ia32_ldmxcsr(callers);
#endif
  volatile float tiny = 1e-30f, one = 1.0f;
  std::vector<float> small(pool.count()), rounded(pool.count());
  pool.run([&](Worker& w) {
    small[w.id] = tiny * 1e-10f;
    rounded[w.id] = one + 1e-9f;
  });
  CHECK(std::fegetround() == FE_UPWARD);
#if defined(__x86_64__)
  CHECK((__builtin_ia32_stmxcsr() & 0xe040) == (callers & 0xe040));
  __builtin_ia32_ldmxcsr(0x1f80);
#endif
  std::fesetround(FE_TONEAREST);
  for (int i = 0; i < pool.count(); ++i) CHECK(small[i] > 0 && rounded[i] == 1.0f);
}

int count_workers() {
  int n = 0;
  DIR* dir = opendir("/proc/self/task");
  while (const dirent* entry = readdir(dir)) {
    const std::string path = std::string("/proc/self/task/") + entry->d_name + "/comm";
    char name[32] = {};
    if (FILE* f = fopen(path.c_str(), "r")) {
      n += fgets(name, sizeof name, f) && !strncmp(name, "sl-worker-", 10);
      fclose(f);
    }
  }
  closedir(dir);
  return n;
}

void check_sampler(Pool& pool) {
  constexpr int V = 9000, R = 3;
  Sampler sampler;
  CHECK(sampler.reserve(pool.count(), V, R));
  std::vector<float> logits(R * V), logprobs(R);
  std::vector<int32_t> tokens(R), ranks(R), first;
  for (int i = 0; i < R * V; ++i) logits[i] = static_cast<float>(mix64(i) >> 44) * 1e-5f;
  sl_sampling rows[R] = {};
  for (int r = 0; r < R; ++r) {
    rows[r].top_p = r == 2 ? 0.5f : 1.0f;
    rows[r].repetition_penalty = 1;
    rows[r].temperature = static_cast<float>(r);
  }
  for (int round = 0; round < 3; ++round) {
    sampler.begin({rows, R, logits.data(), V, V, 0, tokens.data(), logprobs.data(), ranks.data(),
                   nullptr, nullptr});
    pool.run([&](Worker& w) {
      sampler.scan(w);
      w.barrier();
      sampler.draw(w);
    });
    if (round == 0) first = tokens;
    CHECK(tokens == first);
  }
}

// Granules that several workers compute are finished once, by one that sees every sum.
void check_cut(Pool& pool) {
  constexpr int kCols = 192, kRows = 50, kGranule = 64;
  std::vector<float> out(kCols * kRows);
  for (int round = 1; round <= 20; ++round) {
    std::atomic<int> finished{0};
    pool.run([&](Worker& w) {
      const Cut cut(kCols, kRows, kGranule, kGranule, *w.team);
      const auto compute = [&](int r, int n, int c0, int c1, float* c, int ld) {
        for (int i = 0; i < n; ++i)
          for (int j = c0; j < c1; ++j)
            c[i * ld + j - c0] = static_cast<float>((r + i) * j + round);
      };
      in_blocks(w, cut, kGranule, compute, [&](int r, int c0, int c1, const float* c) {
        for (int j = c0; j < c1; ++j) out[r * kCols + j] = c[j - c0];
        finished += c1 - c0;
      });
    });
    CHECK(finished == kCols * kRows);
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kCols; ++j)
        CHECK(out[i * kCols + j] == static_cast<float>(i * j + round));
  }
}

// On any machine: a policy that names node 0 alone, where the system lets us set one.
void check_numa(Pool& pool) {
  CHECK(Nodes::of(pool).count() >= 1);
  CHECK(Nodes::allowed().count() >= 1);
  Nodes first;
  first.add(0);
  first.add(Nodes::kMost);  // no such node
  CHECK(first.count() == 1);
  const Arena arena = Arena::zeroed(8 << 20);
  if (!first.interleave(arena.data(), 8 << 20)) return;
  int policy = -1;
  constexpr int kOfAddress = 2, kInterleave = 3;
  CHECK(syscall(SYS_get_mempolicy, &policy, nullptr, 0, arena.data(), kOfAddress) == 0);
  CHECK(policy == kInterleave);
}

}  // namespace

int main() {
  for (int threads : {1, 2, 3, 7, 16}) {
    Pool pool(threads, nullptr);
    CHECK(pool.ok() && pool.count() == threads);
    check_phases(pool, 100);
    check_static_blocks(pool);
    check_sleep(pool);
    check_scratch(pool);
    check_float_state(pool);
    check_sampler(pool);
    check_cut(pool);
    check_numa(pool);
    CHECK(count_workers() == threads - 1);
  }
  CHECK(count_workers() == 0);
  const int32_t nowhere[2] = {0, 1023};
  Pool refused(2, nowhere);
  CHECK(!refused.ok() && refused.refused_cpu() == 1023 && !refused.run([](Worker&) {}));
  Pool many(2, nullptr);  // pools live side by side
  Pool more(2, nullptr);
  check_phases(many, 10);
  check_phases(more, 10);
  return 0;
}
