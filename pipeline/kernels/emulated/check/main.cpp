// Runs every check, or those whose names contain the argument.

#include "check.h"

#include <cstdarg>

namespace check {

std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

void failed(const char* file, int line, const char* format, ...) {
    fprintf(stderr, "%s:%d: ", file, line);
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

}  // namespace check

int main(int count, char** arguments) {
    size_t run = 0;
    for (const auto& test : check::tests()) {
        if (count < 2 || strstr(test.name, arguments[1]) != nullptr) {
            fprintf(stderr, "%s\n", test.name);
            test.run();
            run++;
        }
    }
    printf("%zu checks passed\n", run);
    return run == 0;
}
