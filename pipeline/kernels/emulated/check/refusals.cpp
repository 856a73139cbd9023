// What a real device refuses, and what on one would hang or write anywhere: here each is an error or ends the run with a sentence.

#include "../../ptx.cuh"
#include "check.h"

#include <sys/wait.h>
#include <unistd.h>

using namespace check;

extern "C" __global__ void check_write(int* x, int at) {
    if (threadIdx.x == 0) {
        x[at] = 7;
    }
}
EXPORT(check_write);

// One mistake a number.
extern "C" __global__ void check_wrong(int* x, int mistake) {
    DYNAMIC_SHARED(int, shared);
    unsigned i = threadIdx.x;
    if (mistake == 0 && i < 5) {
        __syncthreads();
    }
    if (mistake == 1 && i == 0) {
        return;
    }
    if (mistake == 1) {
        __syncthreads();
    }
    if (mistake == 2 && i % 32 < 31) {
        __syncwarp();
    }
    if (mistake == 3) {
        x[i] = __shfl_sync(i % 2 == 0 ? 0x55555555 : 0xaaaaaaaa, x[i], 1);
    }
    if (mistake == 4) {
        x[i] = i % 2 == 0 ? __shfl_xor_sync(0xffffffff, x[i], 1) : __shfl_down_sync(0xffffffff, x[i], 1);
    }
    if (mistake == 5) {
        x[i] = __shfl_sync(0x0000ffff, x[i], 0);
    }
    if (mistake == 6 && i == 0) {
        shared[16] = 1;
    }
}
EXPORT(check_wrong);

// What the run says as it ends, in a process of its own.
template <class F>
static std::string last_words(F wrong) {
    int ends[2];
    EXPECT(pipe(ends) == 0, "pipe");
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        wrong();
        _exit(0);
    }
    close(ends[1]);
    std::string words;
    char buffer[512];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) {
        words.append(buffer, size_t(n));
    }
    close(ends[0]);
    int status = 0;
    EXPECT(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT, "it did not end: %s", words.c_str());
    return words;
}

TEST(what_would_hang_ends_the_run) {
    const char* sentences[] = {
        "ends while others wait in __syncthreads",
        "comes to __syncthreads after others have ended",
        "waits in __syncwarp for threads that never come",
        "a shuffle reads lane 1, which is not in its mask 55555555",
        "lanes of a warp meet in __shfl_xor_sync (ffffffff) and __shfl_down_sync (ffffffff)",
        "lacks its own lane",
        "byte 64 of 64 bytes of dynamic shared memory was written",
    };
    Values<int> x = Values<int>::made(64);
    for (int mistake = 0; mistake < 7; mistake++) {
        std::string words = last_words([&] { launch("check_wrong", {1}, {64}, 64, x, mistake); });
        EXPECT(words.find(sentences[mistake]) != std::string::npos, "mistake %d: %s", mistake, words.c_str());
    }
    std::string words = last_words([&] { launch("check_wrong", {1}, {64}, 64, x.address() + 4 * 65, 7); });
    EXPECT(words.find("argument 0 of check_wrong, ") != std::string::npos && words.find("points to no device memory") != std::string::npos,
           "an address beyond its allocation: %s", words.c_str());
    words = last_words([&] { launch("check_wrong", {1}, {64}, 64, x.address() + 1, 7); });
    EXPECT(words.find("is not aligned to 4 bytes") != std::string::npos, "an odd address: %s", words.c_str());
}

TEST(launches_that_no_device_takes_are_refused) {
    Values<int> x = Values<int>::made(4);
    EXPECT(try_launch("check_write", {0}, {32}, 0, x, 0) == 1, "no blocks");
    EXPECT(try_launch("check_write", {1}, {2048}, 0, x, 0) == 1, "2048 threads");
    EXPECT(try_launch("check_write", {1, 70000}, {32}, 0, x, 0) == 1, "70000 rows of blocks");
    EXPECT(try_launch("check_write", {1}, {32}, 48 << 10, x, 0) == 0, "48 KiB");
    EXPECT(try_launch("check_write", {1}, {32}, 227 << 10, x, 1) == 0, "227 KiB that were asked for");
    void *module, *function, *pointers[] = {nullptr};
    EXPECT(cuModuleLoadData(&module, "") == 0 && cuModuleGetFunction(&function, module, "check_wrong") == 0, "kernel");
    EXPECT(cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, (48 << 10) + 1, nullptr, pointers, nullptr) == 1, "more than 48 KiB");
    EXPECT(cuFuncSetAttribute(function, 8, (227 << 10) + 1) == 1, "more than 227 KiB");
    EXPECT(cuModuleGetFunction(&function, module, "check_nothing") == 500, "an unknown kernel");
    same("written", x.read(), {7, 7, -1, -1});
}

TEST(copies_outside_an_allocation_are_refused) {
    unsigned long long begin;
    char bytes[20] = {};
    EXPECT(cuMemAlloc_v2(&begin, 16) == 0 && begin % 256 == 0, "allocation");
    EXPECT(cuMemcpyHtoD_v2(begin, bytes, 16) == 0 && cuMemcpyHtoD_v2(begin + 4, bytes, 13) == 1, "copy to");
    EXPECT(cuMemcpyDtoH_v2(bytes, begin + 16, 1) == 1 && cuMemcpyDtoH_v2(bytes, begin - 1, 1) == 1, "copy from");
    EXPECT(cuMemFree_v2(begin) == 0 && cuMemFree_v2(begin) == 1, "freed twice");
    EXPECT(cuMemcpyDtoH_v2(bytes, begin, 1) == 1, "copy from what was freed");
}

#if !defined(__SANITIZE_ADDRESS__)
// With a sanitizer the write itself ends the run.
TEST(a_write_beside_an_allocation_is_seen) {
    unsigned long long begin;
    EXPECT(cuMemAlloc_v2(&begin, 16) == 0, "allocation");
    int end = 4;
    void *module, *function, *pointers[] = {&begin, &end};
    EXPECT(cuModuleLoadData(&module, "") == 0 && cuModuleGetFunction(&function, module, "check_write") == 0, "kernel");
    EXPECT(cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, nullptr, pointers, nullptr) == 700, "a write after the end");
    EXPECT(cuMemFree_v2(begin) == 1, "freed although damaged");
}
#endif
