#include "pool.hpp"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace mf {
namespace {

struct Job {
    void (*part)(void*, size_t);
    void* context;
    size_t parts;
    unsigned seats;  // workers that may still join
    unsigned active = 0;
    std::atomic<size_t> next{0};
    Job* following = nullptr;

    void work() {
        for (size_t k; (k = next.fetch_add(1, std::memory_order_relaxed)) < parts;) part(context, k);
    }
};

// Everything below the lock; never destroyed, because the workers are never joined.
struct Pool {
    std::mutex lock;
    std::condition_variable wake, finished;
    Job* jobs = nullptr;  // newest first
    unsigned workers = 0;

    void serve() {
        std::unique_lock guard(lock);
        for (;;) {
            Job* job = jobs;
            while (job != nullptr && job->seats == 0) job = job->following;
            if (job == nullptr) {
                wake.wait(guard);
                continue;
            }
            --job->seats;
            ++job->active;
            guard.unlock();
            job->work();
            guard.lock();
            // Under the lock: the caller can't see 0 and leave before this thread let go of the job.
            if (--job->active == 0) finished.notify_all();
        }
    }

    void grow(unsigned wanted) {
        if (workers >= wanted) return;
        // Workers inherit the mask: signals are for the threads that Python knows.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (; workers < wanted; ++workers) std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
            // No more threads to be had: fewer helpers, the same result.
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    void remove(Job* job) {
        Job** link = &jobs;
        while (*link != job) link = &(*link)->following;
        *link = job->following;
    }
};

Pool*& current() {
    static Pool* pool = new Pool;
    return pool;
}

void hook_fork() {
    // The child has none of the workers and perhaps a half-finished job: it gets a new pool, the old one is left alone.
    static const int hooked = pthread_atfork([] { current()->lock.lock(); }, [] { current()->lock.unlock(); },
                                             [] { current() = new (std::nothrow) Pool; });
    if (hooked != 0) throw std::bad_alloc();
}

}  // namespace

unsigned usable_cores() {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
    return static_cast<unsigned>(CPU_COUNT(&set));
}

void run_parallel(size_t parts, unsigned threads, void (*part)(void*, size_t), void* context) {
    hook_fork();
    Job job{part, context, parts, threads - 1};
    Pool* pool = current();
    if (pool == nullptr || threads < 2 || parts < 2) {
        job.work();
        return;
    }
    {
        std::lock_guard guard(pool->lock);
        pool->grow(job.seats);
        job.following = pool->jobs;
        pool->jobs = &job;
    }
    for (unsigned i = 1; i < threads; ++i) pool->wake.notify_one();
    job.work();
    std::unique_lock guard(pool->lock);
    pool->remove(&job);
    pool->finished.wait(guard, [&] { return job.active == 0; });
}

}  // namespace mf
