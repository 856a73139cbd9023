// The table of kernels: names, and how the driver's array of argument pointers becomes a call.
#pragma once

#include "fibres.h"

#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

namespace emulated {

// Ends the process unless `pointer` is null or lies, aligned, in memory that cuMemAlloc gave (memory.cpp).
void check_argument(const char* kernel, unsigned argument, const void* pointer, size_t align);

struct Kernel {
    const char* name;
    void (*launch)(const Kernel& self, void* const* arguments, dim3 grid, dim3 block, size_t shared_bytes);
    void (*function)();
    // What cuFuncSetAttribute allows it of dynamic shared memory.
    size_t most_shared = PLAIN_SHARED;
};

// Adds a kernel to the table; it must live as long as the library.
void add_kernel(Kernel* kernel);
// The kernel of that name, or null.
Kernel* find_kernel(const char* name);

template <class T>
T argument(const Kernel& kernel, unsigned number, void* const* arguments) {
    T value;
    memcpy(&value, arguments[number], sizeof value);
    if constexpr (std::is_pointer_v<T>) {
        check_argument(kernel.name, number, value, alignof(std::remove_pointer_t<T>));
    }
    return value;
}

template <class... A>
struct Call {
    void (*function)(A...);
    std::tuple<std::decay_t<A>...> arguments;

    static void call(const void* self) {
        const Call& bound = *static_cast<const Call*>(self);
        std::apply(bound.function, bound.arguments);
    }

    template <size_t... I>
    static void run(const Kernel& kernel, void* const* arguments, dim3 grid, dim3 block, size_t shared_bytes, std::index_sequence<I...>) {
        Call bound = {reinterpret_cast<void (*)(A...)>(kernel.function), {argument<std::decay_t<A>>(kernel, I, arguments)...}};
        emulated::run({kernel.name, call, &bound}, grid, block, shared_bytes);
    }

    static void launch(const Kernel& kernel, void* const* arguments, dim3 grid, dim3 block, size_t shared_bytes) {
        run(kernel, arguments, grid, block, shared_bytes, std::index_sequence_for<A...>());
    }
};

// Registers itself where it stands, so it is built in place and never copied.
template <class... A>
struct Registered : Kernel {
    Registered(const char* name, void (*function)(A...)) : Kernel{name, Call<A...>::launch, reinterpret_cast<void (*)()>(function)} {
        add_kernel(this);
    }
    Registered(const Registered&) = delete;
};

}  // namespace emulated
