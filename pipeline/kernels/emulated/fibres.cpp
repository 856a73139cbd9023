#include "fibres.h"

#include "context.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <vector>

namespace emulated {

namespace {

// Enough for a kernel's registers with an address sanitizer's margins around each array; pages that are not touched cost nothing.
constexpr size_t STACK_BYTES = 256 << 10;
constexpr unsigned NONE = ~0u;
// Bytes after a block's dynamic shared memory that nothing may change.
constexpr size_t MARGIN = 64;

struct Fibre {
    Place place;
    Context context;
    unsigned char* stack;
    // What it waits for; null while it runs, is ready or has ended.
    const char* waits;
};

// What lanes of a warp wait for, filed under the lowest lane of their mask: masks that are disjoint do not meet.
struct Meeting {
    const char* name;
    unsigned mask, come;
    void* lanes[WARP];
};

struct Block {
    Fibre threads[MOST_THREADS];
    Meeting meetings[MOST_THREADS];
    // Numbers of the threads that can run, a ring; each is in it once at most.
    unsigned ready[MOST_THREADS], first, waiting;
    unsigned count, running, ended, at_barrier;
    Body body;
    Context caller;
    std::vector<unsigned char*> stacks;
    size_t shared_bytes;
    alignas(1024) unsigned char shared[MOST_SHARED + MARGIN];
};

Block block;

unsigned char* take_stack() {
    if (!block.stacks.empty()) {
        unsigned char* stack = block.stacks.back();
        block.stacks.pop_back();
        return stack;
    }
    const size_t page = 4096;
    void* mapped = mmap(nullptr, STACK_BYTES + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    // The lowest page stays closed, so that a stack that overflows stops here and not in its neighbour.
    if (mapped == MAP_FAILED || mprotect(mapped, page, PROT_NONE) != 0) {
        fail("no memory for a thread's stack");
    }
    return static_cast<unsigned char*>(mapped) + page;
}

void make_ready(unsigned thread) {
    block.threads[thread].waits = nullptr;
    block.ready[(block.first + block.waiting++) % MOST_THREADS] = thread;
}

// The next thread that can run. That there is none although some have not ended means that they wait for each other.
unsigned next() {
    if (block.waiting == 0) {
        unsigned stuck = 0;
        while (stuck + 1 < block.count && block.threads[stuck].waits == nullptr) {
            stuck++;
        }
        fail("thread %u waits in %s for threads that never come", stuck, block.threads[stuck].waits);
    }
    unsigned thread = block.ready[block.first];
    block.first = (block.first + 1) % MOST_THREADS;
    block.waiting--;
    return thread;
}

// Each thread's life. A thread that has not begun takes over the stack of the one that ended, so a kernel without barriers needs one.
__attribute__((no_sanitize("address"))) void live() {
    for (;;) {
        block.body.call(block.body.arguments);
        Fibre& self = block.threads[block.running];
        block.ended++;
        if (block.at_barrier > 0) {
            fail("thread %u ends while others wait in __syncthreads", block.running);
        }
        if (block.ended == block.count) {
            block.stacks.push_back(self.stack);
            switch_context(self.context, block.caller);
        }
        unsigned thread = next();
        Fibre& other = block.threads[thread];
        block.running = thread;
        place = &other.place;
        if (other.stack == nullptr) {
            other.stack = self.stack;
            continue;
        }
        block.stacks.push_back(self.stack);
        switch_context(self.context, other.context);
    }
}

void go_on(Context& save) {
    unsigned thread = next();
    Fibre& other = block.threads[thread];
    block.running = thread;
    place = &other.place;
    if (other.stack == nullptr) {
        other.stack = take_stack();
        prepare(other.context, other.stack, STACK_BYTES, live);
    }
    switch_context(save, other.context);
}

void wait(const char* what) {
    Fibre& self = block.threads[block.running];
    self.waits = what;
    go_on(self.context);
}

}  // namespace

Place* place;

unsigned thread_number() {
    return block.running;
}

unsigned char* dynamic_shared() {
    return block.shared;
}

void barrier() {
    if (block.ended > 0) {
        fail("thread %u comes to __syncthreads after others have ended", block.running);
    }
    if (++block.at_barrier < block.count) {
        return wait("__syncthreads");
    }
    block.at_barrier = 0;
    for (unsigned thread = 0; thread < block.count; thread++) {
        if (thread != block.running) {
            make_ready(thread);
        }
    }
}

void together(const char* name, unsigned mask, void* mine, Combine combine) {
    unsigned lane = block.running % WARP, first = block.running - lane;
    if ((mask >> lane & 1) == 0 || (first + WARP > block.count && mask >> (block.count - first) != 0)) {
        fail("%s of thread %u: mask %08x lacks its own lane or names lanes that are not there", name, block.running, mask);
    }
    Meeting& meeting = block.meetings[first + __builtin_ctz(mask)];
    if (meeting.come == 0) {
        meeting = {name, mask, 0, {}};
    } else if (meeting.mask != mask || strcmp(meeting.name, name) != 0) {
        fail("lanes of a warp meet in %s (%08x) and %s (%08x)", meeting.name, meeting.mask, name, mask);
    }
    meeting.lanes[lane] = mine;
    meeting.come |= 1u << lane;
    if (meeting.come != mask) {
        return wait(name);
    }
    meeting.come = 0;
    combine(meeting.lanes, mask);
    for (unsigned other = 0; other < WARP; other++) {
        if ((mask >> other & 1) != 0 && other != lane) {
            make_ready(first + other);
        }
    }
}

static void run_block(uint3 index, dim3 grid, dim3 size) {
    block.first = block.waiting = block.ended = block.at_barrier = 0;
    for (unsigned thread = 0; thread < block.count; thread++) {
        uint3 in_block = {thread % size.x, thread / size.x % size.y, thread / size.x / size.y};
        block.threads[thread].place = {in_block, index, size, grid};
        block.threads[thread].stack = nullptr;
        make_ready(thread);
    }
    // All bits set: NaN as a float, -1 as a number.
    memset(block.shared, 0xff, block.shared_bytes + MARGIN);
    go_on(block.caller);
    for (size_t i = 0; i < MARGIN; i++) {
        if (block.shared[block.shared_bytes + i] != 0xff) {
            fail("byte %zu of %zu bytes of dynamic shared memory was written", block.shared_bytes + i, block.shared_bytes);
        }
    }
}

void run(const Body& body, dim3 grid, dim3 size, size_t shared_bytes) {
    block.body = body;
    block.count = size.x * size.y * size.z;
    block.shared_bytes = shared_bytes;
    for (auto& meeting : block.meetings) {
        meeting.come = 0;
    }
    for (unsigned z = 0; z < grid.z; z++) {
        for (unsigned y = 0; y < grid.y; y++) {
            for (unsigned x = 0; x < grid.x; x++) {
                run_block({x, y, z}, grid, size);
            }
        }
    }
    block.running = NONE;
}

void fail(const char* format, ...) {
    fprintf(stderr, "emulated GPU: kernel %s: ", block.body.name == nullptr ? "?" : block.body.name);
    if (block.running != NONE && place != nullptr) {
        fprintf(stderr, "block (%u, %u, %u): ", place->block.x, place->block.y, place->block.z);
    }
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    abort();
}

}  // namespace emulated
