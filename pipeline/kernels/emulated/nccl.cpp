// NCCL as far as potstill calls it: communicators that block or do not, grouped sums of f32 over all ranks, giving up. Ranks are processes or
// threads of one; they meet in a piece of shared memory that the id names. Sums are added in the ranks' order.
//
// Held to what NCCL promises and no more: a rank that is gone is noticed by nobody, its peers' sums run until they are given up; what does
// not block is launched only once ncclCommGetAsyncError was asked. Where ranks that disagree would hang or compute nonsense, they fail here.

#include "driver.h"
#include "memory.h"

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <set>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

using namespace emulated;

API cuCtxGetCurrent(void** found);

namespace {

// ncclResult_t, ncclDataType_t, ncclRedOp_t.
constexpr int SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, IN_PROGRESS = 7;
constexpr int FLOAT32 = 7, SUM = 0;
constexpr int VERSION = 23007;
constexpr unsigned MAGIC = 0xcafebeef;

constexpr int MOST_RANKS = 16;
// Values that a rank gives at once.
constexpr size_t STRETCH = 1 << 14;
// Set to N, it has this process end by SIGKILL in its N-th group of sums, when the others have been given its first values.
constexpr const char* DIES_IN = "EMULATED_NCCL_DIES_IN";

struct Id {
    char name[128];
};

// As far as every version has it.
struct Settings {
    size_t size;
    unsigned magic, version;
    int blocking;
};

// What one rank shows to the others. Zeros to begin with, as shared memory is.
struct Place {
    std::atomic<uint32_t> taken;
    // Stretches that it has given, and has read of all.
    std::atomic<uint64_t> given, read;
    // Values of the sum that the last one belongs to.
    uint64_t count;
    float values[STRETCH];
};

struct Shared {
    std::atomic<uint32_t> ranks, here;
    Place places[MOST_RANKS];
};

struct Sum {
    const float* from;
    float* to;
    size_t count;
};

struct Communicator {
    std::string name;
    int rank, ranks;
    bool blocking;
    Shared* shared = nullptr;
    uint64_t stretches = 0, groups = 0;
    std::atomic<int> state{IN_PROGRESS};
    std::atomic<bool> aborted{false};
    // What does the last thing that was asked for.
    std::thread worker;
    // Sums that wait to be launched, and what the stream knows of them.
    std::vector<Sum> sums;
    std::shared_ptr<Collective> collective;
};

char last_error[256];

int wrong(int code, const char* what) {
    snprintf(last_error, sizeof last_error, "%s", what);
    return refuse(code, "NCCL: %s", what);
}

std::mutex& table() {
    static auto* mutex = new std::mutex;
    return *mutex;
}

std::set<Communicator*>& live() {
    static auto* all = new std::set<Communicator*>;
    return *all;
}

bool lives(Communicator* communicator) {
    std::lock_guard<std::mutex> lock(table());
    return live().count(communicator) > 0;
}

// False where the communicator was given up before.
template <class F>
bool until(const Communicator& c, F holds) {
    while (!holds()) {
        if (c.aborted) {
            return false;
        }
        usleep(50);
    }
    return true;
}

template <class F>
bool all_places(const Communicator& c, F holds) {
    return std::all_of(c.shared->places, c.shared->places + c.ranks, holds);
}

// Meets the others.
int join(Communicator& c) {
    int file = shm_open(c.name.c_str(), O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, sizeof(Shared)) != 0) {
        return wrong(SYSTEM_ERROR, "no shared memory");
    }
    void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) {
        return wrong(SYSTEM_ERROR, "shared memory cannot be mapped");
    }
    c.shared = static_cast<Shared*>(memory);
    uint32_t none = 0;
    if (!c.shared->ranks.compare_exchange_strong(none, uint32_t(c.ranks)) && none != uint32_t(c.ranks)) {
        return wrong(INVALID_ARGUMENT, "ranks of one id say different numbers of ranks");
    }
    if (c.shared->places[c.rank].taken.exchange(1) != 0) {
        return wrong(INVALID_USAGE, "two ranks of one id have the same number");
    }
    if (c.shared->here.fetch_add(1) + 1 == uint32_t(c.ranks)) {
        shm_unlink(c.name.c_str());
    }
    return until(c, [&] { return c.shared->here == uint32_t(c.ranks); }) ? SUCCESS : SYSTEM_ERROR;
}

