// Sums over ranks that are threads or processes, and what NCCL refuses.

#include "check.h"

#include <atomic>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

using namespace check;

extern "C" {
struct Id {
    char bytes[128];
};
struct Settings {
    size_t size;
    unsigned magic, version;
    int blocking;
};
int ncclGetUniqueId(Id* id);
int ncclCommInitRankConfig(void** made, int ranks, Id id, int rank, const Settings* settings);
int ncclCommGetAsyncError(void* communicator, int* state);
int ncclCommAbort(void* communicator);
int ncclGroupStart();
int ncclGroupEnd();
int ncclAllReduce(const void* from, void* to, size_t count, int type, int operation, void* communicator, void* stream);
int cuCtxSetCurrent(void* context);
int cuEventCreate(void** made, unsigned flags);
int cuEventDestroy_v2(void* event);
int cuEventRecord(void* event, void* stream);
int cuEventQuery(void* event);
}

namespace {

constexpr int INVALID_ARGUMENT = 4, INVALID_USAGE = 5, IN_PROGRESS = 7, NOT_READY = 600;
constexpr Settings PATIENT = {sizeof(Settings), 0xcafebeef, 21400, 0};

Id made() {
    Id id;
    EXPECT(ncclGetUniqueId(&id) == 0, "an id");
    return id;
}

// Asks until it is done; gives the state.
int settled(void* communicator) {
    int state = IN_PROGRESS;
    while (state == IN_PROGRESS) {
        EXPECT(ncclCommGetAsyncError(communicator, &state) == 0, "asking");
    }
    return state;
}

void* joined(Id id, int ranks, int rank, const Settings* settings) {
    void* communicator;
    EXPECT(cuCtxSetCurrent(&communicator) == 0, "context");
    int result = ncclCommInitRankConfig(&communicator, ranks, id, rank, settings);
    EXPECT(result == (settings == nullptr ? 0 : IN_PROGRESS), "a communicator: %d", result);
    EXPECT(settled(communicator) == 0, "not connected");
    return communicator;
}

// Numbers whose sums depend on their order.
std::vector<float> values_of(int rank, size_t n) {
    std::vector<float> values = Random(uint64_t(rank) + 7).values(n);
    for (size_t i = 0; i < n; i++) {
        values[i] *= i % 3 == 0 ? 1e8f : 1.0f;
    }
    return values;
}

void* sum(void* communicator, const Values<float>& values, size_t n) {
    EXPECT(ncclGroupStart() == 0, "group");
    auto at = reinterpret_cast<void*>(values.address());
    EXPECT(ncclAllReduce(at, at, n, 7, 0, communicator, nullptr) == 0, "sum");
    int result = ncclGroupEnd();
    void* event;
    EXPECT(cuEventCreate(&event, 0) == 0, "event");
    if (result == IN_PROGRESS) {
        EXPECT(cuEventRecord(event, nullptr) != 0, "an event that would not wait for the sum");
        EXPECT(settled(communicator) == 0, "not launched");
    } else {
        EXPECT(result == 0, "the group's end: %d", result);
    }
    EXPECT(cuEventRecord(event, nullptr) == 0, "an event");
    return event;
}

void sums_in_rank_order(Id id, int ranks, int rank, const Settings* settings) {
    void* communicator = joined(id, ranks, rank, settings);
    for (size_t n : {1, 40000}) {
        Values<float> values(values_of(rank, n));
        void* event = sum(communicator, values, n);
        // Waits on the stream.
        std::vector<float> expected = values_of(0, n);
        for (int r = 1; r < ranks; r++) {
            std::vector<float> theirs = values_of(r, n);
            for (size_t i = 0; i < n; i++) {
                expected[i] += theirs[i];
            }
        }
        same("a sum", values.read(), expected);
        EXPECT(cuEventQuery(event) == 0, "the sum is there before its event");
        cuEventDestroy_v2(event);
    }
    EXPECT(ncclCommAbort(communicator) == 0, "given up");
}

}  // namespace

