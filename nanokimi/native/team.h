// The threads that work on one step. They are those of PyTorch's own OpenMP runtime, so that the process has one pool.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

// Stable entry points of libgomp, which Clang's runtime has as well. Without pragmas the same source suits every
// compiler, and the library is linked to whichever runtime PyTorch brings.
extern "C" {
void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}

// Threads meet many times per layer, mostly for less than a microsecond: they spin. On a busy machine one of them may
// have lost its core: the others then sleep, which costs them less of their own time than to spin or to yield.
class Barrier {
public:
    void meet(int size) {
        int now = round.load();
        if (waiting.fetch_add(1) + 1 == size) {
            waiting.store(0);  // before the round changes: whoever sees the new round may come back at once
            round.store(now + 1);
            if (sleeping.load()) futex(FUTEX_WAKE_PRIVATE, size);
            return;
        }
        for (int i = 0; i < SPINS; i++) {
            if (round.load(std::memory_order_acquire) != now) return;
#if defined(__x86_64__)
            _mm_pause();
#endif
        }
        sleeping.fetch_add(1);
        while (round.load() == now) futex(FUTEX_WAIT_PRIVATE, now);
        sleeping.fetch_sub(1);
    }

private:
    static constexpr int SPINS = 2000;
    // On cache lines of their own: a thread that arrives must not take away the line that the others read in a loop.
    alignas(64) std::atomic<int> waiting{0};
    alignas(64) std::atomic<int> round{0};
    std::atomic<int> sleeping{0};

    void futex(int operation, int value) { syscall(SYS_futex, &round, operation, value, nullptr, nullptr, 0); }
};

struct Team {
    Barrier* barrier;
    int rank, size;

    void meet() const {
        if (size > 1) barrier->meet(size);
    }

    // This thread's part [first, last) of `count` things, in whole blocks.
    std::pair<int64_t, int64_t> share(int64_t count, int64_t block = 1) const {
        int64_t blocks = (count + block - 1) / block;
        int64_t first = blocks * rank / size * block, last = blocks * (rank + 1) / size * block;
        return {first, last < count ? last : count};
    }
};

template <class Work>
void run_team(int threads, Work work) {
    struct Shared { Work* work; Barrier barrier; } shared{&work, {}};
    auto enter = [](void* data) {
        auto* shared = static_cast<Shared*>(data);
        (*shared->work)(Team{&shared->barrier, omp_get_thread_num(), omp_get_num_threads()});
    };
    GOMP_parallel(enter, &shared, static_cast<unsigned>(threads), 0);
}