// False where it was given up, or the ranks do not agree.
bool add_up(Communicator& c, const Sum& sum, bool dies) {
    Place& own = c.shared->places[c.rank];
    for (size_t first = 0; first < sum.count; first += STRETCH) {
        size_t n = std::min(STRETCH, sum.count - first);
        uint64_t turn = ++c.stretches;
        if (!until(c, [&] { return all_places(c, [&](const Place& p) { return p.read + 1 >= turn; }); })) {
            return false;
        }
        own.count = sum.count;
        {
            std::lock_guard<std::mutex> lock(device());
            memcpy(own.values, sum.from + first, n * sizeof(float));
        }
        own.given = turn;
        if (dies) {
            raise(SIGKILL);
        }
        if (!until(c, [&] { return all_places(c, [&](const Place& p) { return p.given >= turn; }); })) {
            return false;
        }
        if (!all_places(c, [&](const Place& p) { return p.count == sum.count; })) {
            c.state = wrong(INVALID_USAGE, "ranks add up different numbers of values");
            return false;
        }
        {
            std::lock_guard<std::mutex> lock(device());
            for (size_t i = 0; i < n; i++) {
                float total = c.shared->places[0].values[i];
                for (int r = 1; r < c.ranks; r++) {
                    total += c.shared->places[r].values[i];
                }
                sum.to[first + i] = total;
            }
        }
        own.read = turn;
    }
    return true;
}

void finish_worker(Communicator& c) {
    if (c.worker.joinable()) {
        c.worker.join();
    }
}

// Puts the sums that wait onto the stream.
void launch(Communicator& c) {
    finish_worker(c);
    const char* dies_in = getenv(DIES_IN);
    bool dies = dies_in != nullptr && ++c.groups == strtoull(dies_in, nullptr, 10);
    c.collective->launched = true;
    c.state = SUCCESS;
    c.worker = std::thread([&c, dies, sums = std::move(c.sums), collective = c.collective] {
        bool whole = std::all_of(sums.begin(), sums.end(), [&](const Sum& sum) { return add_up(c, sum, dies); });
        // What has failed runs until it is given up.
        if (whole || !until(c, [] { return false; })) {
            collective->over = true;
        }
    });
    c.sums.clear();
}

// Of the thread's open group.
thread_local int depth;
thread_local std::set<Communicator*> in_group;

int end_group() {
    int result = SUCCESS;
    for (Communicator* c : in_group) {
        c->collective = std::make_shared<Collective>();
        last_collective() = c->collective;
        c->state = IN_PROGRESS;
        if (c->blocking) {
            launch(*c);
        } else {
            result = IN_PROGRESS;
        }
    }
    in_group.clear();
    return result;
}

int release(Communicator* c) {
    {
        std::lock_guard<std::mutex> lock(table());
        if (live().erase(c) == 0) {
            return wrong(INVALID_ARGUMENT, "a communicator that is none, or was given up before");
        }
    }
    finish_worker(*c);
    if (c->collective) {
        c->collective->launched = c->collective->over = true;
    }
    if (c->shared != nullptr) {
        munmap(c->shared, sizeof(Shared));
        // The last to come has done that, if all came.
        shm_unlink(c->name.c_str());
    }
    delete c;
    return SUCCESS;
}

}  // namespace

API ncclGetVersion(int* version) {
    *version = VERSION;
    return SUCCESS;
}

API ncclGetUniqueId(Id* id) {
    unsigned char bytes[16];
    int file = open("/dev/urandom", O_RDONLY);
    if (file < 0 || read(file, bytes, sizeof bytes) != sizeof bytes) {
        return wrong(SYSTEM_ERROR, "no random bytes");
    }
    close(file);
    memset(id, 0, sizeof *id);
    int at = snprintf(id->name, sizeof id->name, "/emulated-nccl-");
    for (unsigned char byte : bytes) {
        at += snprintf(id->name + at, sizeof id->name - size_t(at), "%02x", byte);
    }
    return SUCCESS;
}