TEST(collectives_of_threads) {
    for (const Settings* settings : {&PATIENT, static_cast<const Settings*>(nullptr)}) {
        for (int ranks : {1, 2, 5}) {
            Id id = made();
            std::vector<std::thread> threads;
            for (int rank = 0; rank < ranks; rank++) {
                threads.emplace_back(sums_in_rank_order, id, ranks, rank, settings);
            }
            for (std::thread& thread : threads) {
                thread.join();
            }
        }
    }
}

TEST(collectives_of_processes) {
    Id id = made();
    pid_t child = fork();
    if (child == 0) {
        sums_in_rank_order(id, 2, 1, &PATIENT);
        _exit(0);
    }
    sums_in_rank_order(id, 2, 0, &PATIENT);
    int status;
    EXPECT(waitpid(child, &status, 0) == child && status == 0, "the other process: %d", status);
}

TEST(collectives_that_nobody_joins_run_until_they_are_given_up) {
    Id id = made();
    std::atomic<bool> gone{false};
    std::thread other([&] {
        EXPECT(ncclCommAbort(joined(id, 2, 1, &PATIENT)) == 0, "given up");
        gone = true;
    });
    void* communicator = joined(id, 2, 0, &PATIENT);
    other.join();
    Values<float> values(values_of(0, 3));
    void* event = sum(communicator, values, 3);
    for (int i = 0; i < 100; i++) {
        int state;
        EXPECT(ncclCommGetAsyncError(communicator, &state) == 0 && state == 0, "nobody tells that the other is gone");
        EXPECT(cuEventQuery(event) == NOT_READY, "a sum without the other");
    }
    EXPECT(ncclCommAbort(communicator) == 0, "given up");
    EXPECT(cuEventQuery(event) == 0, "a sum that was given up still runs");
    same("values", values.read(), values_of(0, 3));
    cuEventDestroy_v2(event);
    int state;
    EXPECT(ncclCommGetAsyncError(communicator, &state) == INVALID_ARGUMENT, "a communicator after its end");
    EXPECT(ncclCommAbort(communicator) == INVALID_ARGUMENT, "given up twice");
    auto at = reinterpret_cast<void*>(values.address());
    EXPECT(ncclAllReduce(at, at, 3, 7, 0, communicator, nullptr) == INVALID_ARGUMENT, "a sum after its end");
}

TEST(collectives_that_do_not_fit_fail) {
    Id id = made();
    auto rank = [&](int number) {
        void* communicator = joined(id, 2, number, &PATIENT);
        Values<float> values(values_of(number, 5));
        void* event = sum(communicator, values, size_t(4 + number));
        int state = 0;
        while (state == 0) {
            EXPECT(ncclCommGetAsyncError(communicator, &state) == 0 && cuEventQuery(event) == NOT_READY, "different numbers of values");
        }
        EXPECT(state == INVALID_USAGE, "state %d", state);
        auto at = reinterpret_cast<void*>(values.address());
        EXPECT(ncclAllReduce(at, at, 3, 7, 0, communicator, nullptr) == INVALID_USAGE, "a sum after a failure");
        EXPECT(ncclCommAbort(communicator) == 0, "given up");
        cuEventDestroy_v2(event);
    };
    std::thread other(rank, 1);
    rank(0);
    other.join();

    void* communicator = joined(made(), 1, 0, nullptr);
    Values<float> values(values_of(0, 5));
    auto at = reinterpret_cast<void*>(values.address());
    EXPECT(ncclAllReduce(at, at, 6, 7, 0, communicator, nullptr) == INVALID_ARGUMENT, "more values than there are");
    EXPECT(ncclAllReduce(at, at, 5, 8, 0, communicator, nullptr) == INVALID_ARGUMENT, "f64");
    EXPECT(ncclGroupEnd() == INVALID_USAGE, "a group that did not begin");
    EXPECT(ncclCommAbort(communicator) == 0, "given up");
    Settings odd = PATIENT;
    odd.magic = 1;
    EXPECT(ncclCommInitRankConfig(&communicator, 1, made(), 0, &odd) == INVALID_ARGUMENT, "settings of nobody");
    EXPECT(ncclCommInitRankConfig(&communicator, 1, made(), 1, &PATIENT) == INVALID_ARGUMENT, "rank 1 of 1");
    EXPECT(ncclCommInitRankConfig(&communicator, 1, Id{}, 0, &PATIENT) == INVALID_ARGUMENT, "an id of nobody");
}
