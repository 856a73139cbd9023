// Switching between stacks: by hand on x86-64 (ten instructions; swapcontext would make a system call each time), else by ucontext.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulated {

#if defined(__x86_64__) && !defined(EMULATED_UCONTEXT)

struct Context {
    void* stack_pointer;
};

extern "C" void emulated_switch(void** save, void* load);
asm(R"(
.text
.local emulated_switch
.type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulated_switch, .-emulated_switch
)");

inline void switch_context(Context& from, Context& to) {
    emulated_switch(&from.stack_pointer, to.stack_pointer);
}

// A context that begins with `entry` on an empty stack.
inline void prepare(Context& context, unsigned char* stack, size_t size, void (*entry)()) {
    // The ABI wants the stack 8 bytes off a multiple of 16 where a function begins; below it lie `entry` and six registers.
    auto* top = reinterpret_cast<uintptr_t*>(stack + size - 24);
    top[0] = 0;
    top[-1] = reinterpret_cast<uintptr_t>(entry);
    context.stack_pointer = top - 7;
}

#else

}  // namespace emulated
#include <ucontext.h>
namespace emulated {

struct Context {
    ucontext_t state;
};

inline void switch_context(Context& from, Context& to) {
    swapcontext(&from.state, &to.state);
}

inline void prepare(Context& context, unsigned char* stack, size_t size, void (*entry)()) {
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = stack;
    context.state.uc_stack.ss_size = size;
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
}

#endif

}  // namespace emulated