API ncclCommInitRankConfig(Communicator** made, int ranks, Id id, int rank, const Settings* settings) {
    *made = nullptr;
    if (strnlen(id.name, sizeof id.name) == sizeof id.name || strncmp(id.name, "/emulated-nccl-", 15) != 0) {
        return wrong(INVALID_ARGUMENT, "an id that ncclGetUniqueId did not make");
    }
    if (settings != nullptr && (settings->magic != MAGIC || settings->version < 21400 || settings->size < sizeof(Settings))) {
        return wrong(INVALID_ARGUMENT, "settings that NCCL_CONFIG_INITIALIZER did not make");
    }
    if (ranks < 1 || ranks > MOST_RANKS || rank < 0 || rank >= ranks) {
        return wrong(INVALID_ARGUMENT, "a rank that is not below the number of ranks, or too many of them");
    }
    void* context = nullptr;
    cuCtxGetCurrent(&context);
    if (context == nullptr) {
        return wrong(INVALID_USAGE, "no device is current in the thread that makes a communicator");
    }
    auto* c = new Communicator;
    c->name = id.name;
    c->rank = rank;
    c->ranks = ranks;
    c->blocking = settings == nullptr || settings->blocking != 0;
    {
        std::lock_guard<std::mutex> lock(table());
        live().insert(c);
    }
    *made = c;
    if (c->blocking) {
        c->state = join(*c);
        return c->state;
    }
    c->worker = std::thread([c] { c->state = join(*c); });
    return IN_PROGRESS;
}

API ncclCommGetAsyncError(Communicator* c, int* state) {
    if (!lives(c)) {
        return wrong(INVALID_ARGUMENT, "a communicator that is none, or was given up before");
    }
    *state = c->state;
    if (!c->sums.empty()) {
        launch(*c);
    }
    return SUCCESS;
}

API ncclCommAbort(Communicator* c) {
    if (lives(c)) {
        c->aborted = true;
    }
    return release(c);
}

API ncclCommDestroy(Communicator* c) { return release(c); }

API ncclGroupStart() {
    depth++;
    return SUCCESS;
}

API ncclGroupEnd() {
    if (depth == 0) {
        return wrong(INVALID_USAGE, "a group ends that did not begin");
    }
    return --depth == 0 ? end_group() : SUCCESS;
}

API ncclAllReduce(const void* from, void* to, size_t count, int type, int operation, Communicator* c, void*) {
    if (!lives(c)) {
        return wrong(INVALID_ARGUMENT, "a communicator that is none, or was given up before");
    }
    if (c->state != SUCCESS) {
        return wrong(INVALID_USAGE, "a sum on a communicator that has failed, or has not done what it was asked for before");
    }
    if (type != FLOAT32 || operation != SUM) {
        return wrong(INVALID_ARGUMENT, "only sums of f32 are emulated");
    }
    {
        std::lock_guard<std::mutex> lock(device());
        if (!holds(from, count * sizeof(float)) || !holds(to, count * sizeof(float))) {
            return wrong(INVALID_ARGUMENT, "values that are not within one allocation");
        }
    }
    c->sums.push_back({static_cast<const float*>(from), static_cast<float*>(to), count});
    in_group.insert(c);
    return depth == 0 ? end_group() : SUCCESS;
}

#define TEXT extern "C" __attribute__((visibility("default"))) const char*

TEXT ncclGetErrorString(int code) {
    switch (code) {
        case SUCCESS: return "no error";
        case SYSTEM_ERROR: return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
        case INVALID_ARGUMENT: return "invalid argument (run with NCCL_DEBUG=WARN for details)";
        case INVALID_USAGE: return "invalid usage (run with NCCL_DEBUG=WARN for details)";
        case IN_PROGRESS: return "NCCL operation in progress";
        default: return "an error that the emulation does not know";
    }
}

TEXT ncclGetLastError(Communicator*) { return last_error; }
